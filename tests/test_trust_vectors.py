"""Every bad bundle of tests/vectors/bundles is refused, for its own reason; the good one is not."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.errors import VerificationRefused
from appliance.trust.verify import TrustedKey, verify
from tests.bundles import VECTORS, Signed, resign, signed_bundle, table


@pytest.fixture
def bundle(tmp_path: Path) -> Signed:
    return signed_bundle(tmp_path)


def rows(name: str) -> list[pytest.param]:  # type: ignore[valid-type]
    return [pytest.param(row, id=row["case"]) for row in table(name)]


def refusal(bundle: Signed) -> VerificationRefused:
    with pytest.raises(VerificationRefused) as caught:
        verify(bundle.folder, [bundle.trusted])
    assert caught.value.exit_code == 3
    # Names and values come from a hostile disk: none of their control characters reaches a terminal.
    assert str(caught.value).replace("…", "...").isascii()
    assert str(caught.value).isprintable()
    return caught.value


def test_the_good_vector_is_verified_as_it_lies_in_the_repository() -> None:
    model = verify(VECTORS / "valid" / "bundle", [TrustedKey.load(VECTORS / "valid" / "key.pub.pem")])
    assert model.description.name == "Vector"
    assert model.digest == "94092ab4a0db486d5dd3baff11dd44e2f4835a955d93f58b18f51a63f816f66c"


def test_the_repository_holds_no_private_key_among_the_vectors() -> None:
    held = [path for path in VECTORS.rglob("*") if path.is_file() and b"PRIVATE KEY-----" in path.read_bytes()]
    assert held == []


@pytest.mark.parametrize("row", rows("malformed/envelope.json"))
def test_a_malformed_signature_file_is_refused(row: dict[str, str], bundle: Signed) -> None:
    signature = bundle.folder / "model.sig"
    good = signature.read_text()
    assert row["find"] in good
    signature.write_text(good.replace(row["find"], row["replace"], 1))
    assert refusal(bundle).reason == row["reason"]


@pytest.mark.parametrize("row", rows("malformed/statement.json"))
def test_a_malformed_statement_is_refused_although_it_is_signed(row: dict[str, str], bundle: Signed) -> None:
    resign(bundle, lambda good: good.replace(row["find"], row["replace"], 1))
    assert refusal(bundle).reason == row["reason"]


def swap(path: Path, aside: Path) -> None:
    other = path.parents[1] / "vae_decoder/model.onnx"
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def add(path: Path, _: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def turn_into_a_folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").touch()


def move_and_link(path: Path, aside: Path) -> None:
    path.rename(aside)
    path.symlink_to(aside)


def link_to_nothing(path: Path, _: Path) -> None:
    path.unlink()
    path.symlink_to("/nonexistent")


def turn_into_a_fifo(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def turn_into_a_socket(path: Path, _: Path) -> None:
    path.unlink()
    # By descriptor: a socket's address is at most 108 bytes long, and a test's folder may not fit.
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def turn_into_a_device(path: Path, _: Path) -> None:
    path.unlink()
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device needs root")


DEEDS: dict[str, Callable[[Path, Path], object]] = {
    "remove": lambda path, _: path.unlink(),
    "rename": lambda path, _: path.rename(path.with_name("renamed")),
    "lowercase": lambda path, _: path.rename(path.with_name(path.name.lower())),
    "swap": swap,
    "empty": lambda path, _: path.write_bytes(b""),
    "cut": lambda path, _: path.write_bytes(path.read_bytes()[:-1]),
    "append": lambda path, _: path.write_bytes(path.read_bytes() + b"\0"),
    "add": add,
    "mkdir": lambda path, _: path.mkdir(),
    "folder": turn_into_a_folder,
    "symlink": move_and_link,
    "dangling": link_to_nothing,
    "hardlink": os.link,
    "fifo": turn_into_a_fifo,
    "socket": turn_into_a_socket,
    "device": turn_into_a_device,
    "enormous": lambda path, _: os.truncate(path, 1 << 40),
}


@pytest.mark.parametrize("row", rows("tampered/folder.json"))
def test_a_tampered_folder_is_refused(row: dict[str, str], bundle: Signed, tmp_path: Path) -> None:
    DEEDS[row["do"]](bundle.folder / row["path"], tmp_path / "aside")
    assert refusal(bundle).reason == row["reason"]


def test_a_hint_of_another_key_is_refused_even_where_that_key_is_trusted_too(bundle: Signed, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = signed_bundle(tmp_path / "other").trusted
    signature = bundle.folder / "model.sig"
    signature.write_text(signature.read_text().replace(bundle.trusted.fingerprint, other.fingerprint))
    assert refusal(bundle).reason == "key_untrusted"
    with pytest.raises(VerificationRefused) as caught:
        verify(bundle.folder, [bundle.trusted, other])
    assert caught.value.reason == "signature_invalid"


def test_a_bundle_of_another_key_is_refused_and_both_keys_are_named(bundle: Signed, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = signed_bundle(tmp_path / "other").trusted
    with pytest.raises(VerificationRefused) as caught:
        verify(bundle.folder, [other])
    assert caught.value.reason == "key_untrusted"
    assert other.fingerprint[:16] in str(caught.value)
    assert bundle.trusted.fingerprint[:16] in str(caught.value)


def test_the_good_vector_agrees_with_sha256sum() -> None:
    folder = VECTORS / "valid" / "bundle"
    model = verify(folder, [TrustedKey.load(VECTORS / "valid" / "key.pub.pem")])
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c"], cwd=folder, input=model.listing(), text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count(": OK") == len(model.digests)
    raw = b"".join(bytes.fromhex(line.split()[0]) for line in model.listing().splitlines())
    assert hashlib.sha256(raw).hexdigest() == model.digest
