"""Keys and signatures: `keygen` makes a pair, `sign` signs a bundle with it; the `cryptography` package and nothing else.

Keys are ECDSA on P-384, whose strength is that of the SHA-384 it signs with; one signature takes milliseconds on any curve.
Signatures are deterministic (RFC 6979): the same files signed with the same key give the same `model.sig`, and no random
number can be bad. ADR 0002 has the alternatives.

What is refused, in order:

1. A key that is not a private ECDSA key on P-256, P-384 or P-521, or that others on this machine can read.
2. A bundle that `appliance.trust.verify` would refuse: the same code looks at the folder and at the content.
3. A private key inside the bundle, which would be shipped with it.

A signature appears whole or not at all; a key file is never overwritten.

    made = keygen(Path("release.pem"))              # and release.pub.pem beside it
    digest = sign(Path("bundle"), made.private)     # writes bundle/model.sig
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.errors import BadRequest, VerificationRefused
from appliance.trust import folder
from appliance.trust.key import TrustedKey, digest_for, read_key_file
from appliance.trust.manifest import SIGNATURE, Envelope, Manifest, pre_authentication_encoding
from appliance.trust.verify import examine

_UNFINISHED: Final = f".{SIGNATURE}.new"     # the leading dot makes `verify` refuse one that a crash left behind
_LARGEST_SUSPECT: Final = 64 << 10           # bytes: a larger file is no key


@dataclass(frozen=True)
class KeyPair:
    """Where a new key lies; `fingerprint` (hex) is the hint in its signatures."""

    private: Path
    public: Path
    fingerprint: str


def public_path(private: Path) -> Path:
    """Return where the public half of `KEY.pem` goes: `KEY.pub.pem` beside it."""
    return private.with_name((private.stem if private.suffix == ".pem" else private.name) + ".pub.pem")


def keygen(out: Path) -> KeyPair:
    """Make a P-384 key: the private half at `out` (PKCS 8 PEM, mode 0600), the public half beside it.

    Raises `BadRequest` if either file exists or cannot be written; then neither was made.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    made: list[Path] = []
    try:
        # The public half first: if the second write fails, what has to be taken back is no secret.
        for path, content, mode in ((public_path(out), public_pem, 0o644), (out, private_pem, 0o600)):
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            made.append(path)
            _write(descriptor, content)
    except (OSError, ValueError) as error:
        for path in made:
            with suppress(OSError):
                path.unlink()
        if isinstance(error, FileExistsError):
            raise BadRequest("key_exists", f"{Path(str(error.filename)).name}: exists, and keys are never overwritten",
                             hint="choose another name, or move the old pair away") from None
        raise BadRequest("key_unwritable", f"{out.name}: cannot be written ({_why(error)})") from None
    return KeyPair(out, public_path(out), TrustedKey.of(key.public_key()).fingerprint)


def sign(bundle: Path, key: Path) -> str:
    """Sign every file in the folder `bundle` with the private key at `key`, and return the bundle's digest (hex).

    `model.sig` is written or replaced at one stroke. Raises `BadRequest` for the key or an unwritable folder,
    `VerificationRefused` for a bundle that no appliance would accept; then the folder is as it was.
    """
    private = _private_key(key)
    public = TrustedKey.of(private.public_key(), key.name)
    with folder.opened(bundle) as descriptor:
        found = folder.survey(descriptor, folder.Limits())
        contents = {
            path: folder.read_once(descriptor, path, identity) for path, identity in found.items() if path != SIGNATURE
        }
        _without_private_keys(contents)
        description, _, _ = examine(contents)
        # The model's own name, not the folder's: renaming the folder changes nothing.
        manifest = Manifest(description.name, {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()})
        payload = manifest.to_payload()
        signature = private.sign(
            pre_authentication_encoding(payload), ec.ECDSA(digest_for(private.public_key()), deterministic_signing=True)
        )
        written = Envelope(public.fingerprint, payload, signature).to_json()
        # What is about to be written goes through the reader's own steps, so that no limit is met first on the appliance.
        read_back = Envelope.parse(written)
        public.check(read_back)
        Manifest.parse(read_back.payload)
        _replace_signature(descriptor, written)
    return manifest.root


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    pem = read_key_file(path)
    if path.stat().st_mode & 0o077:
        raise BadRequest("key_mode", f"{path.name}: others on this machine can read the private key",
                         hint=f"chmod 600 {path.name}, and consider whether it is still a secret")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):   # TypeError: it is encrypted
        raise BadRequest("key_kind", f"{path.name}: not a readable private key in PEM, without passphrase",
                         hint="darkroom-provision keygen makes one") from None
    curves = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, curves):
        raise BadRequest("key_kind", f"{path.name}: not an ECDSA key on P-256, P-384 or P-521, and the format knows no other",
                         hint="darkroom-provision keygen makes one")
    return key


def _without_private_keys(contents: Mapping[str, bytes]) -> None:
    for path, content in contents.items():
        if len(content) <= _LARGEST_SUSPECT and b"PRIVATE KEY-----" in content:
            raise VerificationRefused("private_key", path, "a private key inside the bundle", hint="take it out of the folder")


def _replace_signature(bundle: int, content: bytes) -> None:
    """Put `model.sig` into the folder: a new file under another name, synced, then renamed over the old one."""
    try:
        descriptor = os.open(_UNFINISHED, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=bundle)
        try:
            _write(descriptor, content)
            os.replace(_UNFINISHED, SIGNATURE, src_dir_fd=bundle, dst_dir_fd=bundle)
        except BaseException:
            with suppress(OSError):
                os.unlink(_UNFINISHED, dir_fd=bundle)
            raise
        os.fsync(bundle)
    except OSError as error:
        raise BadRequest("bundle_unwritable", f"{SIGNATURE}: cannot be written ({_why(error)})") from None


def _write(descriptor: int, content: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _why(error: Exception) -> str:
    return error.strerror.lower() if isinstance(error, OSError) and error.strerror else "not a usable path"
