"""The vault's file: one SQLCipher database, every page of it AES-256 with a MAC, opened with a raw key.

What holds:

1. A file is made with O_EXCL and O_NOFOLLOW, 0600, in a folder that is its owner's alone. One that is opened is a regular file
   with one name, is this user's, and nobody else may read it.
2. The key goes to SQLCipher through its C interface, from a bytearray that is overwritten: it is in no SQL text, and so in
   none of the places where SQL is kept (the statement cache of the binding, traces, error messages).
3. One connection, in SQLite's exclusive locking mode: nobody else opens the file, and the WAL's index is memory of this process
   instead of a file beside it. Temporary tables are memory too.
4. Freed space is overwritten (`secure_delete`). That alone is not enough: SQLite may leave a copy of a short row in the unused
   part of a page when it moves rows between pages, and does not find it again when the row is deleted. Therefore *content lies
   on overflow pages alone*, which rows do not share and which are overwritten whole: every blob of content begins with
   `pad`, one page of zeros, and what SQLite keeps in the shared page is the beginning of a row.
5. `settle` ends a deletion: the WAL is copied into the file, over the bytes that were deleted, and truncated; then pages that
   are free, and by now zeros, are given back once they are more than a quarter of the file. In that order, since a page that
   is given back first is cut off and not overwritten.
6. What goes wrong is one of a few `VaultError`s; the transaction is rolled back. SQLCipher refuses every page after one that
   was damaged, so the connection is then made anew: the other pages are read again.

A page is 8 KiB with HMAC-SHA-512: measured, see docs/adr/0007-vault.md.

What Python and SQLCipher keep: SQLCipher holds the key in its own memory, raw and as hex, until the connection is closed, and
overwrites it then. Rows pass through Python's bytes, which nobody can overwrite; they end with the process.

>>> pages = Pages.create(folder, VolumeKey.fresh(), durable=False)      # doctest: +SKIP
>>> with pages.transaction() as connection:                             # doctest: +SKIP
...     connection.execute("CREATE TABLE notes (number INTEGER PRIMARY KEY, text BLOB)")
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

from sqlcipher3 import dbapi2

from appliance.errors import VaultError
from appliance.vault.keys import VolumeKey

_MOST_FREE: Final = 4       # a fourth of the file


@dataclass(frozen=True)
class Layout:
    """How the pages are made; a database can only be opened with the layout that it was made with."""

    page_size: int = 8192       # bytes
    digest: Literal["SHA256", "SHA512"] = "SHA512"


LAYOUT: Final = Layout()


class Pages:
    """An open database. Not safe for several threads at once: whoever has it keeps a lock."""

    def __init__(self, path: Path, key: VolumeKey, *, durable: bool, layout: Layout, new: bool) -> None:
        self.path = path
        self.layout = layout
        self.pad = bytes(layout.page_size)      # what content begins with: rule 4
        self._key = key
        self._durable = durable
        self._is_open = False
        self._is_new = new
        self._connection = self._connect()
        self._is_new = False

    @classmethod
    def create(cls, folder: Path, name: str, key: VolumeKey, *, durable: bool, layout: Layout = LAYOUT) -> Pages:
        """Make the file, which must not be there, and open it.

        `durable`: what was committed survives the loss of power. Without it nothing is waited for, which is for a database
        whose key does not survive either. Raises `VaultError`; no file is then left.
        """
        path = check_folder(folder) / name
        with told(name):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            made = cls(path, key, durable=durable, layout=layout, new=True)
            if durable:
                made.flush()
            return made
        except BaseException:
            remove(path)
            raise

    @classmethod
    def open(cls, folder: Path, name: str, key: VolumeKey, *, durable: bool, layout: Layout = LAYOUT) -> Pages:
        """Open a database that is there. Raises `VaultError`; the file is then as it was."""
        path = check_folder(folder) / name
        with told(name):
            try:
                status = path.lstat()
            except FileNotFoundError:
                raise VaultError("vault_missing", f"{name}: is not there", hint="put the vault's folder back whole") from None
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise VaultError(
                "vault_refused", f"{name}: not a file of this user alone, with one name",
                hint="nobody else may read it (chmod 600), and links are not followed",
            )
        # SQLite would begin a new database in an empty file. Half a page at the end is a crash's only where there is a log.
        log = path.with_name(f"{name}-wal")
        if status.st_size < layout.page_size or (status.st_size % layout.page_size and not (log.exists() and log.stat().st_size)):
            raise _damaged(name)
        return cls(path, key, durable=durable, layout=layout, new=False)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        """Give a connection whose changes are kept together at the end of the block, or not at all. Raises `VaultError`."""
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite has ended the transaction by itself after some errors. A rollback that fails is one that the
                # next opening does: the pages that were written are not part of the database without their commit.
                with contextlib.suppress(dbapi2.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: object) -> list[Any]:
        """Return what a query finds. Raises `VaultError`."""
        with self._told():
            return list(self._connection.execute(sql, values))

    def settle(self) -> None:
        """Finish what was deleted: overwritten in the file, and nothing of it in the WAL. Raises `VaultError`."""
        self.checkpoint()
        with self._told():
            ((free,),) = self._connection.execute("PRAGMA freelist_count")
            ((pages,),) = self._connection.execute("PRAGMA page_count")
            if free * _MOST_FREE <= pages:
                return
            list(self._connection.execute("PRAGMA incremental_vacuum"))
        self.checkpoint()

    def checkpoint(self) -> None:
        """Copy the WAL into the file and truncate it. Raises `VaultError`."""
        with self._told():
            ((busy, _, _),) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if busy:        # one connection, no reader: it cannot be
                raise VaultError("vault_busy", f"{self.path.name}: the write-ahead log is in use")

    def damage(self) -> tuple[str, ...]:
        """Return what SQLCipher and SQLite find wrong, page by page; nothing for a sound file. Reads the whole file.

        Raises `VaultError`, also where the log could not be copied into the file first: what is in the log is not looked at.
        """
        self.checkpoint()
        found = [text for (text,) in self.rows("PRAGMA cipher_integrity_check")]
        return tuple(found or (text for (text,) in self.rows("PRAGMA integrity_check") if text != "ok"))

    def flush(self) -> None:
        """Wait until the file's folder is on the disk, and the file if it is closed. Raises `VaultError`."""
        with told(self.path.name):
            # Not the file while SQLite has it open: closing another descriptor of it would let go of SQLite's locks (fcntl(2)).
            for path in (self.path.parent,) if self._is_open else (self.path, self.path.parent):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def close(self) -> None:
        """Give the file back; SQLCipher overwrites its copies of the key. The WAL is copied into the file first, if it can be."""
        self._is_open = False
        with contextlib.suppress(dbapi2.Error):
            self._connection.close()

    def _connect(self) -> Any:
        with told(self.path.name):
            connection = dbapi2.connect(
                f"file:{quote(str(self.path))}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
            )
            try:
                # SQLCipher would write to stderr, which is the journal: page numbers at most, and none of its business.
                connection.execute("PRAGMA cipher_log_level = NONE")
                with self._key.spelt() as spelt:
                    connection.set_key(spelt)
                for pragma in self._pragmas():
                    connection.execute(f"PRAGMA {pragma}").fetchall()
                connection.execute("SELECT count(*) FROM sqlite_master").fetchall()      # the first read tries the key
            except BaseException:
                connection.close()
                raise
        self._is_open = True
        return connection

    def _pragmas(self) -> tuple[str, ...]:
        return (
            "cipher_memory_security = ON",          # SQLite's memory is locked where that is allowed, and overwritten when freed
            f"cipher_page_size = {self.layout.page_size}",
            f"cipher_hmac_algorithm = HMAC_{self.layout.digest}",
            "locking_mode = EXCLUSIVE",             # before anything is read: the WAL's index is then not a file
            *(("auto_vacuum = INCREMENTAL",) if self._is_new else ()),      # it writes to a file that is there, too
            "journal_mode = WAL",
            "wal_autocheckpoint = 0",               # the vault says when, and hears of it when it fails
            f"synchronous = {'FULL' if self._durable else 'OFF'}",
            "secure_delete = ON",
            "temp_store = MEMORY",
            "cell_size_check = ON",
            "trusted_schema = OFF",
        )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with told(self.path.name):
                yield
        except VaultError as error:
            if error.reason == "vault_damaged":
                self.close()
                self._connection = self._connect()
            raise


def check_folder(folder: Path) -> Path:
    """Return the folder's real path if it is its owner's alone. Raises `VaultError`."""
    with told("the vault's folder"):
        real = folder.resolve(strict=True)
        status = real.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise VaultError(
            "vault_refused", "the vault's folder: not a folder of this user alone", hint="chmod 700 it, or name another one"
        )
    return real


def remove(path: Path) -> None:
    """Take a database and its WAL away; what is not there is no error. Raises `VaultError`."""
    with told(path.name):
        for name in (path, path.with_name(f"{path.name}-wal")):
            name.unlink(missing_ok=True)


@contextlib.contextmanager
def told(place: str) -> Iterator[None]:
    """Turn what SQLite, SQLCipher or the file system says into a `VaultError`; their own text may quote a path or SQL."""
    try:
        yield
    except dbapi2.Error as error:
        raise _refusal(place, str(getattr(error, "sqlite_errorname", ""))) from None
    except OSError as error:
        if error.errno in _FULL:
            raise _refusal(place, "SQLITE_FULL") from None
        raise VaultError("vault_unusable", f"{place}: {os.strerror(error.errno or 0).lower()}") from None


_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def _refusal(place: str, name: str) -> VaultError:
    match name.split("_")[1:2]:
        case ["FULL"]:
            return VaultError(
                "storage_full", "the storage under the vault is full, and nothing was changed",
                hint="forget some pictures, or make room on the vault's file system",
            )
        case ["IOERR"]:
            return VaultError(
                "storage_failed", "the storage under the vault failed to read or write, and nothing was changed",
                hint="look at the kernel's log: the disk may be failing, full or gone",
            )
        case ["CORRUPT" | "NOTADB"]:
            return _damaged(place)
        case ["BUSY" | "LOCKED"]:
            return VaultError("vault_busy", f"{place}: another process has it open", hint="close the running appliance first")
        case _:
            return VaultError("vault_unusable", f"{place}: cannot be used ({name or 'no reason given'})")


def _damaged(place: str) -> VaultError:
    return VaultError(
        "vault_damaged", f"{place}: damaged, cut short, or not made with this key",
        hint="put the vault back from a copy; nothing was changed",
    )
