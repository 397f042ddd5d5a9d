"""The volume key, and the key slots that wrap it.

The volume key is 256 random bits and is never typed, printed or stored. What a person has, a *secret*, opens a slot: from the
secret a key-encryption key is derived, and with it the volume key was wrapped (AES key wrap, RFC 3394, which is NIST SP 800-38F's
KW: 256-bit key, 64-bit check value). Three kinds:

    passphrase      Argon2id (RFC 9106), or PBKDF2-HMAC-SHA-512 (SP 800-132) where only approved algorithms are allowed
    recovery key    200 random bits, shown once, in 8 groups of 6 characters of which the last is a check; HKDF (RFC 5869)
    key file        64 random bytes on a medium that can be taken away; HKDF

Rules:

1. Parameters of a derivation come out of a file that anybody may have written: they are bounded before they are used.
2. Nothing here can be printed by accident: `repr` shows the kind alone, and none of it can be pickled.
3. A secret that does not open a slot says so and nothing more: a wrong one and a damaged slot look the same.

What cannot be wiped: the volume key lies in a bytearray that `wipe` overwrites, but it goes through immutable bytes while it is
wrapped, unwrapped or derived from, and so do the secrets; Python frees those without overwriting them. They end with the
process: that is why only processes that a close ends hold keys (docs/adr/0007-vault.md).

>>> RecoveryKey.parse(RecoveryKey(bytes(25)).printed()) == RecoveryKey(bytes(25))
True
"""

from __future__ import annotations

import contextlib
import secrets
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn, get_args

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from appliance.errors import BadRequest, VaultError

KEY_BYTES: Final = 32
VOLUME_BYTES: Final = 16        # the volume's id, which is also SQLCipher's salt
SALT_BYTES: Final = 32          # of a slot
WRAPPED_BYTES: Final = KEY_BYTES + 8
KEY_FILE_BYTES: Final = 64
SHORTEST_PASSPHRASE: Final = 12     # characters
LONGEST_PASSPHRASE: Final = 1024

Kind = Literal["passphrase", "recovery", "keyfile"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_GROUPS, _GROUP = 8, 5          # of a recovery key: groups, and characters in one before its check
_LETTERS: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"       # Crockford's base 32: no I, L, O, U
_MEANT: Final = str.maketrans("ILOU", "110V")              # what somebody reads off paper
_HEX: Final = b"0123456789abcdef"


class _Unprintable:
    """Nothing of it in repr, and no pickle."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not pickled")


class VolumeKey(_Unprintable):
    """The 256-bit key of one database, and the 128-bit id of the volume, which is no secret."""

    def __init__(self, key: bytes, volume: bytes) -> None:
        if len(key) != KEY_BYTES or len(volume) != VOLUME_BYTES:
            raise ValueError("a volume key is 32 bytes, and a volume's id 16")
        self._key = bytearray(key)
        self.volume = volume

    @classmethod
    def fresh(cls) -> VolumeKey:
        """Draw a new key for a new volume from the kernel's random numbers."""
        return cls(secrets.token_bytes(KEY_BYTES), secrets.token_bytes(VOLUME_BYTES))

    def __repr__(self) -> str:
        return "<volume key>"

    @contextlib.contextmanager
    def spelt(self) -> Iterator[bytearray]:
        """Give the key as SQLCipher reads a raw one, x'KEY SALT' in hex, for as long as the block lasts.

        It is spelt digit by digit into a bytearray, so that no immutable copy is made on the way, and overwritten at the end.
        """
        text = bytearray(b"x'")
        try:
            for byte in (*self._key, *self.volume):
                text.append(_HEX[byte >> 4])
                text.append(_HEX[byte & 15])
            text += b"'"
            yield text
        finally:
            _wipe(text)

    def derived(self, purpose: bytes) -> bytes:
        """Return a 256-bit key for another purpose: HKDF-SHA-512 (RFC 5869), with the volume's id as salt."""
        return HKDF(hashes.SHA512(), KEY_BYTES, self.volume, purpose).derive(bytes(self._key))

    def wrapped(self, under: bytes) -> bytes:
        """Return the key wrapped under a key-encryption key: 40 bytes (RFC 3394, 2.2.1)."""
        return aes_key_wrap(under, bytes(self._key))

    def copy(self) -> VolumeKey:
        """Return another key of the same value: each owner wipes its own."""
        return VolumeKey(bytes(self._key), self.volume)

    def wipe(self) -> None:
        """Overwrite the key. It is of no use afterwards."""
        _wipe(self._key)


@dataclass(frozen=True)
class Passphrase(_Unprintable):
    """What somebody remembers, as UTF-8 of its composed form (NFC): one keyboard's é is another's e and accent."""

    text: str = field(repr=False)
    kind: Kind = field(default="passphrase", init=False)

    @property
    def content(self) -> bytes:
        """Return what the key is derived from. Raises `BadRequest` for one that is no text, or too long to be read."""
        try:
            if len(self.text) > LONGEST_PASSPHRASE:
                raise BadRequest("passphrase_long", f"a passphrase has at most {LONGEST_PASSPHRASE} characters")
            return unicodedata.normalize("NFC", self.text).encode("utf-8")
        except UnicodeEncodeError:
            raise BadRequest("passphrase_characters", "the passphrase is not valid UTF-8") from None

    def check_new(self) -> None:
        """Refuse a passphrase that no new slot should have. Raises `BadRequest`."""
        if len(self.text.strip()) < SHORTEST_PASSPHRASE:
            raise BadRequest(
                "passphrase_short", f"the passphrase has fewer than {SHORTEST_PASSPHRASE} characters",
                hint="several words are easy to remember",
            )


@dataclass(frozen=True)
class RecoveryKey(_Unprintable):
    """200 random bits on paper."""

    content: bytes = field(repr=False)
    kind: Kind = field(default="recovery", init=False)

    @classmethod
    def fresh(cls) -> RecoveryKey:
        """Draw a new one."""
        return cls(secrets.token_bytes(_GROUPS * _GROUP * 5 // 8))

    def printed(self) -> str:
        """Return it as it is written down: 8 groups of 5 characters and a check, with dashes between."""
        number = int.from_bytes(self.content, "big")
        values = [number >> 5 * place & 31 for place in reversed(range(_GROUPS * _GROUP))]
        groups = [values[start:start + _GROUP] for start in range(0, len(values), _GROUP)]
        return "-".join(
            "".join(_LETTERS[value] for value in (*group, _check(index, group))) for index, group in enumerate(groups)
        )

    @classmethod
    def parse(cls, typed: str) -> RecoveryKey:
        """Return what was typed; case, spaces and dashes don't matter. Raises `BadRequest`, with the group that is wrong."""
        letters = typed.upper().translate(_MEANT).translate(dict.fromkeys(map(ord, "- \t\r\n")))
        if len(letters) != _GROUPS * (_GROUP + 1) or not set(letters) <= set(_LETTERS):
            raise BadRequest("recovery_form", f"a recovery key has {_GROUPS} groups of {_GROUP + 1} letters and digits")
        number = 0
        for index in range(_GROUPS):
            *group, check = (_LETTERS.index(letter) for letter in letters[index * (_GROUP + 1):(index + 1) * (_GROUP + 1)])
            if check != _check(index, group):
                raise BadRequest("recovery_check", f"group {index + 1} of the recovery key is mistyped", hint="type it anew")
            for value in group:
                number = number << 5 | value
        return cls(number.to_bytes(_GROUPS * _GROUP * 5 // 8, "big"))


@dataclass(frozen=True)
class KeyFile(_Unprintable):
    """64 random bytes: the whole content of a file on a medium."""

    content: bytes = field(repr=False)
    kind: Kind = field(default="keyfile", init=False)

    def __post_init__(self) -> None:
        if len(self.content) != KEY_FILE_BYTES:
            raise BadRequest("keyfile_form", f"a key file is {KEY_FILE_BYTES} bytes", hint="name the file that Darkroom made")

    @classmethod
    def fresh(cls) -> KeyFile:
        """Draw the content of a new one."""
        return cls(secrets.token_bytes(KEY_FILE_BYTES))


Secret = Passphrase | RecoveryKey | KeyFile


@dataclass(frozen=True)
class Argon2:
    """Argon2id. The default is RFC 9106's second choice: 64 MiB, three passes, four lanes."""

    memory: int = 65_536        # KiB
    passes: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        # From OWASP's smallest to what a small machine still has, and no more than 8 GiB passed over in all.
        within = 19_456 <= self.memory <= 1_048_576 and 1 <= self.passes <= 64 and 1 <= self.lanes <= 16
        if not within or self.memory * self.passes > 8 << 20:
            raise _unbounded()

    def derive(self, secret: bytes, salt: bytes) -> bytes:
        """Return the key-encryption key, 256 bits."""
        return Argon2id(
            salt=salt, length=KEY_BYTES, iterations=self.passes, lanes=self.lanes, memory_cost=self.memory
        ).derive(secret)


@dataclass(frozen=True)
class Pbkdf2:
    """PBKDF2-HMAC-SHA-512, for where only approved algorithms are allowed (NIST SP 800-132)."""

    iterations: int = 600_000

    def __post_init__(self) -> None:
        if not 200_000 <= self.iterations <= 20_000_000:
            raise _unbounded()

    def derive(self, secret: bytes, salt: bytes) -> bytes:
        """Return the key-encryption key, 256 bits."""
        return PBKDF2HMAC(hashes.SHA512(), KEY_BYTES, salt, self.iterations).derive(secret)


@dataclass(frozen=True)
class Hkdf:
    """HKDF-SHA-512, for secrets that nobody can guess."""

    def derive(self, secret: bytes, salt: bytes) -> bytes:
        """Return the key-encryption key, 256 bits."""
        return HKDF(hashes.SHA512(), KEY_BYTES, salt, b"darkroom key slot 1").derive(secret)


Kdf = Argon2 | Pbkdf2 | Hkdf


@dataclass(frozen=True)
class Slot:
    """One wrapped copy of the volume key; nothing in it is secret."""

    number: int
    kind: Kind
    kdf: Kdf
    salt: bytes = field(repr=False)
    wrapped: bytes = field(repr=False)

    @classmethod
    def closed(cls, number: int, secret: Secret, key: VolumeKey, *, approved_only: bool = False) -> Slot:
        """Return a new slot that this secret opens. Raises `BadRequest` for a passphrase that is too weak."""
        kdf: Kdf = Hkdf()
        if isinstance(secret, Passphrase):
            secret.check_new()
            kdf = Pbkdf2() if approved_only else Argon2()
        salt = secrets.token_bytes(SALT_BYTES)
        return cls(number, secret.kind, kdf, salt, key.wrapped(kdf.derive(secret.content, salt)))

    def opened(self, secret: Secret, volume: bytes) -> VolumeKey | None:
        """Return the volume key, None if this secret does not open the slot."""
        try:
            return VolumeKey(aes_key_unwrap(self.kdf.derive(secret.content, self.salt), self.wrapped), volume)
        except InvalidUnwrap:
            return None


def _check(index: int, group: list[int]) -> int:
    """Return a group's check: a polynomial over GF(32), so that one wrong character, two swapped, or two swapped groups show.

    The field is GF(2)[x]/(x⁵ + x² + 1); Horner's rule at x, which is a generator, from the group's index on.
    """
    value = index
    for digit in group:
        value <<= 1
        value ^= digit ^ (0b100101 if value & 32 else 0)
    return value


def _unbounded() -> VaultError:
    return VaultError(
        "header_refused", "the key-slot header: a slot's parameters are out of bounds", hint="put the header back from a copy"
    )


def _wipe(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
