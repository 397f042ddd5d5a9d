"""The chain's key, which only turns forward, and the file that it is kept in.

    A₀ ──next──▶ A₁ ──next──▶ A₂ …        Aₙ: 32 bytes, the key of record n
    │mac         │mac         │mac
    M₀           M₁           M₂          record n's MAC: HMAC-SHA-256(Mₙ, body n)

    next(A) = HKDF-Expand(A, "darkroom audit 1 next")        32 bytes each; RFC 5869, section 2.3: for one block
    mac(A)  = HKDF-Expand(A, "darkroom audit 1 mac")         that is HMAC-SHA-256(A, label ‖ 0x01), RFC 2104
    tip(A)  = HKDF-Expand(A, "darkroom audit 1 tip")         shows in an exported head that the device held A

This is the scheme of Schneier and Kelsey, "Secure Audit Logs to Support Computer Forensics" (ACM TISSEC 2(2), 1999), with the
separate derivations of Bellare and Yee, "Forward-Security in Private-Key Cryptography" (CT-RSA 2003): nobody gets from Aₙ to
Aₙ₋₁, so who takes the machine at n can say what they like from n on, and can change nothing before it.

The file has two slots of a page each; Aₙ lives in slot n mod 2, together with the line of record n - 1. Rules, in order:

1. The next key, with the record's line, is written to the other slot and synced. From here the record counts.
2. The old key is overwritten with zeros in place and synced. From here nobody can make the record again.
3. Only then does the line go to the chain's file; a crash before that is mended from the slot.

A slot carries SHA-256 of itself: a torn one is no slot. Of two good slots the higher counts, and the lower is overwritten at
the next start. In place means the same blocks on a file system that does not copy on write; flash may keep the old ones.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import VaultError
from appliance.evidence.records import LONGEST_LINE
from appliance.vault.state import write_all

KEY_BYTES: Final = 32
SLOT_BYTES: Final = 4096            # one page: on most disks it is written whole
FILE_BYTES: Final = 2 * SLOT_BYTES
_SLOT: Final = struct.Struct(f">16sQ{KEY_BYTES}sH{LONGEST_LINE}s")
_MAGIC: Final = b"darkroom audit 1"


def next_key(key: bytes) -> bytes:
    """Return the key of the next record."""
    return _expand(key, b"next")


def tip(key: bytes) -> str:
    """Return, in hex, what only a holder of `key` or of an earlier one can say."""
    return _expand(key, b"tip").hex()


def mac(key: bytes, body: bytes) -> str:
    """Return the MAC of a record under its own key, in hex."""
    return hmac.digest(_expand(key, b"mac"), body, "sha256").hex()


def _expand(key: bytes, label: bytes) -> bytes:
    return hmac.digest(key, b"darkroom audit 1 " + label + b"\x01", "sha256")


@dataclass(frozen=True)
class Position:
    """Where the chain stands: the number and key of the record to come, and the line of the one before it."""

    sequence: int
    key: bytes = field(repr=False)
    line: bytes = b""       # with its newline; empty before the first record


def pack(position: Position) -> bytes:
    """Return a slot's bytes."""
    held = _SLOT.pack(_MAGIC, position.sequence, position.key, len(position.line), position.line)
    return (held + hashlib.sha256(held).digest()).ljust(SLOT_BYTES, b"\0")


def unpack(untrusted: bytes) -> Position | None:
    """Return what a slot holds; None for a torn or empty one."""
    if len(untrusted) != SLOT_BYTES:
        return None
    held, digest = untrusted[: _SLOT.size], untrusted[_SLOT.size : _SLOT.size + 32]
    if hashlib.sha256(held).digest() != digest or any(untrusted[_SLOT.size + 32 :]):
        return None
    magic, sequence, key, length, line = _SLOT.unpack(held)
    if magic != _MAGIC or length > LONGEST_LINE or any(line[length:]):
        return None
    return Position(sequence, key, line[:length])


def stands_at(content: bytes) -> Position | None:
    """Return the higher of the two positions in a ratchet file; None where neither slot is good."""
    good = [
        position for number in (0, 1)
        if (position := unpack(content[number * SLOT_BYTES : (number + 1) * SLOT_BYTES])) and position.sequence % 2 == number
    ]
    return max(good, key=lambda position: position.sequence, default=None)


def fresh(key: bytes) -> bytes:
    """Return the ratchet file of a chain without records."""
    return pack(Position(0, key)) + bytes(SLOT_BYTES)


class Ratchet:
    """The open file. `turn` is the only way on."""

    def __init__(self, descriptor: int) -> None:
        """Take over the descriptor, find the position, and overwrite the key before it, if a crash left one.

        Raises `VaultError` when neither slot is good.
        """
        self._descriptor = descriptor
        content = os.pread(descriptor, FILE_BYTES + 1, 0)
        position = stands_at(content) if len(content) == FILE_BYTES else None
        if position is None:
            raise VaultError(
                "audit_damaged", "audit/ratchet: damaged",
                hint="keep the folder for your auditor, then move it away; a new chain begins",
            )
        self.position = position
        other = (position.sequence + 1) % 2 * SLOT_BYTES
        if any(content[other : other + SLOT_BYTES]):
            self._put(position.sequence + 1, bytes(SLOT_BYTES))

    def turn(self, line: Callable[[Position], bytes]) -> None:
        """Go to the next key, keeping the line that `line` makes with the present position.

        When it returns the present key is on the disk no longer. An OSError leaves one of the two positions; read it again.
        """
        now = self.position
        then = Position(now.sequence + 1, next_key(now.key), line(now))
        self._put(then.sequence, pack(then))
        self._put(now.sequence, bytes(SLOT_BYTES))
        self.position = then

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)

    def _put(self, sequence: int, slot: bytes) -> None:
        os.lseek(self._descriptor, sequence % 2 * SLOT_BYTES, os.SEEK_SET)
        write_all(self._descriptor, slot)
        os.fdatasync(self._descriptor)      # its size never changes: no more need be synced
