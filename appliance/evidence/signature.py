"""Evidence as bytes with a detached signature: what `openssl dgst -sha256 -verify` checks alone.

ECDSA on P-256 with SHA-256 (FIPS 186-5), DER. Nonces are deterministic (RFC 6979), so that a step which is repeated after a
crash makes the same bytes. Both s and n - s are accepted, as in ADR 0002: a signature is nobody's identity.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.errors import VerificationRefused
from appliance.trust.key import TrustedKey

LARGEST_SIGNATURE = 72      # bytes: DER of two integers of 256 bits


@dataclass(frozen=True)
class Signed:
    """Canonical bytes and the signature over them, DER."""

    content: bytes
    signature: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the content, in hex."""
        return hashlib.sha256(self.content).hexdigest()


def sign(content: bytes, key: ec.EllipticCurvePrivateKey) -> Signed:
    """Return `content` with the device's signature."""
    return Signed(content, key.sign(content, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))


def check(signed: Signed, device: TrustedKey, place: str) -> None:
    """Return if the device's key made the signature. Raises `VerificationRefused`."""
    key = device.public_key
    if not isinstance(key.curve, ec.SECP256R1):
        raise VerificationRefused("key_kind", place, "not checked with a device's key", expected="P-256", got=key.curve.name)
    try:
        if len(signed.signature) > LARGEST_SIGNATURE:
            raise InvalidSignature
        key.verify(signed.signature, signed.content, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise VerificationRefused(
            "signature_invalid", place, "the signature is not this device's over these bytes",
            hint="compare the device's key with the one that you were given when it was set up",
        ) from None


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public key as OpenSSL writes it."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: ec.EllipticCurvePrivateKey) -> str:
    """Return SHA-256 of the public key's PEM, in hex: `sha256sum device.pub.pem`."""
    return hashlib.sha256(public_pem(key)).hexdigest()
