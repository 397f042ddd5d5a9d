"""Whom a bundle is accepted from: ECDSA public keys on P-256, P-384 or P-521, pinned one by one.

A trusted key is a file with one PEM block, `BEGIN PUBLIC KEY`. Certificates, private keys, RSA and Ed25519 are refused,
each by its name: OMS signs with ECDSA alone, and a certificate would hand the decision to whoever issues certificates.

A key's fingerprint is what a signature's hint must be: SHA-256, in hex, of its PEM SubjectPublicKeyInfo as OpenSSL writes it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.errors import BadRequest, VerificationRefused
from appliance.trust.manifest import SIGNATURE, Envelope, pre_authentication_encoding

LARGEST_KEY_FILE: Final = 16 << 10      # bytes
_WANTED: Final = "an ECDSA public key on P-256, P-384 or P-521"


@dataclass(frozen=True)
class TrustedKey:
    """A public key that signatures are accepted from; two are equal when their fingerprints are."""

    fingerprint: str    # hex
    public_key: ec.EllipticCurvePublicKey = field(compare=False, repr=False)

    @classmethod
    def load(cls, path: Path) -> TrustedKey:
        """Read one public key from a PEM file.

        Raises `BadRequest` when there is no such file, `VerificationRefused` when it holds anything else.
        """
        return cls.parse(read_key_file(path), path.name)

    @classmethod
    def parse(cls, pem: bytes, place: str) -> TrustedKey:
        """Return the key in `pem`; `place` names it in a refusal."""
        if b"PRIVATE KEY" in pem:
            raise _refused(place, "a private key", hint="give the .pub.pem beside it, and take this file off the machine")
        if b"BEGIN CERTIFICATE" in pem or b"BEGIN TRUSTED CERTIFICATE" in pem:
            raise _refused(place, "a certificate", hint="openssl x509 -pubkey -noout -in CERT.pem gives the key alone")
        if pem.count(b"-----BEGIN ") != 1 or b"-----BEGIN PUBLIC KEY-----" not in pem:
            raise _refused(place, "not one PEM public key", hint="darkroom-provision keygen makes a pair")
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            raise _refused(place, "not a readable public key") from None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise _refused(place, f"a key of another kind ({type(key).__name__.removesuffix('PublicKey')})")
        return cls.of(key, place)

    @classmethod
    def of(cls, key: ec.EllipticCurvePublicKey, place: str = "key") -> TrustedKey:
        """Return `key` with its fingerprint, if its curve is one of the three."""
        digest_for(key, place)
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return cls(hashlib.sha256(pem).hexdigest(), key)

    def check(self, envelope: Envelope) -> None:
        """Return if this key made the envelope's signature over its payload; else raise `VerificationRefused`.

        Both s and n - s are accepted, since the public signer writes either: ADR 0002.
        """
        try:
            self.public_key.verify(
                envelope.signature, pre_authentication_encoding(envelope.payload), ec.ECDSA(digest_for(self.public_key))
            )
        except InvalidSignature:
            raise VerificationRefused(
                "signature_invalid", SIGNATURE, "the signature is not that key's over this payload",
                hint="the bundle was altered, or was not signed by whom it says: get it again from its maker",
            ) from None


def digest_for(key: ec.EllipticCurvePublicKey, place: str = "key") -> hashes.HashAlgorithm:
    """Return the hash that OMS signs with on this curve: SHA-256, SHA-384 or SHA-512."""
    if isinstance(key.curve, ec.SECP256R1):
        return hashes.SHA256()
    if isinstance(key.curve, ec.SECP384R1):
        return hashes.SHA384()
    if isinstance(key.curve, ec.SECP521R1):
        return hashes.SHA512()
    raise _refused(place, f"a key on another curve ({key.curve.name})")


def read_key_file(path: Path) -> bytes:
    """Read a small file that the operator named; a link to it is the operator's own affair. Raises `BadRequest`."""
    try:
        # Not blocking: a FIFO in place of the key must not hold the start up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise BadRequest("key_unreadable", f"{path.name}: the key cannot be read ({_why(error)})") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadRequest("key_unreadable", f"{path.name}: not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(LARGEST_KEY_FILE + 1)
    finally:
        os.close(descriptor)
    if len(content) > LARGEST_KEY_FILE:
        raise BadRequest("key_unreadable", f"{path.name}: too large for a key (at most {LARGEST_KEY_FILE} bytes)")
    return content


def _why(error: Exception) -> str:
    return error.strerror.lower() if isinstance(error, OSError) and error.strerror else "not a usable path"


def _refused(place: str, found: str, *, hint: str | None = None) -> VerificationRefused:
    return VerificationRefused("key_kind", place, "cannot be trusted", expected=_WANTED, got=found, hint=hint)
