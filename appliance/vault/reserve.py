"""Room that is kept free, so that a full disk can still be emptied.

To delete, SQLite first writes: the zeros that will lie over the picture go to the write-ahead log, and from there to the file.
On a disk with nothing left that fails, and the only remedy would be the one thing that cannot be done. So some room is allocated
beforehand, as a file of zeros beside the database, and given up for as long as a deletion needs it.

The room is for the largest row, or a batch of small ones, to be written to the log once more, and for the file to grow by what
the log still holds. Both are bounded: the log is copied into the file whenever it holds `LONGEST_LOG` bytes, and while that
fails no picture is taken.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.errors import VaultError
from appliance.vault.pages import told

BATCH: Final = 1 << 20          # bytes that are deleted together, or one row
LONGEST_LOG: Final = 4 << 20    # bytes, and one row more


class Reserve:
    """A file of zeros; not safe for several threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with told(path.name):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._descriptor).st_size

    @contextlib.contextmanager
    def given_up(self) -> Iterator[None]:
        """Give the room back to the file system for the length of a block, and take it again if that can be had."""
        size, self._size = self._size, 0
        with told(self.path.name):
            os.ftruncate(self._descriptor, 0)
        try:
            yield
        finally:
            with contextlib.suppress(VaultError):
                self._allocate(size)

    def cover(self, row: int) -> None:
        """Have room for a row of so many bytes to be deleted. Raises `VaultError` when there is none."""
        self._allocate(3 * max(row, BATCH) + LONGEST_LOG + LONGEST_LOG // 4)     # a quarter for the pages between

    def close(self) -> None:
        """Give the descriptor back; the room stays taken."""
        os.close(self._descriptor)

    def _allocate(self, wanted: int) -> None:
        if wanted <= self._size:
            return
        with told(self.path.name):
            try:
                os.posix_fallocate(self._descriptor, 0, wanted)
            except OSError:
                os.ftruncate(self._descriptor, self._size)      # it may have been allocated in part
                raise
        self._size = wanted
