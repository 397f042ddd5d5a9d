"""How long the vault takes: put, get and delete of 1 MiB pictures against plain SQLite, and listing.

    python benchmarks/vault.py FOLDER       a folder on the disk that is asked about; prints the table of docs/adr/0007-vault.md
"""

from __future__ import annotations

import secrets
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from appliance.request import GenerationRequest
from appliance.vault.keys import VolumeKey
from appliance.vault.pages import Layout, Pages
from appliance.vault.volume import SessionId, Vault

ROWS, MIB = 24, 1 << 20
DIGESTS: tuple[Literal["SHA256", "SHA512"], ...] = ("SHA256", "SHA512")
REQUEST = GenerationRequest("a red apple", "", 20, "ddim", "model", 2.0, 1, 1, 512, 512)


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return (time.perf_counter() - start) * 1000


def measured(
    put: Callable[[bytes], object], get: Callable[[int], object], delete: Callable[[int], object]
) -> tuple[float, float, float]:
    """Return put (of the best four in a row, one of which copies the log), get and delete (the best), in milliseconds.

    The best, because whatever else the machine is doing only ever adds.
    """
    pictures = [secrets.token_bytes(MIB) for _ in range(4)]
    puts = [timed(lambda step=step: put(pictures[step % 4])) for step in range(ROWS)]      # type: ignore[misc]
    gets = [timed(lambda step=step: get(step * 7 % ROWS + 1)) for step in range(ROWS)]      # type: ignore[misc]
    deletes = [timed(lambda step=step: delete(step + 1)) for step in range(0, ROWS, 2)]      # type: ignore[misc]
    return min(statistics.mean(puts[at:at + 4]) for at in range(0, ROWS, 4)), min(gets), min(deletes)


def plain(folder: Path, page_size: int) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        connection = sqlite3.connect(Path(inner) / "plain", isolation_level=None)
        for pragma in (
            f"page_size={page_size}", "locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        return rows(connection, lambda: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())


def encrypted(folder: Path, layout: Layout) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        pages = Pages.create(Path(inner), "x", VolumeKey.fresh(), durable=True, layout=layout)
        found = rows(pages._connection, pages.checkpoint)
        pages.close()
        return found


def rows(connection: Any, checkpoint: Callable[[], object]) -> tuple[float, float, float]:
    connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, png BLOB)")
    count = 0

    def put(png: bytes) -> None:
        nonlocal count
        connection.execute("INSERT INTO t (png) VALUES (?)", (png,))
        count += 1
        if count % 4 == 0:
            checkpoint()

    def delete(number: int) -> None:
        connection.execute("DELETE FROM t WHERE n = ?", (number,))
        checkpoint()

    return measured(put, lambda number: connection.execute("SELECT png FROM t WHERE n = ?", (number,)).fetchone(), delete)


def listing(folder: Path, count: int) -> tuple[float, float]:
    """Return the milliseconds for a session of 100 pictures, and for the newest 100 of all, in a vault of `count`."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        vault = Vault.ephemeral(Path(inner), capacity=1 << 40)
        few, many = SessionId("few"), SessionId("many")
        for number in range(count):
            vault.put(few if number % (count // 100) == 0 else many, bytes(20_000), REQUEST, seed=number, variant="fp32")
        found = (
            min(timed(lambda: vault.images(few)) for _ in range(9)),
            min(timed(lambda: vault.images(many, newest=100)) for _ in range(9)),
        )
        vault.close()
        return found


def main() -> None:
    folder = Path(sys.argv[1])
    print("| page | HMAC | put ms | get ms | delete ms | put : plain | get : plain |\n|---|---|---|---|---|---|---|")
    for page_size in (4096, 8192, 16384, 65536):
        runs = [plain(folder, page_size) for _ in range(3)]
        base = tuple(map(min, zip(*runs, strict=True)))
        print(f"| {page_size} | plain | {base[0]:.1f} | {base[1]:.2f} | {base[2]:.1f} | | |", flush=True)
        for digest in DIGESTS:
            runs = [encrypted(folder, Layout(page_size, digest)) for _ in range(3)]
            ours = tuple(map(min, zip(*runs, strict=True)))
            print(
                f"| {page_size} | {digest} | {ours[0]:.1f} | {ours[1]:.2f} | {ours[2]:.1f} | {base[0] / ours[0]:.2f} "
                f"| {base[1] / ours[1]:.2f} |", flush=True,
            )
    for count in (100, 10_000):
        few, newest = listing(folder, count)
        print(f"{count} pictures: a session of 100 in {few:.1f} ms, the newest 100 of another in {newest:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
