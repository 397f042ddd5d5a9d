"""The vault: pictures, how they were made, and their thumbnails, by session, in one encrypted database.

    Vault.ephemeral     session mode: a random key that exists in this process alone. Its end is the end of the pictures
    Vault.open          persistent mode: the key was unwrapped from a key slot (`vault/locked.py`)

What holds:

1. Nothing is in the clear on a disk: `vault/pages.py` says how, and how what was deleted is overwritten.
2. A session sees its own pictures. Another session's id is answered exactly as an id that never was.
3. The vault is bounded by `capacity`. When it is full, or the storage under it is, a new picture is refused, and the ones that
   are kept stay. Deleting works on a full disk (`vault/reserve.py`).
4. `Retention` says how long and how much is kept; the oldest go first. Age is counted by a clock that never steps back
   (`vault/age.py`).
5. A picture is stored or deleted by one transaction. A deletion returns when its bytes have been overwritten; where that could
   not be finished it is refused with `delete_unfinished`, the picture is gone for every reader, and the next change finishes it.
6. Listing reads no picture's bytes. What is searched by (numbers, random ids, sizes, times) lies apart from what is content.

Safe to use from several threads: one lock around one connection.

>>> vault = Vault.ephemeral(folder, capacity=1 << 30)                             # doctest: +SKIP
>>> image = vault.put(session, png, request, seed=7, variant="fp32")              # doctest: +SKIP
>>> vault.get(session, image).png == png                                          # doctest: +SKIP
True
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NewType

from appliance.errors import VaultError
from appliance.request import GenerationRequest
from appliance.vault.age import Age, Clock, Retention, clock
from appliance.vault.keys import VolumeKey
from appliance.vault.pages import LAYOUT, Layout, Pages, remove
from appliance.vault.reserve import BATCH, LONGEST_LOG, Reserve
from appliance.vault.thumbnail import thumbnail_of

SessionId = NewType("SessionId", str)
ImageId = NewType("ImageId", str)

SESSION_FILES: Final = "session-*"      # what a dead session-mode run leaves, ciphertext without a key: see `vault/wipe.py`
UNLIMITED: Final = Retention()
TABLES: Final = ("meta", "pictures", "contents", "thumbnails")
_SCHEMA: Final = (
    # Content lies in `contents` and `thumbnails` alone, padded; the rest is numbers and random ids (`pages`, rule 4).
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value NOT NULL)",
    "CREATE TABLE pictures (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, session TEXT NOT NULL, "
    "size INTEGER NOT NULL, age REAL NOT NULL)",
    "CREATE INDEX pictures_of_session ON pictures (session, number)",
    "CREATE TABLE contents (number INTEGER PRIMARY KEY, about BLOB NOT NULL, png BLOB NOT NULL)",
    "CREATE TABLE thumbnails (number INTEGER PRIMARY KEY, jpeg BLOB NOT NULL)",
)


@dataclass(frozen=True)
class StoredImage:
    """One finished picture without its bytes: the request that made it, and what else is known of it."""

    id: ImageId
    request: GenerationRequest
    seed: int
    variant: str
    made_at: float      # Unix time


@dataclass(frozen=True)
class Picture(StoredImage):
    """One finished picture: PNG bytes without metadata."""

    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Generation:
    """Which state of the key-slot header the database belongs to: `now`, and while a change is under way also `before`."""

    now: int
    before: int


class Vault:
    """Pictures of every session. Made by `ephemeral` or `open`, ended by `close`."""

    def __init__(
        self, pages: Pages, key: VolumeKey, *, capacity: int, retention: Retention, read_clock: Clock, ephemeral: bool
    ) -> None:
        self._pages: Pages | None = pages
        self._key = key
        self._capacity = capacity
        self._retention = retention
        self._ephemeral = ephemeral
        self._logged = 0            # bytes in the log, about
        self._unsettled = True      # the log of a run that was killed may hold anything
        self._lock = threading.RLock()
        kept = dict(pages.rows("SELECT name, value FROM meta"))
        self._age = Age(read_clock, (kept["age"], kept["wall"], kept["boot"]) if "age" in kept else None)
        ((self._count, self._held, largest),) = pages.rows(
            "SELECT count(*), coalesce(sum(size), 0), coalesce(max(size), 0) FROM pictures"
        )
        self._reserve = Reserve(pages.path.with_name(f"{pages.path.name}-reserve"))
        with contextlib.suppress(VaultError):       # a vault on a full disk can be opened and read
            self._finish(pages)
            self._reserve.cover(largest)

    @classmethod
    def ephemeral(
        cls, folder: Path, *, capacity: int, retention: Retention = UNLIMITED, read_clock: Clock = clock,
        layout: Layout = LAYOUT,
    ) -> Vault:
        """Make an empty vault of at most `capacity` bytes, with a key that nobody else has and that is stored nowhere.

        Raises `VaultError`; no file is then left.
        """
        key = VolumeKey.fresh()
        pages = create(folder, f"session-{key.volume.hex()}", key, durable=False, layout=layout)
        return cls(pages, key, capacity=capacity, retention=retention, read_clock=read_clock, ephemeral=True)

    @classmethod
    def open(
        cls, folder: Path, key: VolumeKey, *, capacity: int, retention: Retention = UNLIMITED, read_clock: Clock = clock
    ) -> Vault:
        """Open the vault that this key was made for. Raises `VaultError`; the file is then as it was."""
        pages = Pages.open(folder, database_name(key.volume), key, durable=True)
        try:
            return cls(pages, key, capacity=capacity, retention=retention, read_clock=read_clock, ephemeral=False)
        except BaseException:
            pages.close()
            raise

    # ── Pictures ──────────────────────────────────────────────────────────────

    def put(self, session: SessionId, png: bytes, request: GenerationRequest, *, seed: int, variant: str) -> ImageId:
        """Keep one picture. Raises `VaultError` when it does not fit; nothing that is kept is lost by that."""
        image = ImageId(secrets.token_urlsafe(16))
        with self._opened() as pages:
            about = pages.pad + json.dumps(
                {"request": dataclasses.asdict(request), "seed": seed, "variant": variant, "made_at": time.time()}
            ).encode("utf-8")
            size = len(about) + len(png)
            if self._held + size > self._capacity:
                raise VaultError(
                    "vault_full", "there is no room for another picture", hint="forget some pictures, then develop it again"
                )
            self._finish(pages)
            self._reserve.cover(size)
            with self._change(pages) as connection:
                number = connection.execute(
                    "INSERT INTO pictures (id, session, size, age) VALUES (?, ?, ?, ?)",
                    (image, session, size, self._age.seconds),
                ).lastrowid
                connection.execute("INSERT INTO contents VALUES (?, ?, ?)", (number, about, png))
            self._count, self._held = self._count + 1, self._held + size
            # The picture is kept: that an older one's end is not finished is no reason to refuse it. The next change finishes it.
            with contextlib.suppress(VaultError):
                self._count_logged(pages, size)
                self._drop(pages, self._expired(pages))
        return image

    def get(self, session: SessionId, image: ImageId) -> Picture | None:
        """Return the session's picture; None for an unknown id and for another session's. Raises `VaultError`."""
        with self._opened() as pages:
            rows = pages.rows(
                "SELECT about, png FROM pictures JOIN contents USING (number) WHERE id = ? AND session = ?", image, session
            )
        return None if not rows else Picture(**_about(image, rows[0][0]), png=rows[0][1])

    def images(self, session: SessionId, *, newest: int | None = None) -> tuple[StoredImage, ...]:
        """Return the session's pictures, newest first, without their bytes; at most `newest` of them. Raises `VaultError`."""
        with self._opened() as pages:
            rows = pages.rows(
                "SELECT id, about FROM pictures JOIN contents USING (number) WHERE session = ? ORDER BY number DESC LIMIT ?",
                session, -1 if newest is None else newest,
            )
        return tuple(StoredImage(**_about(ImageId(image), about)) for image, about in rows)

    def thumbnail(self, session: SessionId, image: ImageId) -> bytes | None:
        """Return a small JPEG of the session's picture, made when it is first asked for; None where there is none to make.

        Raises `VaultError`, but not for want of room: it is then made anew each time.
        """
        with self._opened() as pages:
            rows = pages.rows(
                "SELECT number, jpeg FROM pictures LEFT JOIN thumbnails USING (number) WHERE id = ? AND session = ?",
                image, session,
            )
            if not rows:
                return None
            number, kept = rows[0]
            if kept is not None:
                return bytes(kept[len(pages.pad):])
            ((png,),) = pages.rows("SELECT png FROM contents WHERE number = ?", number)
        made = thumbnail_of(png)
        if made is not None:
            with self._opened() as pages, contextlib.suppress(VaultError), self._change(pages) as connection:
                connection.execute(     # only if the picture is still there: it may have been deleted meanwhile
                    "INSERT OR IGNORE INTO thumbnails SELECT number, ? FROM pictures WHERE number = ?",
                    (pages.pad + made, number),
                )
                self._count_logged(pages, len(pages.pad) + len(made))
        return made

    def delete(self, session: SessionId, image: ImageId) -> bool:
        """Drop one picture and overwrite its bytes; False when the session has none of that id. Raises `VaultError`."""
        with self._opened() as pages:
            numbers = [number for (number,) in pages.rows(
                "SELECT number FROM pictures WHERE id = ? AND session = ?", image, session
            )]
            self._drop(pages, numbers)
        return bool(numbers)

    def end(self, session: SessionId) -> None:
        """Drop every picture of the session and overwrite their bytes. Raises `VaultError`."""
        with self._opened() as pages:
            self._drop(pages, [number for (number,) in pages.rows("SELECT number FROM pictures WHERE session = ?", session)])

    def sessions(self) -> tuple[SessionId, ...]:
        """Return the sessions that have pictures."""
        with self._opened() as pages:
            rows = pages.rows("SELECT DISTINCT session FROM pictures ORDER BY session")
        return tuple(SessionId(session) for (session,) in rows)

    def expire(self) -> int:
        """Drop what is kept too long or is too much, finish what a deletion left, and return how many. Raises `VaultError`."""
        with self._opened() as pages:
            self._finish(pages)
            with self._change(pages):
                pass        # what has passed is written down
            numbers = self._expired(pages)
            self._drop(pages, numbers)
        return len(numbers)

    # ── The database as a whole ───────────────────────────────────────────────

    @property
    def held(self) -> int:
        """How many bytes are kept, of at most `capacity`."""
        return int(self._held)

    @property
    def generation(self) -> Generation:
        """Which state of the header this database belongs to (`vault/locked.py`)."""
        with self._opened() as pages:
            kept = dict(pages.rows("SELECT name, value FROM meta WHERE name IN ('generation', 'before')"))
        return Generation(int(kept.get("generation", 0)), int(kept.get("before", 0)))

    def record(self, generation: Generation) -> None:
        """Write the generation down, in the file itself: what is in the WAL alone is lost with it. Raises `VaultError`."""
        with self._opened() as pages:
            with self._change(pages) as connection:
                _record(connection, generation)
            pages.checkpoint()

    def damage(self) -> tuple[str, ...]:
        """Return what is wrong with the file, page by page; nothing for a sound one. Reads all of it."""
        with self._opened() as pages:
            return pages.damage()

    def copy(self, folder: Path, key: VolumeKey, generation: Generation) -> None:
        """Write a new vault under a new key that holds what this one does. Raises `VaultError`; no new file is then left.

        Row by row, so that no more than one picture is in memory, and nothing of the old file's free space comes along. The
        file is nobody's until a header names it, so that it is waited for once, at the end.
        """
        with self._opened() as pages:
            self._finish(pages)
            fresh = create(folder, database_name(key.volume), key, durable=False)
            try:
                with pages.transaction() as out:
                    for table in TABLES:
                        for row in out.execute(f"SELECT * FROM {table}"):       # noqa: S608     # one of our four names
                            with fresh.transaction() as into:
                                into.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)      # noqa: S608
                with fresh.transaction() as into:
                    _record(into, generation)
                fresh.checkpoint()
                fresh.close()
                fresh.flush()
            except BaseException:
                fresh.close()
                remove(fresh.path)
                raise

    def close(self) -> None:
        """Give the file and the key back; twice is no error. In session mode the file, unreadable by now, is taken away."""
        with self._lock:
            pages, self._pages = self._pages, None
            if pages is None:
                return
            with contextlib.suppress(VaultError):
                self._finish(pages)
            pages.close()
            self._key.wipe()
            self._reserve.close()
            if self._ephemeral:
                remove(pages.path)
                remove(self._reserve.path)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Pages]:
        """Give the pages, to this thread alone."""
        with self._lock:
            if self._pages is None:
                raise VaultError("vault_closed", "the vault is closed", hint="unlock it first")
            yield self._pages

    @contextlib.contextmanager
    def _change(self, pages: Pages) -> Iterator[Any]:
        """Change rows in one transaction, which also writes down what time has passed."""
        age, wall, boot = self._age.advance()
        with pages.transaction() as connection:
            yield connection
            connection.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", (("age", age), ("wall", wall), ("boot", boot))
            )

    def _expired(self, pages: Pages) -> list[int]:
        """Return the numbers of what is too old or too much, the oldest first."""
        keep = self._retention
        limits = (
            -1.0 if keep.age is None else self._age.seconds - keep.age,
            self._count if keep.count is None else keep.count, self._held if keep.size is None else keep.size,
        )
        if limits[0] < 0 and limits[1] >= self._count and limits[2] >= self._held:
            return []
        return [number for (number,) in pages.rows(
            "SELECT number FROM (SELECT number, age, row_number() OVER latest AS place, sum(size) OVER latest AS upto "
            "FROM pictures WINDOW latest AS (ORDER BY number DESC)) WHERE age <= ? OR place > ? OR upto > ? ORDER BY number",
            *limits,
        )]

    def _drop(self, pages: Pages, numbers: Sequence[int]) -> None:
        """Delete rows and overwrite them, some at a time: what is written for that is bounded, however many they are."""
        sizes = dict(pages.rows("SELECT number, size FROM pictures")) if len(numbers) > 1 else {}
        batch, size = [], 0
        for number in numbers:
            batch.append(number)
            size += sizes.get(number, 0)
            if size >= BATCH or number == numbers[-1]:
                self._drop_batch(pages, batch)
                batch, size = [], 0

    def _drop_batch(self, pages: Pages, numbers: list[int]) -> None:
        try:
            self._delete_rows(pages, numbers)
        except VaultError as error:
            if error.reason != "storage_full":
                raise
            with self._reserve.given_up():
                self._delete_rows(pages, numbers)

    def _delete_rows(self, pages: Pages, numbers: list[int]) -> None:
        """Delete rows, those that are still there, and finish it: it can be repeated."""
        places = ", ".join("?" * len(numbers))
        with self._change(pages) as connection:
            ((count, size),) = connection.execute(
                f"SELECT count(*), coalesce(sum(size), 0) FROM pictures WHERE number IN ({places})", numbers     # noqa: S608
            )
            for table in ("pictures", "contents", "thumbnails"):
                connection.execute(f"DELETE FROM {table} WHERE number IN ({places})", numbers)       # noqa: S608
        self._count, self._held = self._count - count, self._held - size
        self._unsettled = True
        self._finish(pages)

    def _finish(self, pages: Pages) -> None:
        """Overwrite what deletions have left behind, if the last one could not."""
        if self._unsettled:
            try:
                pages.settle()
            except VaultError as error:
                if error.reason == "storage_full":
                    raise
                raise VaultError(
                    "delete_unfinished", "what was deleted is gone from the vault, but could not be overwritten yet",
                    hint=error.hint,
                ) from None
            self._unsettled, self._logged = False, 0

    def _count_logged(self, pages: Pages, size: int) -> None:
        """Keep the log short: on a full disk it must fit into the reserve's room, and what is deleted must be found there."""
        self._logged += size
        if self._logged >= LONGEST_LOG:
            self._unsettled = True
            self._finish(pages)


def database_name(volume: bytes) -> str:
    """Return the file name of a persistent vault's database."""
    return f"vault-{volume.hex()}"


def create(folder: Path, name: str, key: VolumeKey, *, durable: bool, layout: Layout = LAYOUT) -> Pages:
    """Make a database with empty tables. Raises `VaultError`; no file is then left."""
    pages = Pages.create(folder, name, key, durable=durable, layout=layout)
    try:
        with pages.transaction() as connection:
            for statement in _SCHEMA:
                connection.execute(statement)
        return pages
    except BaseException:
        pages.close()
        remove(pages.path)
        raise


def _record(connection: Any, generation: Generation) -> None:
    connection.executemany(
        "INSERT OR REPLACE INTO meta VALUES (?, ?)", (("generation", generation.now), ("before", generation.before))
    )


def _about(image: ImageId, padded: bytes) -> dict[str, Any]:
    """Return a picture's fields. They were written by this program and authenticated page by page."""
    about = json.loads(padded[padded.index(b"{"):])
    return {**about, "id": image, "request": GenerationRequest(**about["request"])}
