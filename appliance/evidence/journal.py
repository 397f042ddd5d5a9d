"""What is said while the appliance runs, and nothing else: an event's number and whole numbers.

Content cannot reach a log from here, because there is no way to say it: `Event` is a closed list, and an event carries up
to two integers whose meaning the list fixes. Worker and engine write twelve-byte records to a pipe; only the supervisor
turns them into sentences, in the systemd journal where that listens and on standard error otherwise.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

_RECORD: Final = struct.Struct(">Hxxii")      # below PIPE_BUF, so records of several writers never mix (POSIX write)


class Event(enum.IntEnum):
    """Everything that can be said. The comment names the two integers."""

    ENGINE_VERIFIED = 1         # files verified, mebibytes
    ENGINE_READY = 2            # milliseconds from start to ready, –
    WORKER_READY = 3            # process id, –
    WORKER_HAS_ENGINE = 4
    WORKER_LOST_ENGINE = 5
    JOB_DONE = 6                # pictures, milliseconds
    JOB_CANCELLED = 7
    JOB_FAILED = 8
    REQUEST_FAILED = 9          # HTTP status, –
    ENGINE_ENDED = 10           # exit status or minus the signal, –
    WORKER_ENDED = 11           # exit status or minus the signal, –
    CLOSED = 12                 # signal, milliseconds
    SEALED = 13                 # promises that hold, promises that were looked at
    UNSEALED = 14               # promises that hold, promises that were looked at
    ENGINE_STANDS_STILL = 15    # seconds
    WORKER_STANDS_STILL = 16    # seconds


_SENTENCES: Final = {
    Event.ENGINE_VERIFIED: "the model was verified: {0} files, {1} MiB",
    Event.ENGINE_READY: "the engine is ready after {0} ms",
    Event.WORKER_READY: "the worker is ready",
    Event.WORKER_HAS_ENGINE: "the worker has an engine",
    Event.WORKER_LOST_ENGINE: "the worker has lost its engine",
    Event.JOB_DONE: "a job is done: {0} pictures in {1} ms",
    Event.JOB_CANCELLED: "a job was cancelled",
    Event.JOB_FAILED: "a job failed",
    Event.REQUEST_FAILED: "a request ended with status {0}",
    Event.ENGINE_ENDED: "the engine ended with status {0}",
    Event.WORKER_ENDED: "the worker ended with status {0}",
    Event.CLOSED: "closed after signal {0} in {1} ms",
    Event.SEALED: "sealed: {0} of {1} promises hold",
    Event.UNSEALED: "NOT sealed: {0} of {1} promises hold",
    Event.ENGINE_STANDS_STILL: "the engine has stood still for {0} seconds and is ended",
    Event.WORKER_STANDS_STILL: "the worker has stood still for {0} seconds and is ended",
}


# The largest values of the two integers, of the events that children say. A number beyond them is no number of ours.
_LARGEST: Final = {
    Event.ENGINE_VERIFIED: (10_000, 1 << 20), Event.ENGINE_READY: (3_600_000, 0), Event.WORKER_READY: (1 << 22, 0),
    Event.WORKER_HAS_ENGINE: (0, 0), Event.WORKER_LOST_ENGINE: (0, 0), Event.JOB_DONE: (64, 86_400_000),
    Event.JOB_CANCELLED: (0, 0), Event.JOB_FAILED: (0, 0), Event.REQUEST_FAILED: (599, 0),
}


class Record(NamedTuple):
    """One event with its integers."""

    event: Event
    first: int = 0
    second: int = 0

    def __str__(self) -> str:
        return _SENTENCES[self.event].format(self.first, self.second)


class EventPipe:
    """The writing end, in worker and engine."""

    def __init__(self, fd: int) -> None:
        """Take over the writing end of the supervisor's pipe; it is made non-blocking."""
        os.set_blocking(fd, False)
        self._fd = fd

    def say(self, event: Event, first: int = 0, second: int = 0) -> None:
        """Write one record; a full pipe or a supervisor that is gone loses it, and never stops the one who speaks."""
        try:
            os.write(self._fd, _RECORD.pack(event, _clamped(first), _clamped(second)))
        except (BlockingIOError, BrokenPipeError):
            return


def records(untrusted: bytearray) -> Iterator[Record]:
    """Take whole records from the front of `untrusted`, in place.

    A record of no known event is dropped, and so is one with a number that the event cannot have: eight bytes of anything
    would otherwise be eight bytes in the log.
    """
    while len(untrusted) >= _RECORD.size:
        number, first, second = _RECORD.unpack(bytes(untrusted[: _RECORD.size]))
        del untrusted[: _RECORD.size]
        try:
            event = Event(number)
        except ValueError:
            continue
        most_first, most_second = _LARGEST.get(event, (-1, -1))
        if 0 <= first <= most_first and 0 <= second <= most_second:
            yield Record(event, first, second)


def to_journal(say: Callable[[str], None]) -> Callable[[Record], None]:
    """Return the function that publishes a record: to the systemd journal where it listens, through `say` otherwise."""
    if not _stderr_is_the_journal():
        return lambda record: say(str(record))
    from systemd import journal

    def publish(record: Record) -> None:
        # Fields are named one by one: journal.JournalHandler would send the arguments of every call along.
        journal.send(
            str(record), SYSLOG_IDENTIFIER="darkroom", DARKROOM_EVENT=record.event.name,
            DARKROOM_FIRST=str(record.first), DARKROOM_SECOND=str(record.second),
        )

    return publish


def _stderr_is_the_journal() -> bool:
    """Say whether standard error is what JOURNAL_STREAM names; children of children inherit the name (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        stderr = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(stderr.st_dev), str(stderr.st_ino))


def _clamped(number: int) -> int:
    return max(-(2**31), min(2**31 - 1, number))
