"""The key-slot header: one file beside the encrypted database, which says how its key can be had and holds nothing secret.

    vault/              0700
    ├── header          this: JSON in one form, at most 16 KiB
    └── vault-ID        the database; ID is the volume's, in the header and in the database's first 16 bytes

Rules, in order:

1. The file is at most `LARGEST` bytes of ASCII. It is parsed with exact types, known keys, no key twice and bounded numbers,
   written again, and compared byte for byte: there is one form of every header. Nothing of it is trusted before rule 3.
2. At most 8 slots, each with its number from 0 to 7, in that order.
3. The MAC (HMAC-SHA-256 under a key derived from the volume key) is over everything else. So a header is checked once a slot has
   opened: then every bit of it is as it was written, also those of the other slots.
4. A header is replaced whole or not at all: a temporary file, fsync, rename, fsync of the folder. Then the old one's bytes, which
   may hold a slot that was removed, are overwritten through a descriptor that was kept: on the same blocks where the file system
   writes in place, on flash as far as the drive does.

The generation counts the headers of one volume; `vault/locked.py` says how it is compared with the database's.
"""

from __future__ import annotations

import hmac
import json
import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from appliance.errors import VaultError
from appliance.vault.keys import (
    KINDS,
    SALT_BYTES,
    VOLUME_BYTES,
    WRAPPED_BYTES,
    Argon2,
    Hkdf,
    Kdf,
    Pbkdf2,
    Slot,
    VolumeKey,
)
from appliance.vault.pages import check_folder, told
from appliance.vault.state import GREATEST, Folder, write_all

HEADER: Final = "header"
LARGEST: Final = 16_384         # bytes
MOST_SLOTS: Final = 8
MOST_TRIES: Final = 1000
_FORMAT: Final = "darkroom vault header 1"
_MAC_BYTES: Final = 32

Item = TypeVar("Item")


@dataclass(frozen=True)
class Policy:
    """What may be used and what happens to somebody who guesses.

    `approved_only`: new passphrase slots use PBKDF2 instead of Argon2id (the FIPS policy: approved algorithms, and no promise
    of a validated module). `destroy_after`: so many failed unlocks in a row destroy every slot; None for never.
    """

    approved_only: bool = False
    destroy_after: int | None = None


@dataclass(frozen=True)
class Header:
    """One state of the header."""

    volume: bytes                   # 16 bytes
    generation: int
    policy: Policy
    slots: tuple[Slot, ...]
    mac: bytes = field(default=b"", repr=False)

    def sealed(self, key: VolumeKey) -> Header:
        """Return this header with its MAC."""
        return Header(self.volume, self.generation, self.policy, self.slots, self._mac(key))

    def is_sealed_by(self, key: VolumeKey) -> bool:
        """Say whether every bit is as the key's holder wrote it."""
        return hmac.compare_digest(self.mac, self._mac(key))

    def to_bytes(self) -> bytes:
        """Return the file's bytes."""
        return _form({**self._body(), "mac": self.mac.hex()})

    @classmethod
    def parse(cls, untrusted: bytes) -> Header:
        """Return the header in these bytes, of which nothing is proven yet. Raises `VaultError`."""
        if len(untrusted) > LARGEST:
            _refuse(f"larger than {LARGEST} bytes")
        try:
            read = json.loads(untrusted.decode("ascii"), object_pairs_hook=_once, parse_float=_no_float, parse_constant=_no_float)
        except (ValueError, RecursionError):        # JSONDecodeError and UnicodeDecodeError are ValueErrors
            _refuse("not JSON, or cut short")
        body = _object(read, {"format", "volume", "generation", "policy", "slots", "mac"})
        if body["format"] != _FORMAT:
            _refuse("of another format", hint="it was made by another version of Darkroom, or is no header")
        policy = _object(body["policy"], {"approved_only", "destroy_after"})
        if type(policy["approved_only"]) is not bool:
            _refuse("its policy is malformed")
        after = policy["destroy_after"]
        header = cls(
            _bytes(body["volume"], VOLUME_BYTES), _whole(body["generation"], 1, GREATEST),
            Policy(policy["approved_only"], None if after is None else _whole(after, 1, MOST_TRIES)),
            _slots(body["slots"]), _bytes(body["mac"], _MAC_BYTES),
        )
        if header.to_bytes() != untrusted:
            _refuse("not in the one form that a header has")
        return header

    def _body(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "volume": self.volume.hex(),
            "generation": self.generation,
            "policy": {"approved_only": self.policy.approved_only, "destroy_after": self.policy.destroy_after},
            "slots": [
                {"number": slot.number, "kind": slot.kind, "kdf": _kdf_to_json(slot.kdf), "salt": slot.salt.hex(),
                 "wrapped": slot.wrapped.hex()}
                for slot in self.slots
            ],
        }

    def _mac(self, key: VolumeKey) -> bytes:
        return hmac.digest(key.derived(b"darkroom vault header 1"), _form(self._body()), "sha256")


@dataclass(frozen=True)
class HeaderFile:
    """The header's file in the vault's folder."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> HeaderFile:
        """Return the file's place. Raises `VaultError` for a folder that others may enter."""
        return cls(check_folder(folder))

    def read(self) -> Header | None:
        """Return what is there, of which nothing is proven; None for no file. Raises `VaultError`; nothing was changed."""
        with closing(self._open()) as folder:
            content = folder.read(HEADER)
        return None if content is None else Header.parse(content)

    def write(self, header: Header) -> None:
        """Replace the header, and overwrite the old one's bytes. Raises `VaultError`; then the old one is still there."""
        with closing(self._open()) as folder:
            old = folder.open(HEADER, os.O_WRONLY)
            try:
                folder.write(HEADER, header.to_bytes())
                if old is not None:
                    _overwrite(old)
            finally:
                if old is not None:
                    os.close(old)

    def destroy(self) -> None:
        """Overwrite the header and take it away: without a saved one nobody opens the vault again. Raises `VaultError`."""
        with closing(self._open()) as folder:
            folder.destroy(HEADER)

    def _open(self) -> Folder:
        with told("the vault's folder"):
            return Folder("vault", os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))


def _overwrite(descriptor: int) -> None:
    with told(HEADER):
        write_all(descriptor, bytes(os.fstat(descriptor).st_size))
        os.fsync(descriptor)


def _form(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, ensure_ascii=True) + "\n").encode("ascii")


def _slots(untrusted: object) -> tuple[Slot, ...]:
    if type(untrusted) is not list or len(untrusted) > MOST_SLOTS:
        _refuse(f"not a list of at most {MOST_SLOTS} slots")
    found = []
    for one in untrusted:
        slot = _object(one, {"number", "kind", "kdf", "salt", "wrapped"})
        kind = next((kind for kind in KINDS if kind == slot["kind"]), None) or _refuse("a slot of an unknown kind")
        kdf = _kdf(slot["kdf"])
        if isinstance(kdf, Hkdf) == (kind == "passphrase"):
            _refuse("a slot whose derivation does not fit its kind")
        found.append(Slot(
            _whole(slot["number"], 0, MOST_SLOTS - 1), kind, kdf, _bytes(slot["salt"], SALT_BYTES),
            _bytes(slot["wrapped"], WRAPPED_BYTES),
        ))
    if [slot.number for slot in found] != sorted({slot.number for slot in found}):
        _refuse("its slots are not in order")
    return tuple(found)


def _kdf_to_json(kdf: Kdf) -> dict[str, Any]:
    match kdf:
        case Argon2():
            return {"name": "argon2id", "memory": kdf.memory, "passes": kdf.passes, "lanes": kdf.lanes}
        case Pbkdf2():
            return {"name": "pbkdf2-hmac-sha512", "iterations": kdf.iterations}
        case Hkdf():
            return {"name": "hkdf-sha512"}


def _kdf(untrusted: object) -> Kdf:
    match untrusted:
        case {"name": "argon2id", **numbers}:
            given = _object(numbers, {"memory", "passes", "lanes"})
            return Argon2(*(_whole(given[name], 1, GREATEST) for name in ("memory", "passes", "lanes")))
        case {"name": "pbkdf2-hmac-sha512", **numbers}:
            return Pbkdf2(_whole(_object(numbers, {"iterations"})["iterations"], 1, GREATEST))
        case {"name": "hkdf-sha512", **numbers} if not numbers:
            return Hkdf()
    return _refuse("a slot with an unknown derivation")


def _object(untrusted: object, keys: set[str]) -> dict[str, Any]:
    if type(untrusted) is not dict or set(untrusted) != keys:
        _refuse("fields are missing or unknown")
    return untrusted


def _whole(untrusted: object, low: int, high: int) -> int:
    if type(untrusted) is not int or not low <= untrusted <= high:
        _refuse("a number is out of bounds")
    return untrusted


def _bytes(untrusted: object, length: int) -> bytes:
    if type(untrusted) is not str or len(untrusted) != 2 * length or not set(untrusted) <= set("0123456789abcdef"):
        _refuse("a value is not hex of its length")
    return bytes.fromhex(untrusted)


def _once(pairs: list[tuple[str, Item]]) -> dict[str, Item]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _no_float(_: str) -> NoReturn:
    raise ValueError


def _refuse(fact: str, *, hint: str = "put the header back from a copy that was made after the last change") -> NoReturn:
    raise VaultError("header_refused", f"the key-slot header: {fact}", hint=hint)
