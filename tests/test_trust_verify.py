"""`verify`: what it gives, the order of its steps, whom it trusts, and what happens while it reads."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from appliance.errors import BadRequest, VerificationRefused
from appliance.trust import folder
from appliance.trust.manifest import Envelope, Manifest
from appliance.trust.verify import Limits, TrustedKey, VerifiedModel, verify
from tests.bundles import DESCRIPTION, Signed, described, good_files, private_key, sign_files_as_they_are, signed_bundle, write

ORDER_OF_P384 = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973


@pytest.fixture
def bundle(tmp_path: Path) -> Signed:
    return signed_bundle(tmp_path)


def reason(bundle: Signed, limits: Limits | None = None) -> str:
    with pytest.raises(VerificationRefused) as caught:
        verify(bundle.folder, [bundle.trusted], limits)
    return caught.value.reason


def test_a_verified_model_holds_what_was_signed(bundle: Signed) -> None:
    model = verify(bundle.folder, [bundle.trusted])
    assert model.description == DESCRIPTION
    assert model.key_fingerprint == bundle.trusted.fingerprint
    assert model.licence_text.encode() == good_files()["LICENSE"]
    assert {path: bytes(model.read(path)) for path in model.digests} == good_files()
    assert [t.path for t in model.external["unet/model.onnx"]] == ["unet/weights.bin"]
    assert model.external["vae_decoder/model.onnx"] == ()


def test_the_bytes_are_read_only_and_handed_out_without_a_copy(bundle: Signed) -> None:
    model = verify(bundle.folder, [bundle.trusted])
    view = model.read("unet/weights.bin")
    assert view.readonly
    assert view.obj is model.content("unet/weights.bin")
    with pytest.raises(KeyError):
        model.read("model.sig")


def test_only_verify_makes_a_verified_model(bundle: Signed) -> None:
    model = verify(bundle.folder, [bundle.trusted])
    parts: dict[str, Any] = {
        "manifest": Manifest("m", model.digests), "key": bundle.trusted, "contents": {},
        "description": DESCRIPTION, "licence_text": "", "external": {},
    }
    with pytest.raises(TypeError, match="verify"):
        VerifiedModel(object(), **parts)
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            cast(Callable[[object], object], copier)(model)
    with pytest.raises(AttributeError):
        model.digest = "0"
    with pytest.raises(AttributeError):
        del model.digest
    with pytest.raises(TypeError):
        model.digests["x"] = "y"  # type: ignore[index]
    assert repr(model).startswith("<VerifiedModel 'Vector'")


def test_a_file_swapped_after_verification_changes_nothing(bundle: Signed) -> None:
    model = verify(bundle.folder, [bundle.trusted])
    (bundle.folder / "unet/model.onnx").write_bytes(b"evil")
    assert bytes(model.read("unet/model.onnx")) == good_files()["unet/model.onnx"]


def test_a_file_swapped_between_the_look_and_the_read_is_refused(
    bundle: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = folder.compare

    def swap_then_compare(listed: Any, found: Any) -> None:
        path = bundle.folder / "unet/weights.bin"
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        compare(listed, found)

    monkeypatch.setattr(folder, "compare", swap_then_compare)
    assert reason(bundle) == "file_changed"


@pytest.mark.parametrize("kind", ["fifo", "symlink", "folder"])
def test_what_is_slipped_in_after_the_look_neither_blocks_nor_passes(
    kind: str, bundle: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = folder.compare

    def slip_in(listed: Any, found: Any) -> None:
        path = bundle.folder / "unet/weights.bin"
        path.rename(tmp_path / "aside")
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "symlink":
            path.symlink_to(tmp_path / "aside")
        else:
            path.mkdir()
        compare(listed, found)

    monkeypatch.setattr(folder, "compare", slip_in)
    assert reason(bundle) in ("file_special", "file_unreadable", "file_changed")


def test_a_folder_turned_into_a_link_after_the_look_is_refused(
    bundle: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = folder.compare

    def slip_in(listed: Any, found: Any) -> None:
        (bundle.folder / "unet").rename(tmp_path / "aside")
        (bundle.folder / "unet").symlink_to(tmp_path / "aside")
        compare(listed, found)

    monkeypatch.setattr(folder, "compare", slip_in)
    assert reason(bundle) == "file_unreadable"


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: str, bundle: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle.folder / "unet/weights.bin"
    regular = folder._regular
    readings = []

    def change_after_the_check(name: str, status: os.stat_result) -> None:
        regular(name, status)
        if name == "unet/weights.bin":
            readings.append(name)
            if len(readings) == 2:   # the first is the survey, the second has the file open
                with path.open("r+b") as file:
                    if change == "grow":
                        file.seek(0, os.SEEK_END)
                        file.write(b"more")
                    elif change == "shrink":
                        file.truncate(3)
                    else:
                        file.write(b"evil")

    monkeypatch.setattr(folder, "_regular", change_after_the_check)
    assert reason(bundle) == "file_changed"
    assert len(readings) == 2


def test_the_signature_is_checked_before_any_file_is_read(bundle: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_once = folder.read_once

    def noting(descriptor: int, path: str, seen: folder.Identity) -> bytes:
        read.append(path)
        return read_once(descriptor, path, seen)

    monkeypatch.setattr(folder, "read_once", noting)
    with pytest.raises(VerificationRefused):
        verify(bundle.folder, [TrustedKey.of(ec.generate_private_key(ec.SECP256R1()).public_key())])
    assert read == ["model.sig"]
    read.clear()
    verify(bundle.folder, [bundle.trusted])
    assert sorted(read) == sorted([*good_files(), "model.sig"])   # each exactly once


def test_digests_are_compared_before_the_description_is_parsed(bundle: Signed) -> None:
    (bundle.folder / "model.json").write_bytes(b"{")
    assert reason(bundle) == "digest"
    sign_files_as_they_are(bundle)
    assert reason(bundle) == "model_json"


def test_the_folder_may_be_renamed_and_reached_through_a_link(bundle: Signed, tmp_path: Path) -> None:
    moved = bundle.folder.rename(tmp_path / "any name at all")
    (tmp_path / "current").symlink_to(moved)
    assert verify(tmp_path / "current", [bundle.trusted]).digest == verify(moved, [bundle.trusted]).digest


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(files=6), "bundle_count"),
        (Limits(file_bytes=100), "file_size"),
        (Limits(total_bytes=2000), "bundle_size"),
    ],
)
def test_a_bundle_beyond_the_limits_is_refused(limits: Limits, expected: str, bundle: Signed) -> None:
    assert reason(bundle, limits) == expected


def test_a_folder_with_too_many_names_is_refused(bundle: Signed) -> None:
    for number in range(4200):
        (bundle.folder / f"f{number}").touch()
    assert reason(bundle) == "bundle_count"


@pytest.mark.parametrize("missing", ["model.json", "LICENSE"])
def test_a_signed_bundle_without_a_required_file_is_refused(missing: str, bundle: Signed) -> None:
    (bundle.folder / missing).unlink()
    sign_files_as_they_are(bundle)
    assert reason(bundle) == "required_missing"


def test_a_signed_bundle_without_a_component_is_refused(bundle: Signed) -> None:
    (bundle.folder / "tokenizer/tokenizer.json").unlink()
    (bundle.folder / "tokenizer").rmdir()
    sign_files_as_they_are(bundle)
    assert reason(bundle) == "component_missing"


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff", b"a\x1b[2Jb", b"a\0b", b"a\x1cb", b"x" * ((1 << 20) + 1)])
def test_a_licence_that_cannot_be_shown_is_refused(content: bytes, bundle: Signed) -> None:
    (bundle.folder / "LICENSE").write_bytes(content)
    sign_files_as_they_are(bundle)
    assert reason(bundle) == "licence"


def test_nothing_is_trusted_unless_a_key_is(bundle: Signed) -> None:
    with pytest.raises(VerificationRefused) as caught:
        verify(bundle.folder, [])
    assert caught.value.reason == "no_trusted_key"


def test_a_missing_or_empty_folder_is_a_bad_request(tmp_path: Path, bundle: Signed) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for path, expected in (("none", "bundle_missing"), ("file", "bundle_missing"), ("empty", "bundle_empty")):
        with pytest.raises(BadRequest) as caught:
            verify(tmp_path / path, [bundle.trusted])
        assert caught.value.reason == expected
        assert caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_foreign_mount_inside_the_bundle_is_refused(bundle: Signed) -> None:
    (bundle.folder / "other").mkdir()
    (bundle.folder / "other/file").touch()
    script = (
        'mount -t tmpfs none "$1/other" && : > "$1/other/file" && exec "$2" -c "'
        "import sys, pathlib; from appliance.trust.verify import *; from appliance.errors import *\n"
        "try: verify(pathlib.Path(sys.argv[1]), [TrustedKey.load(pathlib.Path(sys.argv[2]))])\n"
        'except VerificationRefused as refused: print(refused.reason)" "$1" "$3"'
    )
    public = bundle.private.with_name("key.pub.pem")
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(bundle.folder), sys.executable, str(public)],
        capture_output=True, text=True, check=False,
    )
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip("mounting is not permitted here")
    assert run.stdout == "foreign_mount\n", run.stderr


def test_descriptors_are_given_back_however_it_ends(bundle: Signed) -> None:
    def open_now() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before = open_now()
    verify(bundle.folder, [bundle.trusted])
    (bundle.folder / "unet/weights.bin").write_bytes(b"evil")
    assert reason(bundle) == "digest"
    (bundle.folder / "unet/weights.bin").unlink()
    os.mkfifo(bundle.folder / "unet/weights.bin")
    assert reason(bundle) == "file_special"
    assert open_now() == before


def test_both_forms_of_an_ecdsa_signature_are_accepted(bundle: Signed) -> None:
    # ADR 0002: the public signer writes either, and the other form says the same thing about the same bytes.
    signature = bundle.folder / "model.sig"
    envelope = Envelope.parse(signature.read_bytes())
    r, s = decode_dss_signature(envelope.signature)
    other = Envelope(envelope.hint, envelope.payload, encode_dss_signature(r, ORDER_OF_P384 - s))
    signature.write_bytes(other.to_json())
    assert verify(bundle.folder, [bundle.trusted]).description == DESCRIPTION


def pem(key: Any) -> bytes:
    return cast(bytes, key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_public_key_on_a_curve_of_the_format_is_trusted(curve: ec.EllipticCurve, tmp_path: Path) -> None:
    path = tmp_path / "key.pub.pem"
    path.write_bytes(pem(ec.generate_private_key(curve).public_key()))
    assert len(TrustedKey.load(path).fingerprint) == 64


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: pem(rsa.generate_private_key(65537, 2048).public_key()), "RSA"),
        (lambda: pem(ed25519.Ed25519PrivateKey.generate().public_key()), "Ed25519"),
        (lambda: pem(ec.generate_private_key(ec.SECP256K1()).public_key()), "secp256k1"),
        (lambda: b"-----BEGIN EC PRIVATE KEY-----\n", "private key"),
        (lambda: b"-----BEGIN CERTIFICATE-----\n", "certificate"),
        (lambda: pem(ec.generate_private_key(ec.SECP256R1()).public_key()) * 2, "not one PEM"),
        (lambda: b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a readable"),
        (lambda: b"", "not one PEM"),
    ],
)
def test_anything_but_one_ecdsa_public_key_is_not_trusted(make: Callable[[], bytes], word: str, tmp_path: Path) -> None:
    path = tmp_path / "key.pub.pem"
    path.write_bytes(make())
    with pytest.raises(VerificationRefused) as caught:
        TrustedKey.load(path)
    assert caught.value.reason == "key_kind"
    assert word in str(caught.value)


def test_a_private_key_is_never_quoted_when_it_is_given_in_place_of_a_public_one(bundle: Signed) -> None:
    with pytest.raises(VerificationRefused) as caught:
        TrustedKey.load(bundle.private)
    assert private_key(bundle.private).curve.name == "secp384r1"
    body = bundle.private.read_text().splitlines()[1]
    assert body not in str(caught.value) + str(caught.value.hint)


def test_a_key_file_that_cannot_be_read_is_a_bad_request(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"x" * (17 << 10))
    for name in ("none", "fifo", "large", "."):
        with pytest.raises(BadRequest) as caught:
            TrustedKey.load(tmp_path / name)
        assert caught.value.reason == "key_unreadable"


def test_a_signed_description_of_another_family_is_refused(bundle: Signed) -> None:
    write(bundle.folder, {"model.json": described(family="sd9")})
    sign_files_as_they_are(bundle)
    assert reason(bundle) == "model_json"
