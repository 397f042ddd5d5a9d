"""The signed manifest: an OpenSSF Model Signing (OMS) v1.0 bundle, `model.sig`, read strictly and written in one form.

    model.sig   Sigstore bundle v0.3, JSON      `Envelope`: the hint of a key, one signature, the payload
    └── payload in-toto Statement v1, JSON      `Manifest`: every file's SHA-256, and one digest over them all

This room holds no key and reads no file: it turns bytes into values and values into bytes. Whether a signature is good is
decided in `verify.py`; until then the payload is bytes that nobody parses.

Rules, in order:

1. Of the envelope nothing but the payload is signed, so the envelope has exactly one accepted form, the one that the
   public `model-signing` package writes: what was parsed is written again and compared byte by byte. Every flipped bit is
   then either another form (refused here), another hint (no pinned key), another payload or another signature (not valid).
2. The payload is signed, byte by byte, so its white space and its order of keys are the signer's (the public package's
   order changes from run to run). Its types, its keys and their number are not: unknown, missing and duplicate keys are
   refused, and so is every number, since the format has none.
3. Names are plain: ASCII letters, digits and `._+-`, no part beginning with a dot or a dash. So no path leaves the bundle,
   no two names look alike, and the `sha256sum -c` listing needs no escapes.
4. Resources are sorted by path, part by part, strictly: none is named twice.
5. `ignore_paths` is read and not obeyed: the folder is compared with the resources alone.

>>> Manifest("demo", {"LICENSE": "ab" * 32}).listing()[-10:]
'  LICENSE\\n'
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from appliance.errors import VerificationRefused

SIGNATURE: Final = "model.sig"
LARGEST_SIGNATURE: Final = 4 << 20      # bytes of model.sig: some 10,000 files with long names
MOST_FILES: Final = 4096
LONGEST_PATH: Final = 255               # characters
DEEPEST: Final = 8                      # parts of a path

MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
LEGACY_PREDICATE_TYPE: Final = "https://model_signing/Digests/v0.1"

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_RESIGN = "sign the bundle again with darkroom-provision sign"


@dataclass(frozen=True)
class Envelope:
    """The outer, unsigned layer of `model.sig`: who is said to have signed, the signature (DER) and what was signed."""

    hint: str
    payload: bytes
    signature: bytes

    @classmethod
    def parse(cls, untrusted: bytes) -> Envelope:
        """Return the envelope that `untrusted` is the one accepted form of, or raise `VerificationRefused`."""
        if len(untrusted) > LARGEST_SIGNATURE:
            _refuse("signature_size", "", "too large", expected=f"at most {LARGEST_SIGNATURE} bytes", got=str(len(untrusted)))
        top = _members("signature", "", _strict_json("signature", untrusted), "mediaType verificationMaterial dsseEnvelope")
        _constant("signature_media_type", "mediaType", top["mediaType"], MEDIA_TYPE)
        hint = _key_hint(top["verificationMaterial"])

        fields = "payload payloadType signatures"
        dsse = _members("signature", "dsseEnvelope", top["dsseEnvelope"], fields)
        _constant("signature_payload_type", "dsseEnvelope.payloadType", dsse["payloadType"], PAYLOAD_TYPE)
        signatures = dsse["signatures"]
        if not isinstance(signatures, list) or len(signatures) != 1:
            _refuse("signature_count", "dsseEnvelope.signatures", "not exactly one signature", hint=_RESIGN)
        one = _members("signature", "dsseEnvelope.signatures[0]", signatures[0], "sig keyid")
        _constant("signature_keyid", "dsseEnvelope.signatures[0].keyid", one["keyid"], "")

        envelope = cls(
            hint=hint,
            payload=_base64("dsseEnvelope.payload", dsse["payload"]),
            signature=_der("dsseEnvelope.signatures[0].sig", _base64("dsseEnvelope.signatures[0].sig", one["sig"])),
        )
        if envelope.to_json() != untrusted:
            _refuse(
                "signature_form", "", "not in the one accepted form: order of keys, white space and escapes are fixed",
                hint=_RESIGN,
            )
        return envelope

    def to_json(self) -> bytes:
        """Return the bytes of `model.sig`: compact JSON, ASCII, no newline at the end."""
        document = {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": self.hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(self.payload).decode("ascii"),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(self.signature).decode("ascii"), "keyid": ""}],
            },
        }
        return json.dumps(document, separators=(",", ":")).encode("ascii")


@dataclass(frozen=True)
class Manifest:
    """What a signature speaks of: a name, which is not enforced, and the SHA-256 (hex) of every file by its path."""

    name: str
    digests: Mapping[str, str]

    @classmethod
    def parse(cls, signed: bytes) -> Manifest:
        """Return the manifest that a payload holds; give it only bytes whose signature was checked.

        Raises `VerificationRefused` naming the field.
        """
        document = _strict_json("statement", signed)
        if isinstance(document, dict) and document.get("predicateType") == LEGACY_PREDICATE_TYPE:
            _refuse("predicate_legacy", "predicateType", "the format of model-signing before 1.0", expected=PREDICATE_TYPE,
                    got=LEGACY_PREDICATE_TYPE, hint=_RESIGN)
        top = _members("statement", "payload", document, "_type subject predicateType predicate")
        _constant("statement_type", "_type", top["_type"], STATEMENT_TYPE)
        _constant("predicate_type", "predicateType", top["predicateType"], PREDICATE_TYPE)
        subjects = top["subject"]
        if not isinstance(subjects, list) or len(subjects) != 1:
            _refuse("subject_count", "subject", "not exactly one subject", hint=_RESIGN)
        subject = _members("statement", "subject[0]", subjects[0], "name digest")
        name = subject["name"]
        if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_PATH or not name.isprintable():
            _refuse("subject_name", "subject[0].name", "not a name", expected=f"1 to {LONGEST_PATH} printable characters")
        root = _members("statement", "subject[0].digest", subject["digest"], "sha256")["sha256"]

        predicate = _members("statement", "predicate", top["predicate"], "serialization resources")
        _serialization(predicate["serialization"])
        manifest = cls(name, _resources(predicate["resources"]))
        if root != manifest.root:
            _refuse("root_digest", "subject[0].digest.sha256", "not the digest over the resources' digests",
                    expected=manifest.root, got=_shown(root))
        return manifest

    @property
    def root(self) -> str:
        """The bundle's digest (hex): SHA-256 over the files' raw digests, one after another, in order of their paths."""
        return hashlib.sha256(b"".join(bytes.fromhex(self.digests[path]) for path in in_order(self.digests))).hexdigest()

    def to_payload(self) -> bytes:
        """Return the in-toto statement to be signed: the same bytes for the same files and name."""
        document = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": self.name, "digest": {"sha256": self.root}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "serialization": {
                    "method": "files", "hash_type": "sha256", "allow_symlinks": False,
                    "ignore_paths": [SIGNATURE],   # other programs need to be told; here it is the only exempt file anyway
                },
                "resources": [
                    {"name": path, "algorithm": "sha256", "digest": self.digests[path]} for path in in_order(self.digests)
                ],
            },
        }
        return json.dumps(document, indent=2).encode("ascii")

    def listing(self) -> str:
        """Return the digests as `sha256sum -c` reads them from inside the bundle: hex, two spaces, path, newline."""
        return "".join(f"{self.digests[path]}  {path}\n" for path in in_order(self.digests))


def pre_authentication_encoding(payload: bytes) -> bytes:
    """Return what is signed in place of the payload (DSSE v1.0 protocol, PAE): its type and length are bound to it."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode("ascii"), len(payload), payload)


def in_order(paths: Mapping[str, object]) -> list[str]:
    """Return the paths as OMS sorts them: part by part, so that `a/b` comes before `a.txt`."""
    return sorted(paths, key=lambda path: path.split("/"))


def plain_path(path: str) -> bool:
    """Tell whether `path` is one that a bundle may have (rule 3)."""
    parts = path.split("/")
    return len(path) <= LONGEST_PATH and len(parts) <= DEEPEST and all(_PART.fullmatch(part) for part in parts)


def _refuse(
    reason: str, field: str, fact: str, *, expected: str | None = None, got: str | None = None, hint: str | None = None
) -> NoReturn:
    raise VerificationRefused(reason, f"{SIGNATURE} {field}".rstrip(), fact, expected=expected, got=got, hint=hint)


def _shown(value: object) -> str:
    """Return an untrusted value fit for a message: ASCII, no control characters, short."""
    return ascii(value)[:80] if isinstance(value, str) else type(value).__name__


def _strict_json(layer: str, untrusted: bytes) -> object:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) != len(pairs):
            names = [name for name, _ in pairs]
            _refuse(f"{layer}_duplicate", _shown(next(n for n in names if names.count(n) > 1)), "duplicate key")
        return members

    def no_numbers(_: str) -> NoReturn:
        _refuse(f"{layer}_field", "", "holds a number, and the format has none")

    try:
        # Decoded here, because json.loads of bytes would accept UTF-16 and UTF-32 as well.
        parsed: object = json.loads(
            untrusted.decode("utf-8"), object_pairs_hook=no_duplicates,
            parse_int=no_numbers, parse_float=no_numbers, parse_constant=no_numbers,
        )
    except (ValueError, RecursionError) as error:   # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _refuse(f"{layer}_json", "", f"not valid JSON ({type(error).__name__})", hint=_RESIGN)
    return parsed


def _members(layer: str, place: str, value: object, names: str) -> dict[str, object]:
    """Return `value` if it is an object with exactly the keys in `names`."""
    if not isinstance(value, dict):
        _refuse(f"{layer}_field", place, "not an object", got=_shown(value))
    wanted = set(names.split())
    for missing in sorted(wanted - set(value)):
        _refuse(f"{layer}_field", f"{place}.{missing}".lstrip("."), "missing")
    for unknown in sorted(set(value) - wanted):
        _refuse(f"{layer}_field", place, "unknown key", got=_shown(unknown))
    return value


def _constant(reason: str, field: str, value: object, expected: str) -> None:
    if value != expected or not isinstance(value, str):
        _refuse(reason, field, "not the expected value", expected=repr(expected), got=_shown(value))


def _key_hint(material: object) -> str:
    # A certificate is valid for whoever some authority says it is; what is trusted here is a list of keys.
    if isinstance(material, dict) and {"certificate", "x509CertificateChain"} & set(material):
        _refuse("signature_certificate", "verificationMaterial", "signed with a certificate",
                expected="a pinned public key", hint="sign it with a key: darkroom-provision keygen, then sign")
    top = _members("signature", "verificationMaterial", material, "publicKey tlogEntries")
    if top["tlogEntries"] != []:
        _refuse("signature_tlog", "verificationMaterial.tlogEntries", "not an empty list", hint=_RESIGN)
    hint = _members("signature", "verificationMaterial.publicKey", top["publicKey"], "hint")["hint"]
    if not isinstance(hint, str) or not _HEX_DIGEST.fullmatch(hint):
        _refuse("signature_hint", "verificationMaterial.publicKey.hint", "not a SHA-256 in lowercase hex", got=_shown(hint))
    return hint


def _base64(place: str, value: object) -> bytes:
    """Decode base64 that is the encoding of what it decodes to; spare bits and odd padding are refused (RFC 4648, 3.5)."""
    if isinstance(value, str):
        try:
            decoded = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            decoded = b""
        if decoded and base64.b64encode(decoded).decode("ascii") == value:
            return decoded
    _refuse("signature_base64", place, "not canonical base64", hint=_RESIGN)


def _der(place: str, signature: bytes) -> bytes:
    """Return `signature` if it is the minimal DER encoding of two positive integers (RFC 3279, 2.2.3)."""
    try:
        r, s = decode_dss_signature(signature)
        minimal = r > 0 and s > 0 and encode_dss_signature(r, s) == signature
    except ValueError:
        minimal = False
    if not minimal:
        _refuse("signature_der", place, "not a minimal DER encoding of an ECDSA signature", hint=_RESIGN)
    return signature


def _serialization(value: object) -> None:
    place = "predicate.serialization"
    names = "method hash_type allow_symlinks"
    optional = " ignore_paths" if isinstance(value, dict) and "ignore_paths" in value else ""
    top = _members("statement", place, value, names + optional)
    _constant("serialization", f"{place}.method", top["method"], "files")
    _constant("serialization", f"{place}.hash_type", top["hash_type"], "sha256")
    if top["allow_symlinks"] is not False:
        _refuse("serialization", f"{place}.allow_symlinks", "not false", got=_shown(top["allow_symlinks"]))
    ignored = top.get("ignore_paths", [])
    if not isinstance(ignored, list) or len(ignored) > MOST_FILES or not all(isinstance(path, str) for path in ignored):
        _refuse("serialization", f"{place}.ignore_paths", "not a list of texts", expected=f"at most {MOST_FILES}")


def _resources(value: object) -> dict[str, str]:
    place = "predicate.resources"
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_FILES:
        _refuse("resource_count", place, "not a list of files", expected=f"1 to {MOST_FILES} entries")
    digests: dict[str, str] = {}
    before: list[str] = []
    for index, entry in enumerate(value):
        resource = _members("statement", f"{place}[{index}]", entry, "name algorithm digest")
        name, digest = resource["name"], resource["digest"]
        if not isinstance(name, str) or not plain_path(name):
            _refuse("resource_name", f"{place}[{index}].name", "not a plain path inside the bundle", got=_shown(name),
                    hint="use ASCII letters, digits and . _ + - in file names, none beginning with a dot or a dash")
        if name == SIGNATURE:
            _refuse("resource_name", f"{place}[{index}].name", "a signature cannot list itself", got=SIGNATURE)
        _constant("resource_algorithm", f"{place}[{index}].algorithm", resource["algorithm"], "sha256")
        if not isinstance(digest, str) or not _HEX_DIGEST.fullmatch(digest):
            _refuse("resource_digest", f"{place}[{index}].digest", "not a SHA-256 in lowercase hex", got=_shown(digest))
        if before >= name.split("/"):
            _refuse("resource_order", f"{place}[{index}].name", "not after the one before it, part by part", got=_shown(name))
        before = name.split("/")
        digests[name] = digest
    return digests
