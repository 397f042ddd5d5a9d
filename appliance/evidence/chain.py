"""The append-only chain of records, as the supervisor writes it.

    state/audit/
    ├── ratchet                 the key of the record to come (`ratchet.py`)
    ├── initial-key             A₀, until an auditor has written it down; then overwritten and gone
    ├── records-000000000000    lines of records (`records.py`); the name is the first one's sequence number
    ├── records-000000003214    the chain goes on here: nothing but its name is new
    └── head-000000003300.json  a signed head, with its .sig beside it, at every start and close

Each record holds the digest of the one before it and has a MAC under a key of its own, which the disk holds no longer when the
record counts. How that is checked, and what nobody can detect, is in `examine.py`.

Rules, in order:

1. One process writes: the folder is locked while a chain is open.
2. A record counts when `append` returns. Killed or out of room anywhere in it, the chain is then whole without the record or with
   it, and opens: the ratchet's slot holds the line that the file may lack.
3. Records and ratchet that do not fit together by one record are no crash: the chain is refused, and nothing is mended.
4. Files are bounded in size and number. Before the oldest is let go, a record says so; so a missing beginning is accounted for.
5. The initial key is who-can-rewrite-everything. It waits on the disk only until an auditor has typed it back, and until then
   the chain protects against nobody who reads the folder; `audit show` says so.

>>> with State.open(folder) as state:                           # doctest: +SKIP
...     chain = AuditChain.open(state, Clock())
...     chain.append(Event.STARTED, mode=Mode.SESSION, configuration=digest)
...     chain.sign_head()
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Callable
from typing import Final

from appliance.errors import BadRequest, VaultError, VerificationRefused
from appliance.evidence.heads import Head
from appliance.evidence.ratchet import FILE_BYTES, KEY_BYTES, Position, Ratchet, fresh, mac, tip
from appliance.evidence.records import LONGEST_LINE, NOTHING_BEFORE, Event, Line, Moment, Record, parse_line
from appliance.evidence.signature import Signed, fingerprint, sign
from appliance.vault.state import Folder, State, write_all

RATCHET: Final = "ratchet"
INITIAL_KEY: Final = "initial-key"
RECORDS: Final = re.compile(r"records-(\d{12,16})")
HEADS: Final = re.compile(r"(head-\d{12,16})\.json")
LARGEST_RECORDS: Final = 1 << 20    # bytes in one file of records, some 2,500 of them
MOST_RECORDS: Final = 64            # files
MOST_HEADS: Final = 64

_HINT = "keep the state folder for your auditor, then move its audit folder away; a new chain begins"


class AuditChain:
    """A chain that can be appended to. Make it with `open`."""

    def __init__(
        self, state: State, clock: Callable[[], Moment], *, largest: int = LARGEST_RECORDS, most: int = MOST_RECORDS
    ) -> None:
        """Take a state whose audit folder is locked; `open` does all of it."""
        if largest < 4 * LONGEST_LINE or most < 2:
            raise ValueError("a file of records that holds none, or none to keep")
        self._state = state
        self._folder: Folder = state.audit
        self._clock = clock
        self._largest = largest     # bytes of one file
        self._most = most           # files
        self._ratchet: Ratchet | None = None

    @classmethod
    def open(
        cls, state: State, clock: Callable[[], Moment], *, largest: int = LARGEST_RECORDS, most: int = MOST_RECORDS
    ) -> AuditChain:
        """Open the state's chain, mend what a crash left, and begin one where there is none.

        Raises `VaultError` when another process writes, or when records and ratchet do not belong together.
        """
        state.audit.lock()
        chain = cls(state, clock, largest=largest, most=most)
        chain._settle()
        if chain._position.sequence == 0:
            chain.append(Event.CHAIN_BEGUN, device=fingerprint(state.device_key()))
        chain._let_go()
        if initial_key(state.audit) is None:
            state.audit.destroy(INITIAL_KEY)    # the zeros that a crash left
        return chain

    @property
    def sequence(self) -> int:
        """The number of the last record."""
        return self._position.sequence - 1

    def append(self, event: Event, **fields: int | str) -> Record:
        """Record one event and return the record, which then is on the disk and cannot be made again.

        Raises `VerificationRefused` for fields that the event has not, and `VaultError` when the disk refuses: the record is
        then in the chain or not, and the next call finds out.
        """
        made: list[Record] = []

        def line(position: Position) -> bytes:
            record = Record(position.sequence, event, fields, self._clock(), _digest_of(position.line))
            made.append(record)
            return Line(record, record.digest(), mac(position.key, record.body())).as_bytes()

        try:
            self._settle()
            ratchet = self._ratchet
            assert ratchet is not None      # noqa: S101     # _settle has just opened it
            ratchet.turn(line)
            self._extend(ratchet.position.line)
        except OSError as error:
            self._unsettle()
            raise VaultError(
                "audit_unwritten", f"audit: a record could not be written ({os.strerror(error.errno or 0).lower()})",
                hint="make room on the state folder's file system",
            ) from None
        except VerificationRefused:
            raise
        except BaseException:
            self._unsettle()
            raise
        if event is not Event.RECORDS_DROPPED:
            self._let_go()
        return made[-1]

    def head(self) -> Signed:
        """Return the head of now, signed with the device's key."""
        key = self._state.device_key()
        return sign(head_at(self._position, self._clock(), fingerprint(key)).as_bytes(), key)

    def sign_head(self) -> Signed:
        """Keep the head of now beside the records, and return it. At every start and close; old ones make room."""
        signed = self.head()
        name = f"head-{self.sequence:012}"
        self._folder.write(f"{name}.sig", signed.signature)     # first: a head that is there has its signature
        self._folder.write(f"{name}.json", signed.content)
        kept = sorted((found[1] for each in self._folder.names() if (found := HEADS.fullmatch(each))), key=_number)
        for old in kept[:-MOST_HEADS]:
            self._folder.remove(f"{old}.json")
            self._folder.remove(f"{old}.sig")
        return signed

    def forget_initial_key(self, typed: bytes) -> None:
        """Overwrite and remove the initial key, once somebody has shown that they hold it.

        Raises `BadRequest` when what was typed is another key, or when the key is gone already.
        """
        held = initial_key(self._folder)
        if held is None:
            raise BadRequest("initial_key_gone", "the initial key was taken before, and is on this machine no longer")
        if not hmac.compare_digest(held, typed):
            raise BadRequest("initial_key_other", "that is not this chain's initial key", hint="compare it with what was printed")
        self.append(Event.KEY_TAKEN)
        self._folder.destroy(INITIAL_KEY)

    def close(self) -> None:
        """Give the descriptor of the ratchet back; the lock ends with the state."""
        self._unsettle()

    @property
    def _position(self) -> Position:
        self._settle()
        if self._ratchet is None:
            raise VaultError("audit_damaged", "audit/ratchet: missing", hint=_HINT)
        return self._ratchet.position

    def _unsettle(self) -> None:
        if self._ratchet is not None:
            self._ratchet.close()
            self._ratchet = None

    def _settle(self) -> None:
        """Open the ratchet, unless it is open, and make the last file end where the ratchet says that it ends."""
        if self._ratchet is not None:
            return
        descriptor = self._folder.open(RATCHET, os.O_RDWR)
        if descriptor is None:
            if record_files(self._folder):
                raise VaultError("audit_damaged", "audit/ratchet: missing, and there are records", hint=_HINT)
            key = secrets.token_bytes(KEY_BYTES)
            self._folder.write(INITIAL_KEY, key)        # first: a ratchet whose beginning nobody can know is no use
            self._folder.write(RATCHET, fresh(key))
            descriptor = self._folder.open(RATCHET, os.O_RDWR)
            if descriptor is None:
                raise VaultError("audit_damaged", "audit/ratchet: taken away while the chain was begun")
        try:
            self._ratchet = Ratchet(descriptor)
            self._mend(self._ratchet.position)
        except BaseException:
            if self._ratchet is None:
                os.close(descriptor)
            self._unsettle()
            raise

    def _mend(self, position: Position) -> None:
        """Write the line that a crash kept from the file, if it did. Raises `VaultError` for what no crash leaves."""
        files = record_files(self._folder)
        if position.sequence == 0:
            if files:
                raise VaultError("audit_damaged", "audit: records of another chain", hint=_HINT)
            return
        if not files:
            if position.sequence == 1:
                self._extend(position.line)
                return
            raise VaultError("audit_damaged", "audit: the records are missing", hint=_HINT)
        content = self._folder.read(files[-1]) or b""
        *whole, torn = content.split(b"\n")
        end = _number(files[-1]) + len(whole)
        if end == position.sequence and not torn and whole and whole[-1] + b"\n" == position.line:
            return
        # A crash tears the last line and leaves nothing else: what is there is as long as the line at most.
        if end != position.sequence - 1 or len(torn) > len(position.line):
            raise VaultError(
                "audit_damaged", f"{files[-1]}: does not end where the ratchet says (record {position.sequence - 1})", hint=_HINT
            )
        # The line's digest is its second word; what cannot be parsed is compared all the same.
        before = whole[-1].split(b" ")[1:2] if whole else []
        if whole and before != [parse_line(position.line[:-1], "audit/ratchet").record.previous.encode("ascii")]:
            raise VaultError("audit_damaged", f"{files[-1]}: its last record is not the one before the ratchet's", hint=_HINT)
        if torn:
            descriptor = self._folder.open(files[-1], os.O_WRONLY)
            if descriptor is not None:
                try:
                    os.ftruncate(descriptor, len(content) - len(torn))
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        self._extend(position.line)

    def _extend(self, line: bytes) -> None:
        """Append `line` to the last file, or to a new one where it does not fit, and sync."""
        files = record_files(self._folder)
        descriptor = self._folder.open(files[-1], os.O_WRONLY | os.O_APPEND) if files else None
        if descriptor is not None and os.fstat(descriptor).st_size + len(line) > self._largest and os.fstat(descriptor).st_size:
            os.close(descriptor)
            descriptor = None
        if descriptor is None:
            descriptor = self._folder.create(f"records-{parse_line(line[:-1], 'ratchet').record.sequence:012}")
        try:
            write_all(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _let_go(self) -> None:
        """Drop the oldest files while there are too many; a record says it first, so that a crash between is harmless."""
        while len(files := record_files(self._folder)) > self._most:
            self.append(Event.RECORDS_DROPPED, before=_number(files[1]))
            self._folder.remove(files[0])


def head_at(position: Position, moment: Moment, device: str) -> Head:
    """Return the head of a chain that stands at `position`. Raises `VaultError` for one without records."""
    if position.sequence == 0:
        raise VaultError("audit_empty", "audit: nothing was recorded yet")
    return Head(position.sequence - 1, _digest_of(position.line), tip(position.key), device, moment)


def initial_key(folder: Folder) -> bytes | None:
    """Return A₀ while it waits to be written down; None when it was. Raises `VaultError` for a damaged file."""
    key = folder.read(INITIAL_KEY)
    if key is not None and len(key) != KEY_BYTES:
        raise VaultError("audit_damaged", "audit/initial-key: damaged", hint=_HINT)
    # A crash in the middle of `destroy` leaves zeros, which are nobody's key.
    return None if key == bytes(KEY_BYTES) else key


def record_files(folder: Folder) -> list[str]:
    """Return the names of the files of records, in the order of their first sequence numbers."""
    return sorted((name for name in folder.names() if RECORDS.fullmatch(name)), key=_number)


def ratchet_at(folder: Folder) -> bytes | None:
    """Return the ratchet file's bytes for somebody who only reads."""
    content = folder.read(RATCHET)
    return None if content is None else content[: FILE_BYTES + 1]


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def _digest_of(line: bytes) -> str:
    return parse_line(line.rstrip(b"\n"), "audit").digest if line else NOTHING_BEFORE
