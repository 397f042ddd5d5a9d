"""Read an SQLCipher 4 database and its WAL without SQLCipher: every page, those on the freelist too, by the published format.

A page of the file (zetetic.net/sqlcipher/design, and the comments of src/sqlcipher.c):

    ciphertext | IV, 16 bytes | HMAC | padding to a multiple of the cipher's block

AES-256-CBC without padding; the HMAC is over ciphertext, IV and the page's number as four bytes, little-endian. Its key is
PBKDF2-HMAC-SHA-512 (two rounds) of the encryption key with the salt, every byte of it XORed with 0x3a. Page 1 begins with the salt in the
clear, where SQLite's magic would be. A frame of the WAL is 24 bytes of header and one page (sqlite.org/fileformat2.html#walformat).
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

_SIZES = {"sha512": 64, "sha256": 32}


class NotAuthentic(Exception):
    """A page's HMAC is not right."""


@dataclass(frozen=True)
class Page:
    """One decrypted page: where it was found, its number, and its bytes without IV and HMAC."""

    place: str
    number: int
    content: bytes


@dataclass(frozen=True)
class Format:
    """What a reader has to know beforehand: key, page size in bytes, and the HMAC's hash."""

    key: bytes
    page_size: int
    digest: str = "sha512"

    def pages(self, database: Path) -> list[Page]:
        """Return every page of the file and every frame of its WAL, decrypted. Raises `NotAuthentic`."""
        whole = database.read_bytes()
        assert len(whole) % self.page_size == 0, "the file ends inside a page"
        salt = whole[:16]
        found = [
            self._decrypt(salt, "file", at // self.page_size + 1, whole[at:at + self.page_size])
            for at in range(0, len(whole), self.page_size)
        ]
        wal = database.with_name(database.name + "-wal")
        return found + [self._decrypt(salt, "wal", number, data) for number, data in self._frames(wal)]

    def freelist(self, pages: list[Page]) -> list[int]:
        """Return the numbers of the pages on the freelist of the file (fileformat2.html#the_freelist)."""
        of_file = {page.number: page.content for page in pages if page.place == "file"}
        trunk, numbers = struct.unpack_from(">I", of_file[1], 32)[0], []
        while trunk:
            numbers.append(trunk)
            following, count = struct.unpack_from(">II", of_file[trunk])
            numbers += struct.unpack_from(f">{count}I", of_file[trunk], 8)
            trunk = following
        return numbers

    def _frames(self, wal: Path) -> Iterator[tuple[int, bytes]]:
        """Yield page number and page of every whole frame, whether it still counts or not."""
        data = wal.read_bytes() if wal.exists() else b""
        for at in range(32, len(data) - 24 - self.page_size + 1, 24 + self.page_size):
            yield struct.unpack_from(">I", data, at)[0], data[at + 24:at + 24 + self.page_size]

    def _decrypt(self, salt: bytes, place: str, number: int, page: bytes) -> Page:
        reserve = -(-(16 + _SIZES[self.digest]) // 16) * 16
        start, end = 16 if number == 1 else 0, self.page_size - reserve
        iv, tag = page[end:end + 16], page[end + 16:end + 16 + _SIZES[self.digest]]
        hmac_key = PBKDF2HMAC(hashes.SHA512(), 32, bytes(byte ^ 0x3A for byte in salt), 2).derive(self.key)
        made = hmac.digest(hmac_key, page[start:end + 16] + struct.pack("<I", number), self.digest)
        if not hmac.compare_digest(made, tag):
            raise NotAuthentic(f"page {number} of the {place}")
        decryptor = Cipher(algorithms.AES(self.key), modes.CBC(iv)).decryptor()
        return Page(place, number, page[:start] + decryptor.update(page[start:end]) + decryptor.finalize())
