"""Whether a chain of records is what the appliance wrote: findings, and what was looked at to find them.

Nothing here writes, needs the appliance, or believes what it reads. What an examiner has decides what they can say:

| they have | they learn that |
|---|---|
| the records | no record was edited, taken out, put in or moved by somebody who did not also rebuild all that follow |
| a signed head, and the device's public key from elsewhere | every record up to it is what it was when the head was signed |
| the initial key | every record has the MAC that only its own key makes; whoever took the machine later cannot have changed it |
| the ratchet, on the appliance itself | no record was cut off the end; with the initial key also: the ratchet was not exchanged |

**Detected**, with the finding's name: an edit (`digest`, `link`; rebuilt: `mac`, `head`), a record taken out, moved, repeated or
put in (`sequence`, `link`), a missing beginning (`beginning`), a tail cut (`cut`, against the ratchet or a head; `ratchet`, where
another key was put there), an older chain put back with its own ratchet (`cut`, `head`: against a later head). A wall clock
that was set shows as `clock`: that is reported and is no fault.

**Not detected**, and tested as such:

- An older state put back whole, records and ratchet, or a tail cut with the ratchet of that time, *not before the last head
  that was taken off the machine*. Nothing inside the folder can know what it once held. Take heads off often.
- Anything that whoever took the machine at record n says from n on: they hold its key.
- A rewriting by somebody who holds the initial key: until it is taken (`key_waits`), that is everyone who reads the folder.
- What was never recorded, and a clock that was wrong all along.
"""

from __future__ import annotations

import enum
import hmac
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from appliance.errors import BadRequest, DarkroomError, VerificationRefused
from appliance.evidence.chain import HEADS, INITIAL_KEY, LARGEST_RECORDS, MOST_HEADS, MOST_RECORDS, RATCHET, RECORDS
from appliance.evidence.heads import LARGEST_HEAD, Head
from appliance.evidence.ratchet import FILE_BYTES, Position, mac, next_key, stands_at, tip
from appliance.evidence.records import NOTHING_BEFORE, Event, Line, Record, parse_line
from appliance.evidence.signature import Signed, check
from appliance.trust.key import TrustedKey

FARTHEST: Final = 10_000_000        # turns of the ratchet that are made to reach a record: some ten seconds
MOST_FINDINGS: Final = 100
STEP: Final = 2000                  # milliseconds by which the wall clock may part from CLOCK_BOOTTIME between two records


class Fault(enum.StrEnum):
    """What can be found."""

    FORM = "form"               # a line that is no record
    SEQUENCE = "sequence"       # a number that is not the next one
    LINK = "link"               # a record that does not follow the one before it
    DIGEST = "digest"           # a record that is not what its digest says
    MAC = "mac"                 # a record that its key did not make
    BEGINNING = "beginning"     # earlier records are missing, and no record accounts for it
    CUT = "cut"                 # later records are missing
    RATCHET = "ratchet"         # the ratchet's key is not the one that belongs there
    HEAD = "head"               # a head says otherwise
    CLOCK = "clock"             # the wall clock was set
    KEY_WAITS = "key_waits"     # the initial key is still on the machine
    DROPPED = "dropped"         # the beginning was let go, as a record says


_NOT_WRONG: Final = frozenset({Fault.CLOCK, Fault.KEY_WAITS, Fault.DROPPED})


@dataclass(frozen=True)
class Finding:
    """One thing that was found, at a record's sequence number."""

    fault: Fault
    sequence: int
    said: str

    @property
    def wrong(self) -> bool:
        """Whether the chain is not what was written; the other findings are to be known, and no fault."""
        return self.fault not in _NOT_WRONG

    def __str__(self) -> str:
        return f"{'WRONG' if self.wrong else 'note'}  {self.fault}  record {self.sequence}: {self.said}"


@dataclass(frozen=True)
class Copy:
    """The bytes of a chain, from the appliance or from a medium; nothing in it is believed."""

    records: tuple[tuple[int, bytes], ...]      # first sequence number by name, content
    heads: tuple[Signed, ...] = ()
    ratchet: Position | None = None
    key_waits: bool = False

    @classmethod
    def read(cls, folder: Path) -> Copy:
        """Read a folder of records. Raises `BadRequest` when it has none, or more than a chain can have.

        A chain that is being written is read again until its ratchet stood still.
        """
        for _ in range(20):
            before = _ratchet(folder)
            copy = cls._read(folder, before)
            if _ratchet(folder) == before:
                return copy
        raise BadRequest("audit_busy", "the chain grew faster than it could be read", hint="try again")

    @classmethod
    def _read(cls, folder: Path, ratchet: bytes | None) -> Copy:
        try:
            names = sorted(entry.name for entry in os.scandir(folder))
        except OSError as error:
            raise BadRequest("audit_unreadable", f"{folder.name}: {os.strerror(error.errno or 0).lower()}") from None
        numbered = sorted((int(found[1]), name) for name in names if (found := RECORDS.fullmatch(name)))
        heads = [found[1] for name in names if (found := HEADS.fullmatch(name))]
        if not numbered:
            raise BadRequest("audit_none", f"{folder.name}: no files of records", hint="name the folder that holds records-…")
        if len(numbered) > 2 * MOST_RECORDS or len(heads) > 2 * MOST_HEADS:
            raise BadRequest("audit_large", f"{folder.name}: more files than a chain has")
        return cls(
            tuple((number, read_bounded(folder / name, 4 * LARGEST_RECORDS)) for number, name in numbered),
            tuple(
                Signed(*(read_bounded(folder / f"{name}{end}", LARGEST_HEAD) for end in (".json", ".sig"))) for name in heads
            ),
            None if ratchet is None else stands_at(ratchet),
            INITIAL_KEY in names,
        )

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """Give every line with its place; the record under way, which only the ratchet's slot holds, as the last."""
        last = b""
        for number, content in self.records:
            for index, line in enumerate(content.split(b"\n")):
                if line:
                    last = line
                    yield f"records-{number:012} line {index + 1}", line
        if self.ratchet is not None and self.ratchet.line[:-1] != last and self._under_way(last):
            yield "ratchet", self.ratchet.line[:-1]

    def _under_way(self, last: bytes) -> bool:
        """Say whether the ratchet's line is the one that comes next: it counts before the file has it."""
        try:
            pending = parse_line(self.ratchet.line[:-1] if self.ratchet else b"", "ratchet")
            return parse_line(last, "records").record.sequence + 1 == pending.record.sequence
        except VerificationRefused:
            return False


@dataclass
class Report:
    """What was found, and by what."""

    findings: list[Finding] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing wrong was found."""
        return not any(finding.wrong for finding in self.findings)

    def add(self, fault: Fault, sequence: int, said: str) -> None:
        """Note one finding; after a hundred no more are kept, and one that is wrong is always among them."""
        if len(self.findings) < MOST_FINDINGS or (self.good and fault not in _NOT_WRONG):
            self.findings.append(Finding(fault, sequence, said))


def examine(
    copy: Copy, *, initial_key: bytes | None = None, head: Head | None = None, device: TrustedKey | None = None
) -> Report:
    """Return what is wrong with a chain. `head` was taken off the machine earlier; its signature is the caller's to check."""
    report = Report()
    heads = [("the head", head)] if head is not None else []
    if device is not None:
        kept = list(_kept_heads(copy, report, device))
        heads += [("a kept head", one) for one in kept]
    keys = _Keys(initial_key, frozenset(one.sequence + 1 for _, one in heads))
    _walk(copy, report, keys)
    _beginning(report)
    _end(copy, report, keys)
    for name, one in heads:
        _against(one, report, keys, name)
    if head is not None:
        report.checked.append(f"everything up to record {head.sequence}, against the head")
    if device is not None:
        report.checked.append(f"{len(kept)} kept heads, signed by the device")
    if copy.key_waits:
        report.add(Fault.KEY_WAITS, 0, "the initial key is still on this machine: take it with darkroom audit key")
    return report


class _Keys:
    """The ratchet, turned forward from the initial key; behind where it stands, or too far ahead, it has no key.

    `tips` are those that the heads at hand should have: by the sequence number that the ratchet stood at.
    """

    def __init__(self, initial_key: bytes | None, wanted: frozenset[int]) -> None:
        self._sequence = 0
        self._key = initial_key
        self._wanted = wanted
        self.known = initial_key is not None
        self.tips: dict[int, str] = {}

    def at(self, sequence: int) -> bytes | None:
        if self._key is None or not 0 <= sequence - self._sequence <= FARTHEST:
            return None
        while self._sequence < sequence:
            self._key = next_key(self._key)
            self._sequence += 1
            if self._sequence in self._wanted:
                self.tips[self._sequence] = tip(self._key)
        return self._key


def _walk(copy: Copy, report: Report, keys: _Keys) -> None:
    before: Line | None = None
    expected: int | None = None
    for place, raw in copy.lines():
        try:
            line = parse_line(raw, place)
        except VerificationRefused as refusal:
            report.add(Fault.FORM, expected or 0, f"{place}: {refusal.fact}")
            before, expected = None, None if expected is None else expected + 1
            continue
        record = line.record
        if expected is not None and record.sequence != expected:
            report.add(Fault.SEQUENCE, record.sequence, f"{place}: follows record {expected - 1}")
        if before is not None and record.previous != before.digest:
            report.add(Fault.LINK, record.sequence, "does not follow the record that stands before it")
        if record.sequence == 0 and record.previous != NOTHING_BEFORE:
            report.add(Fault.LINK, 0, "the first record has one before it")
        if record.digest() != line.digest:
            report.add(Fault.DIGEST, record.sequence, "is not what its digest was made of")
        if keys.known:
            key = keys.at(record.sequence)
            if key is None or not hmac.compare_digest(mac(key, record.body()), line.mac):
                report.add(Fault.MAC, record.sequence, "was not made with its key")
        if before is not None:
            _clocks(before.record, record, report)
        report.lines.append(line)
        before, expected = line, record.sequence + 1
    report.checked.append(f"{len(report.lines)} records: form, order and digests")
    if keys.known:
        report.checked.append("every record's MAC, from the initial key")


def _clocks(before: Record, record: Record, report: Report) -> None:
    then, now = before.moment, record.moment
    wall, ran = now.time - then.time, now.boottime - then.boottime
    if then.boot != now.boot:
        if wall < 0:
            report.add(Fault.CLOCK, record.sequence, f"the wall clock is {-wall} ms behind the record before, after a new start")
    elif ran < 0:
        report.add(Fault.CLOCK, record.sequence, "the time since the machine's start went back")
    elif abs(wall - ran) > STEP:
        way = "forward" if wall > ran else "back"
        report.add(Fault.CLOCK, record.sequence, f"the wall clock was set {way} by {abs(wall - ran)} ms")


def _beginning(report: Report) -> None:
    first = report.lines[0].record.sequence if report.lines else 0
    if not first:
        return
    said = [line.record.fields["before"] for line in report.lines if line.record.event is Event.RECORDS_DROPPED]
    if any(isinstance(before, int) and before >= first for before in said):
        report.add(Fault.DROPPED, first, "earlier records were let go for want of room, as a record says")
    else:
        report.add(Fault.BEGINNING, first, "earlier records are missing, and no record says that they were let go")


def _end(copy: Copy, report: Report, keys: _Keys) -> None:
    if not report.lines:
        return
    last = report.lines[-1].record.sequence
    after = keys.at(last + 1)
    if copy.ratchet is None:
        return
    if copy.ratchet.sequence != last + 1:
        report.add(Fault.CUT, last, f"is the last one, and the ratchet stands after record {copy.ratchet.sequence - 1}")
    elif copy.ratchet.line != report.lines[-1].as_bytes():
        report.add(Fault.RATCHET, last, "is not the record that the ratchet was turned with")
    elif after is not None and not hmac.compare_digest(after, copy.ratchet.key):
        report.add(Fault.RATCHET, last, "the ratchet holds another key than the one that follows")
    report.checked.append("the end, against the ratchet")


def _against(head: Head, report: Report, keys: _Keys, name: str) -> None:
    known = {line.record.sequence: line.digest for line in report.lines}
    if not known:
        return
    if head.sequence > max(known):
        report.add(Fault.CUT, max(known), f"is the last one, and {name} was taken at record {head.sequence}")
    elif head.sequence < min(known):
        report.add(Fault.HEAD, head.sequence, f"{name} is about a record that was let go: take a later one")
    elif known.get(head.sequence) != head.digest:
        report.add(Fault.HEAD, head.sequence, f"is not the record of {name}: it was rewritten, or this is another chain")
    elif head.tip and keys.tips.get(head.sequence + 1, head.tip) != head.tip:
        report.add(Fault.HEAD, head.sequence, f"{name} was made without the chain's key")


def _kept_heads(copy: Copy, report: Report, device: TrustedKey) -> Iterator[Head]:
    first = min((number for number, _ in copy.records), default=0)
    for signed in copy.heads:
        try:
            check(signed, device, "a kept head")
            head = Head.parse(signed.content, "a kept head")
        except DarkroomError as refusal:
            report.add(Fault.HEAD, 0, str(refusal))
            continue
        if head.sequence >= first:      # older ones are about records that were let go
            yield head


def _ratchet(folder: Path) -> bytes | None:
    return read_bounded(folder / RATCHET, FILE_BYTES) if os.path.lexists(folder / RATCHET) else None


def read_bounded(path: Path, largest: int) -> bytes:
    """Read a regular file that is no link. Raises `BadRequest`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BadRequest("audit_unreadable", f"{path.name}: not a regular file")
            content = file.read(largest + 1)
    except OSError as error:
        raise BadRequest("audit_unreadable", f"{path.name}: {os.strerror(error.errno or 0).lower()}") from None
    if len(content) > largest:
        raise BadRequest("audit_unreadable", f"{path.name}: larger than {largest} bytes")
    return content
