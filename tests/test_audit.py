"""The audit chain: what each kind of tampering leaves to be found, what leaves nothing, and a kill at every write."""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import BadRequest, DarkroomError, VaultError, VerificationRefused
from appliance.evidence import audit, chain
from appliance.evidence.certificate import Act, Certificate, Item, Outcome, Technique, Verification, What, keep
from appliance.evidence.chain import AuditChain
from appliance.evidence.examine import MOST_FINDINGS, Copy, Fault, Report, examine
from appliance.evidence.heads import Head
from appliance.evidence.paper import GROUPS, from_groups, to_groups
from appliance.evidence.ratchet import SLOT_BYTES, Position, mac, next_key, pack, stands_at, tip, unpack
from appliance.evidence.records import FIELDS, NOTHING_BEFORE, Clock, Event, Kind, Line, Mode, Moment, Record, Trigger, parse_line
from appliance.evidence.signature import fingerprint, public_pem, sign
from appliance.trust.key import TrustedKey
from appliance.vault import state as state_module
from appliance.vault.state import State

ROOT = Path(__file__).parent.parent
BOOT = "ab" * 16


class Killed(BaseException):
    """The process was killed here."""


class Ticking:
    """A clock that goes on by one second with each look."""

    def __init__(self) -> None:
        self.moment = Moment(1_790_000_000_000, 5_000, BOOT)

    def __call__(self) -> Moment:
        self.moment = replace(self.moment, time=self.moment.time + 1000, boottime=self.moment.boottime + 1000)
        return self.moment


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of writes are synced here, which a busy disk makes minutes of."""
    with tempfile.TemporaryDirectory(prefix="darkroom-test-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


def write(folder: Path, count: int, clock: Callable[[], Moment] | None = None) -> None:
    """Append `count` records, each about another number of pictures."""
    with State.open(folder) as state:
        log = AuditChain.open(state, clock or Ticking())
        for number in range(count):
            log.append(Event.DELETED, pictures=number)
        log.close()


def initial_key(folder: Path) -> bytes:
    return (folder / "audit" / "initial-key").read_bytes()


def take_head(folder: Path) -> Head:
    with State.open(folder) as state:
        log = AuditChain.open(state, Ticking())
        signed = log.sign_head()
        log.close()
    return Head.parse(signed.content)


def device(folder: Path) -> TrustedKey:
    with State.open(folder) as state:
        return TrustedKey.of(state.device_key().public_key())


def lines(folder: Path) -> list[bytes]:
    return (folder / "audit" / "records-000000000000").read_bytes().splitlines(keepends=True)


def put(folder: Path, changed: list[bytes]) -> None:
    (folder / "audit" / "records-000000000000").write_bytes(b"".join(changed))


def faults(report: Report) -> set[Fault]:
    return {finding.fault for finding in report.findings if finding.wrong}


def refusal(act: Callable[[], object]) -> DarkroomError:
    with pytest.raises(DarkroomError) as caught:
        act()
    return caught.value


def edited(line: bytes, **fields: int) -> Record:
    record = parse_line(line[:-1], "here").record
    return replace(record, fields={**record.fields, **fields})


def rebuilt(record: Record, line: bytes) -> bytes:
    """Return the line of `record` as somebody without the key can make it: the digest right, the MAC the old one's."""
    return Line(record, record.digest(), parse_line(line[:-1], "here").mac).as_bytes()


# ── what is written ───────────────────────────────────────────────────────────


def test_a_chain_is_good_by_every_means_there_is(folder: Path) -> None:
    write(folder, 5)
    head = take_head(folder)
    report = examine(Copy.read(folder / "audit"), initial_key=initial_key(folder), head=head, device=device(folder))
    assert report.good
    assert [line.record.sequence for line in report.lines] == list(range(6))
    assert len(report.checked) == 5
    assert [finding.fault for finding in report.findings] == [Fault.KEY_WAITS]


def test_every_event_can_be_recorded_and_read_again(folder: Path) -> None:
    with State.open(folder) as state:
        log = AuditChain.open(state, Clock())
        made = []
        for event, fields in FIELDS.items():
            values: dict[str, int | str] = {
                name: 1 if kind is Kind.WHOLE else "cd" * 32 if isinstance(kind, Kind) else next(iter(kind)).value
                for name, kind in fields.items()
            }
            made.append(log.append(event, **values))
        log.close()
    assert set(FIELDS) == set(Event)
    assert [line.record for line in examine(Copy.read(folder / "audit")).lines][1:] == made


@pytest.mark.parametrize("fields", [
    {}, {"pictures": -1}, {"pictures": "a red fox"}, {"pictures": True}, {"pictures": 1.5}, {"pictures": 2**53}, {"pictures": 1, "note": 2},
])
def test_nothing_but_the_events_own_fields_can_be_said_and_a_refused_record_leaves_no_trace(folder: Path, fields: dict[str, int]) -> None:
    write(folder, 1)
    before = lines(folder)
    with State.open(folder) as state:
        log = AuditChain.open(state, Ticking())
        error = refusal(lambda: log.append(Event.DELETED, **fields))
        assert "fox" not in str(error)
        log.close()
    assert lines(folder) == before
    write(folder, 1)
    assert examine(Copy.read(folder / "audit"), initial_key=initial_key(folder)).good


@pytest.mark.parametrize("text", ["a red fox", "ab" * 31, "AB" * 32, "ab" * 32 + " "])
def test_a_digest_field_takes_no_text(text: str) -> None:
    refusal(lambda: Record(0, Event.STARTED, {"mode": "session", "configuration": text}, Moment(0, 0, BOOT), NOTHING_BEFORE))


def test_a_word_field_takes_only_its_own_words() -> None:
    for word in ("session ", "SESSION", "sigterm", ""):
        with pytest.raises(VerificationRefused):
            Record(0, Event.STARTED, {"mode": word, "configuration": "ab" * 32}, Moment(0, 0, BOOT), NOTHING_BEFORE)


def test_the_old_key_is_on_the_disk_no_longer_when_a_record_counts(folder: Path) -> None:
    with State.open(folder) as state:
        log = AuditChain.open(state, Ticking())
        key = initial_key(folder)
        (folder / "audit" / "initial-key").unlink()
        for number in range(4):
            key = next_key(key)
            held = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
            assert key in held          # the control: the key of the record to come is there
            log.append(Event.DELETED, pictures=number)
            held = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
            assert key not in held
        log.close()


def test_only_one_process_writes(folder: Path) -> None:
    with State.open(folder) as state, State.open(folder) as other:
        log = AuditChain.open(state, Ticking())
        assert refusal(lambda: AuditChain.open(other, Ticking())).reason == "state_busy"
        log.close()


def test_openssl_makes_the_same_macs_and_the_same_ratchet(folder: Path) -> None:
    write(folder, 2)

    def hkdf_expand(key: bytes, label: bytes) -> bytes:
        said = subprocess.run(
            ["openssl", "kdf", "-keylen", "32", "-binary", "-kdfopt", "digest:SHA256", "-kdfopt", "mode:EXPAND_ONLY",
             "-kdfopt", f"hexkey:{key.hex()}", "-kdfopt", f"hexinfo:{label.hex()}", "HKDF"], check=True, capture_output=True,
        )
        return said.stdout

    key = initial_key(folder)
    for line in lines(folder):
        body, digest, written = line[:-1].split(b" ")
        assert subprocess.run(["openssl", "dgst", "-sha256", "-r"], input=body, check=True, capture_output=True).stdout[:64] == digest
        said = subprocess.run(
            ["openssl", "dgst", "-sha256", "-r", "-mac", "HMAC", "-macopt", f"hexkey:{hkdf_expand(key, b'darkroom audit 1 mac').hex()}"],
            input=body, check=True, capture_output=True,
        )
        assert said.stdout[:64] == written
        assert tip(key) == hkdf_expand(key, b"darkroom audit 1 tip").hex()
        key = hkdf_expand(key, b"darkroom audit 1 next")


# ── what is found ─────────────────────────────────────────────────────────────


def test_an_edit_is_found_without_any_key(folder: Path) -> None:
    write(folder, 5)
    held = lines(folder)
    held[3] = held[3].replace(b'"pictures":2', b'"pictures":9')
    put(folder, held)
    assert faults(examine(Copy.read(folder / "audit"))) == {Fault.DIGEST}


def test_an_edit_with_its_digest_made_anew_is_found_by_the_next_record(folder: Path) -> None:
    write(folder, 5)
    held = lines(folder)
    held[3] = rebuilt(edited(held[3], pictures=9), held[3])
    put(folder, held)
    assert faults(examine(Copy.read(folder / "audit"))) == {Fault.LINK}


def test_a_chain_rebuilt_after_an_edit_is_found_by_the_initial_key_a_kept_head_and_an_exported_one(folder: Path) -> None:
    write(folder, 5)
    head, key = take_head(folder), device(folder)
    held = lines(folder)
    record = edited(held[3], pictures=9)
    for place in range(3, 6):
        held[place] = rebuilt(record, held[place])
        if place < 5:
            record = replace(parse_line(held[place + 1][:-1], "here").record, previous=record.digest())
    put(folder, held)
    (folder / "audit" / "ratchet").unlink()     # who rebuilds the records may as well take the witness away
    copy = Copy.read(folder / "audit")
    assert faults(examine(copy)) == set()       # without a key or a head nothing is found: the digests are right
    assert faults(examine(copy, initial_key=initial_key(folder))) == {Fault.MAC}
    assert faults(examine(copy, device=key)) == {Fault.HEAD}
    assert faults(examine(copy, head=head)) == {Fault.HEAD}


@pytest.mark.parametrize("change", ["delete", "reorder", "repeat", "insert", "garbage", "first"])
def test_records_taken_out_moved_repeated_or_put_in_are_found_without_any_key(folder: Path, change: str) -> None:
    write(folder, 5)
    held = lines(folder)
    match change:
        case "delete":
            del held[3]
        case "reorder":
            held[2], held[3] = held[3], held[2]
        case "repeat":
            held.insert(3, held[3])
        case "insert":
            held.insert(3, rebuilt(edited(held[2], pictures=77), held[2]))
        case "garbage":
            held.insert(3, b"a red fox\n")
        case "first":
            del held[0]
    put(folder, held)
    report = examine(Copy.read(folder / "audit"))
    assert faults(report) & {Fault.SEQUENCE, Fault.LINK, Fault.FORM, Fault.BEGINNING}
    assert "fox" not in " ".join(map(str, report.findings))
    assert faults(examine(Copy.read(folder / "audit"), initial_key=initial_key(folder)))


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_cut_tail_is_found_by_the_ratchet_and_by_a_head(folder: Path, cut: int) -> None:
    write(folder, 5)
    head = take_head(folder)
    put(folder, lines(folder)[:-cut])
    copy = Copy.read(folder / "audit")
    # One record that the file lacks and the slot holds is what a crash leaves: it is not lost, and so not cut.
    assert faults(examine(copy)) == (set() if cut == 1 else {Fault.CUT})
    off_the_machine = replace(copy, ratchet=None)
    assert faults(examine(off_the_machine, head=head)) == {Fault.CUT}
    assert faults(examine(off_the_machine)) == set()        # without ratchet and head a shorter chain is a good one


def test_a_cut_tail_with_an_invented_ratchet_is_found_by_the_initial_key(folder: Path) -> None:
    write(folder, 5)
    held = lines(folder)[:4]
    put(folder, held)
    stolen = stands_at((folder / "audit" / "ratchet").read_bytes())
    assert stolen is not None
    invented = Position(4, stolen.key, held[-1])        # who has the key of record 6 has not that of record 4
    (folder / "audit" / "ratchet").write_bytes(pack(invented) + bytes(SLOT_BYTES))
    copy = Copy.read(folder / "audit")
    assert faults(examine(copy)) == set()
    assert faults(examine(copy, initial_key=initial_key(folder))) == {Fault.RATCHET}
    head = take_head(folder)                            # the device signs it: it is the device's key that was taken
    assert faults(examine(replace(copy, ratchet=None), initial_key=initial_key(folder), head=head)) == {Fault.HEAD}


def test_an_older_state_put_back_whole_is_found_by_a_later_head_and_by_nothing_else(folder: Path, tmp_path: Path) -> None:
    write(folder, 3)
    early = take_head(folder)
    shutil.copytree(folder, tmp_path / "older")
    write(folder, 3)
    late = take_head(folder)
    key = initial_key(folder)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "older", folder)
    copy = Copy.read(folder / "audit")
    assert faults(examine(copy, initial_key=key, head=late, device=device(folder))) == {Fault.CUT}
    # Not detected: everything after the last head that was taken off the machine.
    assert faults(examine(copy, initial_key=key, head=early, device=device(folder))) == set()
    write(folder, 4, Clock())
    copy = Copy.read(folder / "audit")
    assert faults(examine(copy, initial_key=key, head=late)) == {Fault.HEAD}
    assert faults(examine(copy, initial_key=key, head=early)) == set()


def test_who_holds_the_present_key_goes_on_unseen_and_changes_nothing_before(folder: Path) -> None:
    write(folder, 3)
    key = initial_key(folder)
    stolen = stands_at((folder / "audit" / "ratchet").read_bytes())
    assert stolen is not None
    assert stolen.sequence == 4
    last = parse_line(lines(folder)[-1][:-1], "here")
    forged = Record(4, Event.DELETED, {"pictures": 0}, last.record.moment, last.digest)
    put(folder, [*lines(folder), Line(forged, forged.digest(), mac(stolen.key, forged.body())).as_bytes()])
    copy = replace(Copy.read(folder / "audit"), ratchet=None)
    assert faults(examine(copy, initial_key=key)) == set()      # not detected: it is what the device could have said
    before = edited(lines(folder)[3], pictures=9)
    put(folder, [*lines(folder)[:3], Line(before, before.digest(), mac(stolen.key, before.body())).as_bytes()])
    assert faults(examine(replace(Copy.read(folder / "audit"), ratchet=None), initial_key=key)) == {Fault.MAC}


def test_a_rewriting_by_a_holder_of_the_initial_key_is_found_by_a_head_alone(folder: Path) -> None:
    write(folder, 3)
    head, key = take_head(folder), initial_key(folder)
    forged, previous, turning = [], NOTHING_BEFORE, key
    for line in lines(folder):
        record = replace(parse_line(line[:-1], "here").record, previous=previous)
        record = replace(record, fields={"pictures": 0}) if record.event is Event.DELETED else record
        forged.append(Line(record, record.digest(), mac(turning, record.body())).as_bytes())
        previous, turning = record.digest(), next_key(turning)
    put(folder, forged)
    (folder / "audit" / "ratchet").write_bytes(pack(Position(4, turning, forged[-1])) + bytes(SLOT_BYTES))
    copy = replace(Copy.read(folder / "audit"), heads=())
    assert faults(examine(copy, initial_key=key)) == set()
    assert faults(examine(copy, initial_key=key, head=head)) == {Fault.HEAD}


def test_a_foreign_initial_key_makes_every_mac_wrong(folder: Path) -> None:
    write(folder, 3)
    report = examine(Copy.read(folder / "audit"), initial_key=bytes(32))
    assert [finding.sequence for finding in report.findings if finding.fault is Fault.MAC] == [0, 1, 2, 3]


def test_a_kept_head_that_another_device_signed_is_found(folder: Path) -> None:
    write(folder, 2)
    take_head(folder)
    stranger = TrustedKey.of(ec.generate_private_key(ec.SECP256R1()).public_key())
    assert faults(examine(Copy.read(folder / "audit"), device=stranger)) == {Fault.HEAD}


@pytest.mark.parametrize(("by", "reported"), [(3_600_000, "forward"), (-3_600_000, "back"), (1_900, ""), (-1_900, "")])
def test_a_step_of_the_wall_clock_is_reported_and_is_no_fault(folder: Path, by: int, reported: str) -> None:
    clock = Ticking()
    with State.open(folder) as state:
        log = AuditChain.open(state, clock)
        log.append(Event.DELETED, pictures=1)
        clock.moment = replace(clock.moment, time=clock.moment.time + by)
        log.append(Event.DELETED, pictures=2)
        log.close()
    report = examine(Copy.read(folder / "audit"))
    assert report.good
    said = [str(finding) for finding in report.findings if finding.fault is Fault.CLOCK]
    assert said == ([f"note  clock  record 2: the wall clock was set {reported} by {abs(by)} ms"] if reported else [])


def test_a_wall_clock_that_went_back_over_a_new_start_is_reported(folder: Path) -> None:
    write(folder, 1)
    clock = Ticking()
    clock.moment = Moment(1_700_000_000_000, 10, "cd" * 16)
    write(folder, 1, clock)
    assert [finding.sequence for finding in examine(Copy.read(folder / "audit")).findings if finding.fault is Fault.CLOCK] == [2]


def test_every_flipped_bit_of_the_records_is_found(folder: Path) -> None:
    write(folder, 2)
    copy, key = Copy.read(folder / "audit"), initial_key(folder)
    content = copy.records[0][1]
    for index in range(len(content)):
        changed = bytearray(content)
        changed[index] ^= 1 << index % 8
        report = examine(replace(copy, records=((0, bytes(changed)),)), initial_key=key)
        assert not report.good, index


def test_findings_are_bounded_and_one_that_is_wrong_is_never_crowded_out() -> None:
    report = Report()
    for number in range(3 * MOST_FINDINGS):
        report.add(Fault.CLOCK, number, "a step")
    report.add(Fault.MAC, 1, "wrong")
    assert len(report.findings) == MOST_FINDINGS + 1
    assert not report.good


# ── crashes ───────────────────────────────────────────────────────────────────


def interrupted(patch: pytest.MonkeyPatch, at: int, failure: BaseException) -> Callable[[], int]:
    """Let the `at`-th of the calls that change the disk raise, a write after half of it; return how many there were."""
    seen = 0
    for name in ("open", "write", "fsync", "fdatasync", "ftruncate", "rename", "unlink"):
        real = getattr(os, name)

        def call(*arguments: object, _real: Callable[..., object] = real, _name: str = name, **named: object) -> object:
            nonlocal seen
            seen += 1
            if seen == at:
                if _name == "write":
                    data = bytes(arguments[1])      # type: ignore[call-overload]
                    _real(arguments[0], data[: len(data) // 2])
                raise failure
            return _real(*arguments, **named)

        patch.setattr(os, name, call)
    return lambda: seen


@pytest.mark.parametrize("failure", [Killed(), OSError(28, "no space"), OSError(5, "i/o")], ids=["killed", "full", "error"])
@pytest.mark.parametrize("begun", [False, True], ids=["at the beginning", "later"])
def test_a_chain_cut_short_at_any_write_opens_verifies_and_lost_at_most_the_record_under_way(
    tmp_path: Path, failure: BaseException, begun: bool
) -> None:
    at, points = 0, 0
    while True:
        at += 1
        folder = tmp_path / f"state-{at}"
        State.open(folder).close()
        if begun:
            write(folder, 2)
        acknowledged = 3 if begun else 0
        with State.open(folder) as state:
            state.device_key()
            log = None
            with pytest.MonkeyPatch.context() as patch:
                count = interrupted(patch, at, failure)
                try:
                    log = AuditChain.open(state, Ticking())
                    acknowledged = log.sequence + 1
                    for number in range(2):
                        log.append(Event.DELETED, pictures=70 + number)
                        acknowledged += 1
                except (Killed, VaultError):
                    points += 1
            if log is not None and not isinstance(failure, Killed):
                log.append(Event.DELETED, pictures=99)      # an error is over: the same chain goes on
                acknowledged += 1
            if log is not None:
                log.close()
        if count() < at:
            break
        # More than was acknowledged may be there: a record counts in the slot, before `append` returns.
        write(folder, 1)
        report = examine(Copy.read(folder / "audit"), initial_key=initial_key(folder))
        assert report.good, (at, report.findings)
        assert acknowledged < len(report.lines) <= acknowledged + 3
        shutil.rmtree(folder)
    assert points > 15, points


def test_every_old_and_new_pair_of_files_opens_and_verifies_with_the_last_line_cut_at_every_byte(folder: Path, tmp_path: Path) -> None:
    write(folder, 2)
    names = ("ratchet", "records-000000000000")
    old = {name: (folder / "audit" / name).read_bytes() for name in names}
    write(folder, 1)
    new = {name: (folder / "audit" / name).read_bytes() for name in names}
    both = new["ratchet"][:SLOT_BYTES] + old["ratchet"][SLOT_BYTES:]        # before the old slot is overwritten
    assert unpack(both[:SLOT_BYTES])
    assert unpack(both[SLOT_BYTES:])
    key = initial_key(folder)
    tail = new[names[1]][len(old[names[1]]):]
    for position in (new["ratchet"], both):
        for length in range(len(tail) + 1):
            (folder / "audit" / names[0]).write_bytes(position)
            (folder / "audit" / names[1]).write_bytes(old[names[1]] + tail[:length])
            with State.open(folder) as state:
                AuditChain.open(state, Ticking()).close()
            report = examine(Copy.read(folder / "audit"), initial_key=key)
            assert report.good
            assert lines(folder) == new[names[1]].splitlines(keepends=True)       # nothing is lost
            assert (folder / "audit" / names[0]).read_bytes() == new["ratchet"]     # and the old key is gone
    # Old ratchet, old records: the record under way is lost, and nothing else.
    for name in names:
        (folder / "audit" / name).write_bytes(old[name])
    with State.open(folder) as state:
        AuditChain.open(state, Ticking()).close()
    assert examine(Copy.read(folder / "audit"), initial_key=key).good
    # Old ratchet, new records: no order of writes leaves that, so it is not mended.
    (folder / "audit" / names[1]).write_bytes(new[names[1]])
    with State.open(folder) as state:
        assert refusal(lambda: AuditChain.open(state, Ticking())).reason == "audit_damaged"
    assert (folder / "audit" / names[1]).read_bytes() == new[names[1]]


def test_a_slot_torn_at_any_byte_is_no_slot() -> None:
    slot = pack(Position(5, bytes(range(32)), b"line\n"))
    assert unpack(slot) == Position(5, bytes(range(32)), b"line\n")
    for length in range(len(slot)):
        torn = slot[:length] + bytes(SLOT_BYTES - length)
        assert unpack(torn) is None or torn == slot
    for length in range(1, 2200):
        assert unpack(bytes(length) + slot[length:]) is None
    assert stands_at(slot + slot) == unpack(slot)       # the fifth belongs in the second slot; in the first it is nobody's


@pytest.mark.parametrize("damage", ["ratchet", "ratchet gone", "records gone", "two cut", "other tail", "more", "other line before"])
def test_what_no_crash_leaves_is_refused_with_a_hint_and_left_as_it_is(folder: Path, damage: str) -> None:
    write(folder, 5)
    path = folder / "audit" / "records-000000000000"
    held = lines(folder)
    match damage:
        case "ratchet":
            (folder / "audit" / "ratchet").write_bytes(bytes(2 * SLOT_BYTES))
        case "ratchet gone":
            (folder / "audit" / "ratchet").unlink()
        case "records gone":
            path.unlink()
        case "two cut":
            put(folder, held[:-2])
        case "other tail":
            put(folder, [*held[:-1], rebuilt(edited(held[-1], pictures=9), held[-1])])
        case "more":
            put(folder, [*held, b"x"])
        case "other line before":
            put(folder, [*held[:-2], b"a red fox\n"])
    before = {name.name: name.read_bytes() for name in (folder / "audit").iterdir()}
    with State.open(folder) as state:
        error = refusal(lambda: AuditChain.open(state, Ticking()))
    assert error.reason == "audit_damaged"
    assert "auditor" in str(error.hint)
    assert {name.name: name.read_bytes() for name in (folder / "audit").iterdir()} == before


# ── room ──────────────────────────────────────────────────────────────────────


def test_the_chain_goes_on_in_new_files_and_lets_the_oldest_go_with_a_record_that_says_so(folder: Path) -> None:
    with State.open(folder) as state:
        log = AuditChain.open(state, Ticking(), largest=8192, most=3)
        for number in range(120):
            log.append(Event.DELETED, pictures=number)
        log.sign_head()
        log.close()
    names = sorted(name.name for name in (folder / "audit").glob("records-*"))
    assert len(names) == 3
    assert all((folder / "audit" / name).stat().st_size <= 8192 for name in names)
    copy, key = Copy.read(folder / "audit"), initial_key(folder)
    report = examine(copy, initial_key=key, device=device(folder))
    assert report.good
    assert Fault.DROPPED in {finding.fault for finding in report.findings}
    # A file more than the record accounts for is missing: found, with and without the key.
    shorter = replace(copy, records=copy.records[1:])
    assert faults(examine(shorter)) == {Fault.BEGINNING}
    assert faults(examine(replace(copy, records=(copy.records[0], copy.records[2])))) >= {Fault.SEQUENCE, Fault.LINK}


def test_a_kill_between_saying_that_records_go_and_letting_them_go_is_made_good(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with State.open(folder) as state:
        log = AuditChain.open(state, Ticking(), largest=8192, most=2)

        def kill(*_: object) -> None:
            raise Killed

        def fill() -> None:
            for number in range(100):
                log.append(Event.DELETED, pictures=number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state_module.Folder, "remove", kill)
            with pytest.raises(Killed):
                fill()
        log.close()
    assert len(list((folder / "audit").glob("records-*"))) == 3
    with State.open(folder) as state:
        AuditChain.open(state, Ticking(), largest=8192, most=2).close()
    assert len(list((folder / "audit").glob("records-*"))) == 2
    assert examine(Copy.read(folder / "audit"), initial_key=initial_key(folder)).good


def test_only_the_newest_heads_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "MOST_HEADS", 3)
    with State.open(folder) as state:
        log = AuditChain.open(state, Ticking())
        for number in range(5):
            log.append(Event.DELETED, pictures=number)
            log.sign_head()
        log.close()
    assert sorted(path.name for path in (folder / "audit").glob("head-*")) == [
        f"head-{number:012}.{end}" for number in (3, 4, 5) for end in ("json", "sig")
    ]


# ── the initial key, and paper ────────────────────────────────────────────────


def test_the_initial_key_goes_when_it_was_typed_back_and_not_before(folder: Path) -> None:
    write(folder, 1)
    key = initial_key(folder)
    with State.open(folder) as state:
        log = AuditChain.open(state, Ticking())
        assert refusal(lambda: log.forget_initial_key(bytes(32))).reason == "initial_key_other"
        assert initial_key(folder) == key
        log.forget_initial_key(key)
        assert refusal(lambda: log.forget_initial_key(key)).reason == "initial_key_gone"
        log.close()
    assert all(key not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    report = examine(Copy.read(folder / "audit"), initial_key=key)
    assert report.good
    assert Fault.KEY_WAITS not in {finding.fault for finding in report.findings}
    assert report.lines[-1].record.event is Event.KEY_TAKEN


def test_an_initial_key_half_overwritten_by_a_crash_is_taken_away_at_the_next_start(folder: Path) -> None:
    write(folder, 1)
    (folder / "audit" / "initial-key").write_bytes(bytes(32))
    write(folder, 1)
    assert not (folder / "audit" / "initial-key").exists()


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_groups_are_read_as_what_they_were_printed_from(value: bytes) -> None:
    printed = to_groups(value)
    assert from_groups(printed, "it") == value
    assert from_groups(printed.lower().replace("0", "o").replace("1", "l").replace(" ", "-"), "it") == value
    assert [len(group) for group in printed.split()] == [5] * GROUPS


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 5 * GROUPS - 1), st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZ*~$=U!"))
def test_any_one_wrong_character_is_found_and_its_group_named(value: bytes, place: int, wrong: str) -> None:
    typed = list("".join(to_groups(value).split()))
    if typed[place] == wrong:
        return
    typed[place] = wrong
    error = refusal(lambda: from_groups("".join(typed), "the key"))
    assert f"group {place // 5 + 1} " in str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(0, GROUPS - 1), st.integers(0, 3), st.integers(0, GROUPS - 1))
def test_neighbours_and_groups_that_changed_places_are_found(value: bytes, group: int, place: int, other: int) -> None:
    groups = to_groups(value).split()
    moved = groups[group]
    swapped = moved[:place] + moved[place + 1] + moved[place] + moved[place + 2 :]
    if swapped != moved:
        refusal(lambda: from_groups(" ".join([*groups[:group], swapped, *groups[group + 1 :]]), "the key"))
    if groups[group][:4] != groups[other][:4]:
        exchanged = list(groups)
        exchanged[group], exchanged[other] = groups[other], groups[group]
        refusal(lambda: from_groups(" ".join(exchanged), "the key"))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80) | st.text(alphabet="0123456789ABCDEFGHJKMNPQRSTVWXYZ -", min_size=60, max_size=90))
def test_whatever_is_typed_is_read_or_refused_without_being_quoted(typed: str) -> None:
    with pytest.raises(BadRequest) as caught:
        from_groups(typed, "it")
    assert len(typed) < 6 or typed not in str(caught.value)


# ── parsers ───────────────────────────────────────────────────────────────────


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.builds(lambda body: body + b" " + b"a" * 64 + b" " + b"b" * 64, st.binary(max_size=200)))
def test_what_is_no_line_is_refused_and_breaks_nothing(untrusted: bytes) -> None:
    with pytest.raises(VerificationRefused):
        parse_line(untrusted, "here")


moments = st.builds(
    Moment, st.integers(0, 2**53 - 1), st.integers(0, 2**53 - 1), st.binary(min_size=16, max_size=16).map(bytes.hex)
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    event = draw(st.sampled_from(list(Event)))
    digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
    fields: dict[str, int | str] = {}
    for name, kind in FIELDS[event].items():
        if kind is Kind.WHOLE:
            fields[name] = draw(st.integers(0, 2**53 - 1))
        else:
            fields[name] = draw(digests if isinstance(kind, Kind) else st.sampled_from([word.value for word in kind]))
    return Record(draw(st.integers(0, 2**53 - 1)), event, fields, draw(moments), draw(digests))


@settings(max_examples=200, deadline=None)
@given(records())
def test_every_record_that_can_be_made_is_read_as_itself(record: Record) -> None:
    line = Line(record, record.digest(), "ab" * 32)
    assert parse_line(line.as_bytes()[:-1], "here") == line
    assert len(line.as_bytes()) < 1024
    assert record.moment.as_text().endswith(" UTC")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**53), st.binary(max_size=200)), max_size=4), st.binary(min_size=32, max_size=32))
def test_examining_anything_ends_in_a_report(files: list[tuple[int, bytes]], key: bytes) -> None:
    examine(Copy(tuple(files)), initial_key=key, head=Head(3, "ab" * 32, "", "", None))


def test_a_record_from_the_far_future_costs_no_endless_ratchet() -> None:
    record = Record(2**53 - 1, Event.KEY_TAKEN, {}, Moment(0, 0, BOOT), NOTHING_BEFORE)
    copy = Copy(((0, Line(record, record.digest(), "ab" * 32).as_bytes()),))
    assert Fault.MAC in faults(examine(copy, initial_key=bytes(32)))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_what_is_no_head_is_refused(untrusted: bytes) -> None:
    with pytest.raises(VerificationRefused):
        Head.parse(untrusted)


def test_a_head_is_read_again_from_its_file_and_from_paper(folder: Path) -> None:
    write(folder, 3)
    head = take_head(folder)
    assert Head.parse(head.as_bytes()) == head
    paper = Head.from_paper(head.as_paper())
    assert (paper.sequence, paper.digest) == (head.sequence, head.digest)
    for wrong in ("", "x\n" + head.as_paper(), head.as_paper()[:-3], "-1\n" + to_groups(bytes(32))):
        with pytest.raises(BadRequest):
            Head.from_paper(wrong)


@pytest.mark.parametrize("trap", ["empty", "missing", "symlink", "large"])
def test_a_copy_that_is_none_is_refused(tmp_path: Path, trap: str) -> None:
    folder = tmp_path / "copy"
    if trap != "missing":
        folder.mkdir()
    if trap == "symlink":
        (tmp_path / "other").write_bytes(b"")
        (folder / "records-000000000000").symlink_to(tmp_path / "other")
    if trap == "large":
        (folder / "records-000000000000").write_bytes(b"")
        os.truncate(folder / "records-000000000000", 100 << 20)
    assert isinstance(refusal(lambda: Copy.read(folder)), BadRequest)


# ── the command, and the auditor's walk ───────────────────────────────────────


def run(*arguments: str) -> list[str]:
    parser = argparse.ArgumentParser()
    audit.add_options(parser)
    return list(audit.answer(parser.parse_args(arguments)))


def test_verify_says_what_is_wrong_line_by_line_and_then_refuses(folder: Path) -> None:
    write(folder, 3)
    assert run("verify", "--state", str(folder))[-1] == "nothing wrong was found"
    held = lines(folder)
    held[1] = held[1].replace(b'"pictures":0', b'"pictures":5')
    put(folder, held)
    parser = argparse.ArgumentParser()
    audit.add_options(parser)
    said: list[str] = []
    with pytest.raises(VerificationRefused) as caught:
        said.extend(audit.answer(parser.parse_args(["verify", "--state", str(folder)])))
    assert caught.value.exit_code == 3
    assert "WRONG  digest  record 1: is not what its digest was made of" in said


def test_show_prints_every_record_with_its_event_and_its_time(folder: Path) -> None:
    write(folder, 2)
    said = run("show", "--state", str(folder))
    assert re.fullmatch(r" +2  2026-09-21 \d\d:\d\d:\d\d\.\d{3} UTC  deleted  pictures 1", said[2])
    assert '"event": "deleted"' in run("show", "--json", "--state", str(folder))[1]


@pytest.mark.parametrize("arguments", [("show",), ("verify",), ("head",), ("key",)])
def test_a_folder_without_a_chain_is_said_so_and_nothing_is_made(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert refusal(lambda: run(*arguments, "--state", str(tmp_path / "none"))).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_head_without_the_device_key_and_two_heads_at_once_are_refused(folder: Path) -> None:
    write(folder, 1)
    assert refusal(lambda: run("verify", "--state", str(folder), "--head", "head.json")).reason == "device"
    assert refusal(lambda: run("verify", "--state", str(folder), "--head", "head.json", "--paper", "x")).reason == "head"


def test_a_key_that_was_mistyped_is_not_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, 1)
    key = initial_key(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(to_groups(key)[:-1] + "!"))
    error = refusal(lambda: run("key", "--forget", "--state", str(folder)))
    assert "group 13" in str(error)
    assert initial_key(folder) == key


def test_a_running_appliance_is_read_and_its_key_is_not_taken_behind_its_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with State.open(folder) as state:
        log = AuditChain.open(state, Ticking())
        assert run("verify", "--state", str(folder))[-1] == "nothing wrong was found"
        assert run("head", "--state", str(folder))[0] == "0"
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(run("key", "--state", str(folder)))))
        assert refusal(lambda: run("key", "--forget", "--state", str(folder))).reason == "state_busy"
        log.close()


SHIM = """#!/bin/sh
shift       # audit
exec {python} -c '
import argparse, sys
from appliance.errors import DarkroomError
from appliance.evidence import audit
parser = argparse.ArgumentParser()
audit.add_options(parser)
try:
    for line in audit.answer(parser.parse_args()):
        print(line)
except DarkroomError as error:
    print(error, error.hint, file=sys.stderr)
    sys.exit(error.exit_code)
' "$@"
"""


def commands() -> list[str]:
    """Return what docs/audit.md tells to type, block by block."""
    return re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "audit.md").read_text(encoding="utf-8"), re.DOTALL)


def an_erase(folder: Path) -> None:
    """Record an erase as the supervisor does: the record, the certificate about it, the certificate's digest, a signed head."""
    with State.open(folder) as state:
        key = state.device_key()
        log = AuditChain.open(state, Clock())
        log.append(Event.STARTED, mode=Mode.SESSION, configuration="ab" * 32)
        record = log.append(Event.ERASED, mode=Mode.SESSION, trigger=Trigger.WIPE_COMMAND, milliseconds=41, incomplete=0)
        gone = Item(What.VOLUME_KEY, (Technique.CRYPTOGRAPHIC_ERASE,), (Verification.REAPED,), Outcome.ERASED)
        certificate = Certificate(
            Act.ERASE, Mode.SESSION, Trigger.WIPE_COMMAND, (gone,), 41, record.moment, record.sequence, record.digest(), fingerprint(key), "0.1.0",
        )
        signed = sign(certificate.as_bytes(), key)
        keep(state.certificates, certificate, signed)
        log.append(Event.CERTIFIED, certificate=signed.digest, record=record.sequence)
        log.sign_head()
        log.close()


def walk(folder: Path, here: Path, blocks: list[str]) -> subprocess.CompletedProcess[str]:
    tools = here / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "darkroom").write_text(SHIM.format(python=sys.executable), encoding="utf-8")
    (tools / "darkroom").chmod(0o755)
    return subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(blocks)], cwd=here, check=False, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "STATE": str(folder), "PYTHONPATH": str(ROOT)},
    )


def test_the_auditors_walk_runs_as_written_and_finds_a_changed_certificate_and_a_changed_record(folder: Path, tmp_path: Path) -> None:
    blocks = commands()
    assert len(blocks) == 11
    an_erase(folder)
    done = walk(folder, tmp_path, blocks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Verified OK") == 2
    assert done.stdout.count("nothing wrong was found") == 3
    assert "every record's MAC, from the initial key" in done.stdout
    assert re.search(r"^Complete: +yes$", done.stdout, re.MULTILINE)
    assert not (folder / "audit" / "initial-key").exists()

    certificate = next((tmp_path / "copy").glob("certificate-*.json"))
    good = certificate.read_bytes()
    certificate.write_bytes(good.replace(b":41,", b":40,"))
    assert walk(folder, tmp_path, blocks[8:9]).returncode != 0
    certificate.write_bytes(good)
    assert walk(folder, tmp_path, blocks[8:9]).returncode == 0

    copied = tmp_path / "copy" / "records-000000000000"
    copied.write_bytes(copied.read_bytes().replace(b'"milliseconds":41', b'"milliseconds":40'))
    changed = walk(folder, tmp_path, blocks[5:6])
    assert changed.returncode == 3
    assert "WRONG  digest" in changed.stdout


def test_a_head_is_verified_by_openssl_alone(folder: Path, tmp_path: Path) -> None:
    an_erase(folder)
    with State.open(folder) as state:
        (tmp_path / "key.pem").write_bytes(public_pem(state.device_key()))
    content = next((folder / "audit").glob("head-*.json"))
    command = ["openssl", "dgst", "-sha256", "-verify", str(tmp_path / "key.pem"), "-signature", str(content.with_suffix(".sig")), str(content)]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"Verified OK\n"
    content.write_bytes(content.read_bytes().replace(b'"sequence":3', b'"sequence":2'))
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0
