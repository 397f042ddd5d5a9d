"""Deletion, proven on decrypted pages: every page of the file, the free ones too, and every frame of the write-ahead log.

The raw file shows nothing, deleted or not, since it is ciphertext. So it is decrypted by the published format, without SQLCipher.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from appliance.vault.keys import VolumeKey
from appliance.vault.pages import Layout, Pages
from appliance.vault.volume import Vault, create
from tests.sqlcipher_pages import Format, NotAuthentic, Page
from tests.vaults import ANNA, BERT, put

CANARY = "canary-of-the-prompt"
PATTERN = b"canary-of-the-pixels"


def key_of(vault: Vault) -> bytes:
    with vault._key.spelt() as spelt:
        return bytes.fromhex(bytes(spelt[2:66]).decode("ascii"))


def pages_of(vault: Vault) -> list[Page]:
    pages = vault._pages
    assert pages is not None
    return Format(key_of(vault), pages.layout.page_size).pages(pages.path)


def found(pages: list[Page], what: bytes) -> list[Page]:
    return [page for page in pages if what in page.content]


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    vault = Vault.ephemeral(tmp_path, capacity=64 << 20)
    yield vault
    vault.close()


def noisy(vault: Vault) -> None:
    """Fill the vault with some pictures that stay."""
    for size in (300, 60_000, 9_000):
        put(vault, bytes(size), BERT, "a castle")


@pytest.mark.parametrize("size", [50, 8_000, 100_000, 1 << 20])
def test_a_deleted_picture_leaves_neither_bytes_nor_prompt_nor_thumbnail_in_any_page(vault: Vault, size: int) -> None:
    noisy(vault)
    image = put(vault, PATTERN * (size // len(PATTERN)), ANNA, CANARY)
    with vault._change(vault._pages) as connection:     # type: ignore[arg-type]
        connection.execute("INSERT INTO thumbnails SELECT number, ? FROM pictures WHERE id = ?", (bytes(8192) + b"canary-of-the-thumbnail", image))
    noisy(vault)
    for what in (CANARY.encode(), PATTERN, b"canary-of-the-thumbnail", image.encode()):
        assert found(pages_of(vault), what), f"the search would not find {what!r}"
    assert vault.delete(ANNA, image)
    left = pages_of(vault)
    assert {page.place for page in left} == {"file"}        # the log was truncated
    for what in (CANARY.encode(), PATTERN, PATTERN[:8], b"canary-of-the-thumbnail", image.encode()):
        assert found(left, what) == []
    assert len(vault.images(BERT)) == 6
    assert vault.damage() == ()


def test_every_free_page_is_zeros_or_a_list_of_free_pages(vault: Vault) -> None:
    noisy(vault)
    image = put(vault, PATTERN * 10_000)
    for _ in range(3):
        put(vault, bytes(400_000), BERT)
    vault.delete(ANNA, image)
    pages = pages_of(vault)
    free = Format(key_of(vault), 8192).freelist(pages)
    assert len(free) > 10
    trunks = [page for page in pages if page.number in free and page.content.strip(b"\0")]
    assert len(trunks) <= 1 + len(free) // 2000
    for trunk in trunks:
        count = int.from_bytes(trunk.content[4:8], "big")
        assert trunk.content[8 + 4 * count:].strip(b"\0") == b""


def test_with_secure_delete_off_the_same_search_finds_the_canary(vault: Vault) -> None:
    noisy(vault)
    image = put(vault, PATTERN * 20_000, ANNA, CANARY)
    for _ in range(4):
        put(vault, bytes(900_000), BERT)      # so much that the free pages are not cut off
    assert vault._pages is not None
    vault._pages.rows("PRAGMA secure_delete = OFF")
    vault.delete(ANNA, image)
    assert found(pages_of(vault), PATTERN)
    assert found(pages_of(vault), CANARY.encode())


def test_before_the_log_is_truncated_the_same_search_finds_the_canary_in_it(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    image = put(vault, PATTERN * 1000, ANNA, CANARY)
    monkeypatch.setattr(Pages, "checkpoint", lambda _: None)
    vault.delete(ANNA, image)
    assert {page.place for page in found(pages_of(vault), CANARY.encode())} == {"wal"}
    monkeypatch.undo()
    put(vault)
    vault.end(ANNA)
    assert found(pages_of(vault), CANARY.encode()) == []


def test_a_session_that_ends_leaves_nothing_and_the_file_shrinks(vault: Vault) -> None:
    noisy(vault)
    for number in range(30):
        put(vault, PATTERN * 10_000, ANNA, f"{CANARY} {number}")
    assert vault._pages is not None
    size = vault._pages.path.stat().st_size
    vault.end(ANNA)
    for what in (CANARY.encode(), PATTERN):
        assert found(pages_of(vault), what) == []
    assert vault._pages.path.stat().st_size < size / 4
    assert len(vault.images(BERT)) == 3


def survivors(tmp_path: Path, *, padded: bool) -> tuple[set[bytes], set[bytes]]:
    """Return the canaries of short rows that are alive, and those that are found, after many changes in random order."""
    key = VolumeKey.fresh()
    pages = Pages.create(tmp_path, f"padded-{padded}", key, durable=False, layout=Layout(4096))
    pad = pages.pad if padded else b""
    draw, alive = random.Random(2), dict[int, bytes]()
    with pages.transaction() as connection:
        connection.execute("CREATE TABLE notes (number INTEGER PRIMARY KEY AUTOINCREMENT, about BLOB)")
    for step in range(1200):
        with pages.transaction() as connection:
            if draw.random() < 0.6 or not alive:
                canary = b"CANARY%06d" % step
                about = pad + b" ".join([canary] * draw.randint(1, 60))
                alive[connection.execute("INSERT INTO notes (about) VALUES (?)", (about,)).lastrowid] = canary
            else:
                number = draw.choice(list(alive))
                connection.execute("DELETE FROM notes WHERE number = ?", (number,))
                del alive[number]
    pages.settle()
    with key.spelt() as spelt:
        raw = bytes.fromhex(bytes(spelt[2:66]).decode("ascii"))
    read = b"\0".join(page.content for page in Format(raw, 4096).pages(pages.path))
    pages.close()
    return set(alive.values()), set(re.findall(rb"CANARY\d{6}", read))


def test_short_rows_leave_nothing_once_they_are_padded_onto_pages_of_their_own(tmp_path: Path) -> None:
    alive, seen = survivors(tmp_path, padded=True)
    assert seen == alive


def test_without_the_pad_secure_delete_alone_leaves_a_deleted_row_behind(tmp_path: Path) -> None:
    alive, seen = survivors(tmp_path, padded=False)
    assert len(seen - alive) > 0        # if SQLite has learnt it, the pad can go


@pytest.mark.parametrize(("page_size", "digest"), [(4096, "SHA512"), (65536, "SHA256")])
def test_the_reader_of_pages_reads_every_layout_and_refuses_a_flipped_bit(
    tmp_path: Path, page_size: int, digest: Literal["SHA256", "SHA512"]
) -> None:
    key = VolumeKey.fresh()
    pages: Any = create(tmp_path, "x", key, durable=False, layout=Layout(page_size, digest))
    pages.checkpoint()
    pages.close()
    with key.spelt() as spelt:
        reader = Format(bytes.fromhex(bytes(spelt[2:66]).decode("ascii")), page_size, digest.lower())
    assert b"CREATE TABLE pictures" in reader.pages(pages.path)[0].content
    raw = bytearray(pages.path.read_bytes())
    raw[page_size + 100] ^= 1
    pages.path.write_bytes(raw)
    with pytest.raises(NotAuthentic, match="page 2 of the file"):
        reader.pages(pages.path)
