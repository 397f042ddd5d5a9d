"""One flipped bit is refused: every bit of `model.sig`, and bits at several places of every file."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.errors import VerificationRefused
from appliance.trust.key import TrustedKey
from appliance.trust.manifest import Envelope, Manifest
from appliance.trust.verify import verify
from tests.bundles import VECTORS, Signed, signed_bundle

SMALL = {"LICENSE": "ab" * 32, "model.json": "cd" * 32}


def accepts(signature: bytes, key: TrustedKey) -> bool:
    """Take the steps of `verify` that concern model.sig, 3 to 6, in its order."""
    try:
        envelope = Envelope.parse(signature)
        if envelope.hint != key.fingerprint:
            return False
        key.check(envelope)
        Manifest.parse(envelope.payload)
    except VerificationRefused:
        return False
    return True


def test_every_single_flipped_bit_of_a_signature_is_refused() -> None:
    good = (VECTORS / "valid" / "bundle" / "model.sig").read_bytes()
    key = TrustedKey.load(VECTORS / "valid" / "key.pub.pem")
    assert accepts(good, key), "the control: unflipped, it is accepted"
    accepted = []
    for bit in range(len(good) * 8):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        if accepts(bytes(flipped), key):
            accepted.append(bit)
    assert accepted == []


def test_a_flipped_bit_of_the_signature_is_refused_by_verify_itself(tmp_path: Path) -> None:
    bundle = signed_bundle(tmp_path)
    signature = bundle.folder / "model.sig"
    good = signature.read_bytes()
    for position in range(0, len(good), 37):
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        signature.write_bytes(flipped)
        with pytest.raises(VerificationRefused):
            verify(bundle.folder, [bundle.trusted])
    signature.write_bytes(good)
    verify(bundle.folder, [bundle.trusted])


def places(size: int) -> set[int]:
    return {0, size // 3, size // 2, size - 1}


def test_a_flipped_bit_in_any_file_is_refused_and_the_file_is_named(tmp_path: Path) -> None:
    bundle: Signed = signed_bundle(tmp_path)
    for path in sorted(p for p in bundle.folder.rglob("*") if p.is_file() and p.name != "model.sig"):
        good = path.read_bytes()
        for position in places(len(good)):
            for bit in (0, 7):
                flipped = bytearray(good)
                flipped[position] ^= 1 << bit
                path.write_bytes(flipped)
                with pytest.raises(VerificationRefused) as caught:
                    verify(bundle.folder, [bundle.trusted])
                assert caught.value.reason == "digest"
                assert caught.value.place == str(path.relative_to(bundle.folder))
        path.write_bytes(good)
    verify(bundle.folder, [bundle.trusted])
