"""What can be recorded, and the line that it becomes.

    <body> <digest> <mac>\\n        body: canonical JSON; digest: SHA-256 of the body, hex; mac: HMAC-SHA-256, hex

    {"boot":…,"boottime":…,"event":"closed","fields":{"milliseconds":41,"mode":"session","trigger":"sigterm"},
     "previous":<digest of the record before>,"sequence":7,"time":…} 1f0c… 9b77…

Content cannot get in, because there is no way to say it: `Event` is a closed list, `FIELDS` gives each event's fields, and a
field is a whole number, a word from a closed list, or 64 hex digits that a digest fills. The body has no space in it, so
`cut -d' ' -f1 | tr -d '\\n' | sha256sum` gives its digest anywhere.

Two clocks, since neither can be trusted alone: `time`, milliseconds of CLOCK_REALTIME, which anybody with the right to may
set; `boottime`, milliseconds of CLOCK_BOOTTIME in the boot `boot`, which only runs.

>>> parse_line(b"{}", "records line 1")
Traceback (most recent call last):
appliance.errors.VerificationRefused: records line 1: not a record's line
"""

from __future__ import annotations

import enum
import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

from appliance.errors import VaultError
from appliance.evidence.canonical import GREATEST, decode, encode, refuse

LONGEST_LINE: Final = 2048          # bytes
NOTHING_BEFORE: Final = "0" * 64    # what the first record has as its `previous`


class Event(enum.IntEnum):
    """Everything that is recorded. Numbers are for the pipe between processes; a line holds the name."""

    CHAIN_BEGUN = 1
    KEY_TAKEN = 2           # the initial key was written down, and is on this machine no longer
    RECORDS_DROPPED = 3     # the oldest records were let go, for want of room
    STARTED = 10
    REFUSED = 11            # nothing was served
    CLOSED = 12
    ERASED = 13
    CERTIFIED = 14          # a certificate of sanitization was signed
    UNLOCKED = 20
    UNLOCK_FAILED = 21
    SLOT_CHANGED = 22       # of the vault's key slots
    EXPORTED = 30           # pictures were taken out of the vault
    DELETED = 31
    POLICY_CHANGED = 40
    POSTURE_CHANGED = 41    # a promise that held no longer does, or holds again
    USERS_CHANGED = 42


class Mode(enum.StrEnum):
    """How the vault's key is kept."""

    SESSION = "session"
    PERSISTENT = "persistent"


class Trigger(enum.StrEnum):
    """What made the appliance close or erase."""

    SIGTERM = "sigterm"
    SIGINT = "sigint"
    SIGHUP = "sighup"
    SHUTDOWN = "shutdown"
    SUSPEND = "suspend"
    IDLE = "idle"
    CRASH = "crash"
    WIPE_PAGE = "wipe_page"
    WIPE_COMMAND = "wipe_command"
    PANIC_KEY = "panic_key"
    FAILED_UNLOCKS = "failed_unlocks"
    KEY_MEDIUM_REMOVED = "key_medium_removed"
    SESSION_END = "session_end"
    UNFINISHED_AT_START = "unfinished_at_start"     # what a dead run left, or an erase that was cut short


class SlotKind(enum.StrEnum):
    """What opens a key slot."""

    PASSPHRASE = "passphrase"       # noqa: S105     # the word, not one
    RECOVERY = "recovery"
    KEY_FILE = "key_file"


class Change(enum.StrEnum):
    """What was done to a slot or a user."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"


class Refusal(enum.StrEnum):
    """Why nothing was served; the words of the exit codes."""

    CONFIGURATION = "configuration"
    VERIFICATION = "verification"
    VAULT = "vault"
    ENGINE = "engine"
    SEAL = "seal"


class Kind(enum.Enum):
    """A field's kind, where it is not a list of words."""

    WHOLE = "a whole number from 0"
    DIGEST = "64 hex digits"


FieldKind: TypeAlias = "Kind | type[enum.StrEnum]"
FIELDS: Final[Mapping[Event, Mapping[str, FieldKind]]] = MappingProxyType({
    Event.CHAIN_BEGUN: {"device": Kind.DIGEST},             # SHA-256 of the device's public key in PEM
    Event.KEY_TAKEN: {},
    Event.RECORDS_DROPPED: {"before": Kind.WHOLE},          # the first sequence number that is kept
    Event.STARTED: {"mode": Mode, "configuration": Kind.DIGEST},
    Event.REFUSED: {"because": Refusal},
    Event.CLOSED: {"mode": Mode, "trigger": Trigger, "milliseconds": Kind.WHOLE},       # from trigger to key gone
    Event.ERASED: {"mode": Mode, "trigger": Trigger, "milliseconds": Kind.WHOLE, "incomplete": Kind.WHOLE},
    Event.CERTIFIED: {"certificate": Kind.DIGEST, "record": Kind.WHOLE},    # its SHA-256; the close or erase it is about
    Event.UNLOCKED: {"slot": Kind.WHOLE, "kind": SlotKind},
    Event.UNLOCK_FAILED: {"failures": Kind.WHOLE},          # in a row, this one among them
    Event.SLOT_CHANGED: {"slot": Kind.WHOLE, "kind": SlotKind, "change": Change},
    Event.EXPORTED: {"pictures": Kind.WHOLE, "bytes": Kind.WHOLE},
    Event.DELETED: {"pictures": Kind.WHOLE},
    Event.POLICY_CHANGED: {"before": Kind.DIGEST, "after": Kind.DIGEST},
    Event.POSTURE_CHANGED: {"promise": Kind.WHOLE, "holds": Kind.WHOLE},    # 0 or 1
    Event.USERS_CHANGED: {"change": Change, "users": Kind.WHOLE},           # how many there are then
})

_DIGEST = re.compile(r"[0-9a-f]{64}")
_BOOT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Moment:
    """One moment on both clocks, in milliseconds."""

    time: int           # CLOCK_REALTIME, since 1970
    boottime: int       # CLOCK_BOOTTIME, since the kernel's start
    boot: str           # the kernel's boot id, in hex without dashes

    def as_text(self) -> str:
        """Return the wall clock's time, in UTC."""
        seconds, milliseconds = divmod(self.time, 1000)
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(min(seconds, 253402300799))) + f".{milliseconds:03} UTC"

    @classmethod
    def of(cls, values: Mapping[str, object], place: str) -> Moment:
        """Return the moment in the keys `time`, `boottime` and `boot`. Raises `VerificationRefused`."""
        times = [values[key] for key in ("time", "boottime")]
        boot = values["boot"]
        if any(type(value) is not int or value < 0 for value in times) or not isinstance(boot, str) or not _BOOT.fullmatch(boot):
            refuse(place, "not a moment")
        return cls(int(str(times[0])), int(str(times[1])), boot)


class Clock:
    """This machine's clocks. The boot id is read once, before the seal may close /proc off."""

    def __init__(self) -> None:
        """Read the kernel's boot id. Raises `VaultError` where there is none."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
        except (OSError, ValueError):
            boot = ""
        if not _BOOT.fullmatch(boot):
            raise VaultError("no_boot_id", "the kernel's boot id cannot be read", hint="mount /proc")
        self._boot = boot

    def __call__(self) -> Moment:
        """Return the present moment; a wall clock from before 1970 says 0."""
        times = [time.clock_gettime_ns(clock) // 1_000_000 for clock in (time.CLOCK_REALTIME, time.CLOCK_BOOTTIME)]
        return Moment(max(0, times[0]), max(0, times[1]), self._boot)


@dataclass(frozen=True)
class Record:
    """One thing that happened. Made only with the fields that its event has: else `VerificationRefused`."""

    sequence: int
    event: Event
    fields: Mapping[str, int | str]
    moment: Moment
    previous: str       # the digest of the record before, in hex

    def __post_init__(self) -> None:
        """Hold the record to `FIELDS`."""
        place = f"record {self.sequence}"
        if type(self.sequence) is not int or not 0 <= self.sequence <= GREATEST or not is_digest(self.previous):
            refuse("record", "not a record's number and predecessor")
        wanted = FIELDS[self.event]
        if set(self.fields) != set(wanted):
            refuse(place, "not this event's fields", expected=", ".join(wanted) or "none")
        for name, kind in wanted.items():
            if not _fits(self.fields[name], kind):
                refuse(f"{place}, {name}", "not such a value", expected=kind.value if isinstance(kind, Kind) else ", ".join(kind))

    def body(self) -> bytes:
        """Return the record's canonical bytes."""
        return encode({
            "sequence": self.sequence, "event": self.event.name.lower(), "fields": dict(self.fields),
            "time": self.moment.time, "boottime": self.moment.boottime, "boot": self.moment.boot, "previous": self.previous,
        })

    def digest(self) -> str:
        """Return SHA-256 of the body, in hex."""
        return hashlib.sha256(self.body()).hexdigest()

    @classmethod
    def parse(cls, untrusted: bytes, place: str) -> Record:
        """Return the record of which `untrusted` is the body. Raises `VerificationRefused`."""
        values = decode(untrusted, place, largest=LONGEST_LINE)
        if set(values) != {"sequence", "event", "fields", "time", "boottime", "boot", "previous"}:
            refuse(place, "not a record's keys")
        named = {event.name.lower(): event for event in Event}
        event, fields, sequence, previous = (values[key] for key in ("event", "fields", "sequence", "previous"))
        if not isinstance(event, str) or event not in named:
            refuse(place, "not an event that is recorded")
        if not isinstance(fields, dict) or type(sequence) is not int or not isinstance(previous, str):
            refuse(place, "not a record's values")
        return cls(sequence, named[event], fields, Moment.of(values, place), previous)


@dataclass(frozen=True)
class Line:
    """A record as it is kept: with the digest and the MAC that are written beside it, in hex, whether good or not."""

    record: Record
    digest: str
    mac: str

    def as_bytes(self) -> bytes:
        """Return the line, its newline with it."""
        return self.record.body() + f" {self.digest} {self.mac}\n".encode("ascii")


def parse_line(untrusted: bytes, place: str) -> Line:
    """Return what a line without its newline says. Raises `VerificationRefused`; digest and MAC are not checked."""
    parts = untrusted.split(b" ")
    if len(untrusted) >= LONGEST_LINE or len(parts) != 3:
        refuse(place, "not a record's line")
    digest, mac = (part.decode("ascii", "replace") for part in parts[1:])
    if not is_digest(digest) or not is_digest(mac):
        refuse(place, "not a record's line")
    return Line(Record.parse(parts[0], place), digest, mac)


def is_digest(value: object) -> bool:
    """Say whether `value` is 64 lower-case hex digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _fits(value: object, kind: FieldKind) -> bool:
    if kind is Kind.WHOLE:
        return type(value) is int and 0 <= value <= GREATEST
    if kind is Kind.DIGEST:
        return is_digest(value)
    return isinstance(value, str) and not isinstance(kind, Kind) and value in list(kind)
