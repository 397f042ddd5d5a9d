"""A persistent vault from outside: locked, until a secret opens one of its key slots.

`LockedVault` has no pictures and no `put`. `unlock` gives an `UnlockedVault`, which has the `Vault` and whatever changes slots,
policy and key. Both are one folder: the header (`vault/header.py`) and the database that it names.

**To unlock**, in this order: (1) the header is parsed; (2) whoever failed too often waits; (3) the try is counted before it is
made, so that a kill gives no free one; (4) the slots of the secret's kind are tried; (5) the header's MAC; (6) the database is
opened; (7) the generations are compared; (8) what an interrupted change left is finished or taken away.

**To change** anything in the header, and at each close, both files go to a new generation n+1:

    a   the database records (now = n+1, before = n), in the file itself
    b   the header of n+1 replaces the one of n. This is the moment at which the change is made
    c   the database records (now = n+1, before = n+1)

At opening the header's generation must be `now` or `before`. They differ between a and c only: after a crash there the header
is the old or the new one, both whole, and both authentic. The next opening goes on to now+1 by the same three steps: a number
that was given to a change that never came to be is not given again. Outside a change, so whenever one has been reported as
done, a single generation fits: a header that was saved before a slot was removed is refused, and so is a database that was
saved before a close. The window of one is open only while nothing has been promised yet.

What this cannot tell: both files put back together, and single pages of the database put back (each page has its own MAC). For
the first keep `UnlockedVault.generation` elsewhere and compare it: it only grows.

**To rekey**, the database is copied under a new key into a new file, of a new volume id, at rest in n+1; then the header that
wraps the new key and names the new file replaces the old one; then the old file is removed. Before the replacement the old pair
is whole, after it the new one is, and what the other left behind is taken away at the next opening.

>>> locked = LockedVault.init(folder, [Passphrase("several words are easy")])                      # doctest: +SKIP
>>> with locked.unlock(Passphrase("several words are easy"), tries=state, capacity=1 << 30) as vault:   # doctest: +SKIP
...     vault.add(RecoveryKey.fresh())
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol, Self

from appliance.errors import BadRequest, VaultError
from appliance.vault.age import Retention
from appliance.vault.header import MOST_SLOTS, Header, HeaderFile, Policy
from appliance.vault.keys import Secret, Slot, VolumeKey
from appliance.vault.pages import remove
from appliance.vault.state import FailedUnlocks
from appliance.vault.volume import UNLIMITED, Generation, Vault, create, database_name

FREE_TRIES: Final = 3
LONGEST_WAIT: Final = 900       # seconds
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Tries(Protocol):
    """Where failed unlocks are counted, so that a restart is not forgotten: `vault/state.py`."""

    def failed_unlocks(self) -> FailedUnlocks: ...
    def count_failed_unlock(self, boot: str, boottime: int) -> FailedUnlocks: ...
    def forgive_failed_unlocks(self) -> None: ...


@dataclass(frozen=True)
class Moment:
    """When: the kernel's boot id in hex without dashes, and CLOCK_BOOTTIME in milliseconds. No wall clock: it can be set."""

    boot: str
    boottime: int

    @classmethod
    def now(cls) -> Moment:
        """Return this moment."""
        boot = _BOOT_ID.read_text(encoding="ascii").strip().replace("-", "")
        return cls(boot, time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000)

    def must_wait(self, failed: FailedUnlocks) -> int:
        """Return for how many seconds no try is allowed yet: none after three failures, then 2, 4, 8 … 900."""
        if failed.count < FREE_TRIES:
            return 0
        wait = 1000 * min(1 << min(failed.count - FREE_TRIES + 1, 16), LONGEST_WAIT)
        # After a boot the clock begins anew, and nobody knows how long the machine was off: the wait begins with the boot.
        passed = self.boottime - failed.boottime if self.boot == failed.boot else self.boottime
        return max(0, -(-(wait - passed) // 1000))


@dataclass(frozen=True)
class LockedVault:
    """A persistent vault that nobody has opened."""

    file: HeaderFile

    @classmethod
    def at(cls, folder: Path) -> LockedVault:
        """Return the vault in a folder. Raises `VaultError` where there is none."""
        locked = cls(HeaderFile.at(folder))
        if locked.file.read() is None:
            raise VaultError("vault_missing", "there is no key-slot header in the vault's folder", hint="darkroom vault init")
        return locked

    @classmethod
    def init(cls, folder: Path, opens: Sequence[Secret], policy: Policy = Policy()) -> LockedVault:      # noqa: B008     # frozen
        """Make an empty vault that each of these secrets opens. Raises `VaultError` and `BadRequest`; nothing is then left."""
        file = HeaderFile.at(folder)
        if any(file.folder.glob("vault-*")) or file.read() is not None:
            raise VaultError("vault_exists", "there is a vault in the folder already", hint="unlock it, or name an empty folder")
        key = VolumeKey.fresh()
        header = Header(key.volume, 1, policy, _slots(opens, key, policy))
        vault = None
        try:
            create(file.folder, database_name(key.volume), key, durable=True).close()
            vault = Vault.open(file.folder, key.copy(), capacity=0)
            vault.record(Generation(1, 1))
            vault.close()
            file.write(header.sealed(key))
        except BaseException:
            if vault is not None:
                vault.close()
            _remove_database(file.folder / database_name(key.volume))
            raise
        finally:
            key.wipe()
        return cls(file)

    def unlock(
        self, secret: Secret, *, tries: Tries, capacity: int, retention: Retention = UNLIMITED, moment: Moment | None = None
    ) -> UnlockedVault:
        """Open the vault. Raises `VaultError`; its files are then as they were, but for slots that the policy destroys."""
        header = self.file.read()                                               # 1
        if header is None or not header.slots:
            raise VaultError("slots_destroyed", "the vault has no key slots: nobody can open it any more")
        moment = moment or Moment.now()
        if wait := moment.must_wait(tries.failed_unlocks()):                    # 2
            raise VaultError(
                "unlock_throttled", "too many unlocks have failed in a row", hint=f"try again in {wait} seconds"
            )
        failed = tries.count_failed_unlock(moment.boot, moment.boottime)        # 3
        key = next(filter(None, (slot.opened(secret, header.volume) for slot in header.slots if slot.kind == secret.kind)), None)
        if key is None:                                                         # 4
            after = header.policy.destroy_after
            if after is not None and failed.count >= after:
                self.file.destroy()
                raise VaultError("slots_destroyed", f"{failed.count} unlocks have failed in a row: the key slots were destroyed")
            raise VaultError("unlock_refused", f"no key slot opens with this {_SPOKEN[secret.kind]}", hint=_left(after, failed))
        if not header.is_sealed_by(key):                                        # 5
            key.wipe()
            raise VaultError(
                "header_refused", "the key-slot header: changed by somebody who does not have the volume key",
                hint="put the header back from a copy that was made after the last change",
            )
        tries.forgive_failed_unlocks()
        vault = Vault.open(self.file.folder, key.copy(), capacity=capacity, retention=retention)       # 6
        unlocked = UnlockedVault(self.file, header, key, vault, capacity, retention)
        try:
            unlocked._settle()                                                  # 7, 8
        except BaseException:
            vault.close()
            key.wipe()
            raise
        return unlocked


class UnlockedVault:
    """A persistent vault that is open; `close` ends it. Used by one thread; `vault` itself by any."""

    def __init__(
        self, file: HeaderFile, header: Header, key: VolumeKey, vault: Vault, capacity: int, retention: Retention
    ) -> None:
        self.vault = vault
        self._file = file
        self._header = header
        self._key = key
        self._capacity = capacity
        self._retention = retention

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """The number of this state of header and database; it only grows."""
        return self._header.generation

    @property
    def policy(self) -> Policy:
        """What may be used, and what happens to somebody who guesses."""
        return self._header.policy

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot."""
        return self._header.slots

    def add(self, secret: Secret) -> int:
        """Let one more secret open the vault, and return its slot's number. Raises `VaultError` and `BadRequest`."""
        free = sorted(set(range(MOST_SLOTS)) - {slot.number for slot in self.slots})
        if not free:
            raise BadRequest("slots_full", f"all {MOST_SLOTS} key slots are taken", hint="remove one first")
        self._keep(*self.slots, Slot.closed(free[0], secret, self._key, approved_only=self.policy.approved_only))
        return free[0]

    def change(self, number: int, secret: Secret) -> None:
        """Let another secret open the vault in the place of one. Raises `VaultError` and `BadRequest`."""
        others = self._without(number)
        self._keep(*others, Slot.closed(number, secret, self._key, approved_only=self.policy.approved_only))

    def remove(self, number: int) -> None:
        """Take a slot away; the last one stays. Raises `VaultError` and `BadRequest`."""
        others = self._without(number)
        if not others:
            raise BadRequest("slot_last", "the last key slot stays", hint="add another one first, or erase the vault")
        self._keep(*others)

    def set_policy(self, policy: Policy) -> None:
        """Replace the policy; the slots that are there stay as they are. Raises `VaultError`."""
        self._advance(replace(self._header, policy=policy))

    def rekey(self, opens: Sequence[Secret]) -> None:
        """Encrypt everything under a new volume key, which these secrets open and no others: the rest have to be added anew.

        A header that was saved, with its passphrase, opens nothing afterwards but copies of the old file. Raises `VaultError`
        and `BadRequest`; the vault is then as it was.
        """
        fresh = VolumeKey.fresh()
        generation = self.generation + 1
        header = Header(fresh.volume, generation, self.policy, _slots(opens, fresh, self.policy)).sealed(fresh)
        self.vault.copy(self._file.folder, fresh, Generation(generation, generation))
        new = self._file.folder / database_name(fresh.volume)
        try:
            self._file.write(header)
        except BaseException:
            # Where the rename came through and only what follows it failed, the new pair is the vault.
            if self._file.read() != header:
                _remove_database(new)
            raise
        old = self._file.folder / database_name(self._key.volume)
        self.vault.close()
        self._key.wipe()
        self._header, self._key = header, fresh
        self.vault = Vault.open(self._file.folder, fresh.copy(), capacity=self._capacity, retention=self._retention)
        _remove_database(old)

    def close(self) -> None:
        """Go to the next generation and give everything back; the key is overwritten. Raises `VaultError`, but closes."""
        try:
            self._advance(self._header)
        finally:
            self.vault.close()
            self._key.wipe()

    def _without(self, number: int) -> tuple[Slot, ...]:
        others = tuple(slot for slot in self.slots if slot.number != number)
        if len(others) == len(self.slots):
            raise BadRequest("slot_missing", f"there is no key slot {number}")
        return others

    def _keep(self, *slots: Slot) -> None:
        self._advance(replace(self._header, slots=tuple(sorted(slots, key=lambda slot: slot.number))))

    def _advance(self, header: Header, *, after: int | None = None) -> None:
        """Make a header the current one, one generation on: steps a, b, c."""
        current = self.generation
        following = replace(header, generation=(current if after is None else after) + 1).sealed(self._key)
        self.vault.record(Generation(following.generation, current))            # a
        self._file.write(following)                                             # b
        self._header = following
        self.vault.record(Generation(following.generation, following.generation))       # c

    def _settle(self) -> None:
        """Compare the generations, finish what was interrupted, and take away what is left of another volume."""
        recorded = self.vault.generation
        if self.generation not in {recorded.now, recorded.before}:
            older = "database is older than its header" if recorded.now < self.generation else "header is older than its database"
            raise VaultError(
                "vault_replayed", f"the vault's {older} (generation {min(recorded.now, self.generation)}, expected "
                f"{max(recorded.now, self.generation)})",
                hint="somebody has put back an old file: put back the other one of the same moment, or what was there",
            )
        if recorded.now != recorded.before:
            self._advance(self._header, after=recorded.now)
        for path in self._file.folder.glob("vault-*"):
            if not path.name.startswith(database_name(self._key.volume)):
                remove(path)


_SPOKEN: Final = {"passphrase": "passphrase", "recovery": "recovery key", "keyfile": "key file"}


def _left(after: int | None, failed: FailedUnlocks) -> str:
    if after is None:
        return "check it and try again; a damaged header looks the same"
    return f"check it and try again: after {after - failed.count} more the key slots are destroyed"


def _slots(opens: Sequence[Secret], key: VolumeKey, policy: Policy) -> tuple[Slot, ...]:
    if not 1 <= len(opens) <= MOST_SLOTS:
        raise BadRequest("slots_number", f"a vault has 1 to {MOST_SLOTS} key slots")
    return tuple(
        Slot.closed(number, secret, key, approved_only=policy.approved_only) for number, secret in enumerate(opens)
    )


def _remove_database(path: Path) -> None:
    with contextlib.suppress(VaultError):
        for one in (path, path.with_name(f"{path.name}-reserve")):
            remove(one)
