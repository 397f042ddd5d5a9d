"""`keygen` and `sign`: what they write, what they refuse, and that refusing leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from appliance.errors import BadRequest, VerificationRefused
from appliance.trust.manifest import Envelope, pre_authentication_encoding
from appliance.trust.verify import TrustedKey, verify
from provisioning.sign import keygen, sign
from tests.bundles import Signed, good_files, signed_bundle, write


@pytest.fixture
def bundle(tmp_path: Path) -> Signed:
    return signed_bundle(tmp_path)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pem_file(path: Path, key: PrivateKeyTypes, encryption: serialization.KeySerializationEncryption | None = None) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption or serialization.NoEncryption()
    ))
    return path


def test_keygen_makes_a_pair_that_only_its_owner_can_use(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        pair = keygen(tmp_path / "release.pem")
    finally:
        os.umask(before)
    assert pair.public == tmp_path / "release.pub.pem"
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    assert TrustedKey.load(pair.public).fingerprint == pair.fingerprint
    command = ["openssl", "ec", "-in", str(pair.private), "-noout", "-text"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "secp384r1" in shown.stdout


@pytest.mark.parametrize("taken", ["release.pem", "release.pub.pem"])
def test_keygen_overwrites_nothing_and_leaves_nothing(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(BadRequest) as caught:
        keygen(tmp_path / "release.pem")
    assert caught.value.reason == "key_exists"
    assert taken in str(caught.value)
    assert everything(tmp_path) == {str(tmp_path / taken): b"mine"}


def test_keygen_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "release.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadRequest):
        keygen(tmp_path / "release.pem")
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "release.pub.pem").exists()


def test_keygen_into_no_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        keygen(tmp_path / "none" / "release.pem")
    assert caught.value.reason == "key_unwritable"


def test_sign_returns_the_digest_that_verify_shows(tmp_path: Path) -> None:
    folder = write(tmp_path / "b", good_files())
    pair = keygen(tmp_path / "k.pem")
    digest = sign(folder, pair.private)
    model = verify(folder, [TrustedKey.load(pair.public)])
    assert model.digest == digest
    assert set(model.digests) == set(good_files())


def test_the_same_files_and_key_give_the_same_signature_whatever_the_folder_is_called(bundle: Signed, tmp_path: Path) -> None:
    first = (bundle.folder / "model.sig").read_bytes()
    other = write(tmp_path / "another name", good_files())
    sign(other, bundle.private)
    assert (other / "model.sig").read_bytes() == first


def test_signing_again_replaces_the_signature(bundle: Signed) -> None:
    (bundle.folder / "unet/weights.bin").write_bytes(b"12345678")
    with pytest.raises(VerificationRefused):
        verify(bundle.folder, [bundle.trusted])
    sign(bundle.folder, bundle.private)
    assert verify(bundle.folder, [bundle.trusted]).content("unet/weights.bin") == b"12345678"


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_every_curve_of_the_format_signs_and_verifies(curve: ec.EllipticCurve, bundle: Signed, tmp_path: Path) -> None:
    key = ec.generate_private_key(curve)
    sign(bundle.folder, pem_file(tmp_path / "other.pem", key))
    verify(bundle.folder, [TrustedKey.of(key.public_key())])


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_openssl_verifies_the_signature_too(curve: ec.EllipticCurve, bundle: Signed, tmp_path: Path) -> None:
    key = ec.generate_private_key(curve)
    sign(bundle.folder, pem_file(tmp_path / "other.pem", key))
    (tmp_path / "other.pub.pem").write_bytes(key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ))
    envelope = Envelope.parse((bundle.folder / "model.sig").read_bytes())
    assert envelope.hint == hashlib.sha256((tmp_path / "other.pub.pem").read_bytes()).hexdigest()
    (tmp_path / "der").write_bytes(envelope.signature)
    (tmp_path / "signed").write_bytes(pre_authentication_encoding(envelope.payload))
    digest = {256: "sha256", 384: "sha384", 521: "sha512"}[curve.key_size]
    command = ["openssl", "dgst", f"-{digest}", "-verify", f"{tmp_path}/other.pub.pem", "-signature", f"{tmp_path}/der"]
    good = subprocess.run([*command, f"{tmp_path}/signed"], capture_output=True, text=True, check=False)
    assert good.stdout == "Verified OK\n"
    (tmp_path / "signed").write_bytes(pre_authentication_encoding(envelope.payload + b" "))
    bad = subprocess.run([*command, f"{tmp_path}/signed"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1


def spoil(bundle: Path, how: str) -> None:
    if how == "file_symlink":
        (bundle / "link").symlink_to("LICENSE")
    elif how == "file_hardlink":
        os.link(bundle / "LICENSE", bundle.parent / "aside")
    elif how == "file_special":
        os.mkfifo(bundle / "fifo")
    elif how == "file_name":
        (bundle / ".gitignore").touch()
    elif how == "empty_folder":
        (bundle / "empty").mkdir()
    elif how == "required_missing":
        (bundle / "LICENSE").unlink()
    elif how == "component_missing":
        (bundle / "vae_decoder/model.onnx").rename(bundle / "vae_decoder/other.onnx")
    elif how == "model_json":
        (bundle / "model.json").write_text("{}")
    elif how == "onnx_malformed":
        (bundle / "unet/model.onnx").write_bytes(b"")
    elif how == "private_key":
        (bundle / "key.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\n")


@pytest.mark.parametrize("reason", [
    "file_symlink", "file_hardlink", "file_special", "file_name", "empty_folder", "required_missing", "component_missing",
    "model_json", "onnx_malformed", "private_key",
])
def test_a_bundle_that_no_appliance_would_accept_is_not_signed(reason: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "b", good_files())
    pair = keygen(tmp_path / "k.pem")
    spoil(folder, reason)
    with pytest.raises(VerificationRefused) as caught:
        sign(folder, pair.private)
    assert caught.value.reason == reason
    assert not (folder / "model.sig").exists()


def test_an_unfinished_signature_of_a_crash_is_neither_signed_nor_verified(bundle: Signed) -> None:
    (bundle.folder / ".model.sig.new").touch()
    with pytest.raises(VerificationRefused):
        sign(bundle.folder, bundle.private)
    with pytest.raises(VerificationRefused):
        verify(bundle.folder, [bundle.trusted])


def test_a_signature_that_cannot_be_written_leaves_the_old_one(bundle: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = everything(bundle.folder)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadRequest) as caught:
        sign(bundle.folder, bundle.private)
    assert caught.value.reason == "bundle_unwritable"
    assert "no space left" in str(caught.value)
    assert everything(bundle.folder) == before


def test_a_key_that_others_can_read_does_not_sign(bundle: Signed) -> None:
    bundle.private.chmod(0o640)
    with pytest.raises(BadRequest) as caught:
        sign(bundle.folder, bundle.private)
    assert caught.value.reason == "key_mode"


def test_a_key_that_cannot_sign_is_a_bad_request(bundle: Signed, tmp_path: Path) -> None:
    secret = serialization.BestAvailableEncryption(b"secret")
    keys = {
        "rsa": pem_file(tmp_path / "rsa.pem", rsa.generate_private_key(65537, 2048)),
        "locked": pem_file(tmp_path / "locked.pem", ec.generate_private_key(ec.SECP256R1()), secret),
        "curve": pem_file(tmp_path / "k1.pem", ec.generate_private_key(ec.SECP256K1())),
        "public": bundle.private.with_name("key.pub.pem"),
    }
    keys["public"].chmod(0o600)
    for path in keys.values():
        with pytest.raises(BadRequest) as caught:
            sign(bundle.folder, path)
        assert caught.value.reason == "key_kind"
    with pytest.raises(BadRequest) as caught:
        sign(bundle.folder, tmp_path / "none.pem")
    assert caught.value.reason == "key_unreadable"


def test_signing_no_folder_is_a_bad_request(bundle: Signed, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        sign(tmp_path / "none", bundle.private)
    assert caught.value.reason == "bundle_missing"
