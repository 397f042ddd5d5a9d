"""What is really so: the observations of every process, and the promises that they bear out or break.

    from inside     each process's own probes (`seal.probes`): what it tried, and how much of it got through
    from outside    /proc, read by the supervisor: filter, privileges and capabilities of every thread of every process
    the machine     interfaces of the network namespace, swap

*Sealed* is a conclusion from these and from nothing else. The promises that are `essential` decide it: every way out tried
from every process fails, and the filter is on every thread. A wall that a host does not offer is reported as missing, with the
reason, and does not open anything by itself.

>>> Posture.unknown().sealed
False
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from appliance.seal.calls import Role
from appliance.seal.confine import Standing
from appliance.seal.probes import FAMILIES, Probe, attempted

FILTERS: Final[Mapping[Role, int]] = {"supervisor": 1, "arbiter": 2, "worker": 3, "engine": 2}     # one for each who tightened
_PROBED: Final[tuple[Role, ...]] = ("supervisor", "worker", "engine")
_CONTENT: Final[tuple[Role, ...]] = ("worker", "engine")
_FIELDS: Final = ("CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters")


@dataclass(frozen=True)
class Threads:
    """What /proc/PID/task/*/status says of all threads of one process."""

    count: int
    filtered: int               # threads with a filter in force, and as many filters as the process should have
    unprivileged: int           # threads that can get no new privileges
    without_capabilities: int


@dataclass(frozen=True)
class Promise:
    """One promise, whether it holds, and what was observed, naming the process."""

    id: str
    title: str
    holds: bool
    observed: str
    essential: bool = False

    def as_json(self) -> dict[str, object]:
        """Return what `darkroom status --json` prints of it."""
        return {
            "id": self.id, "title": self.title, "holds": self.holds, "observed": self.observed, "essential": self.essential,
        }


@dataclass(frozen=True)
class Machine:
    """What the machine is like beneath all of this."""

    interfaces: tuple[str, ...] = ()        # of the network namespace; lo only where it is up
    swap: tuple[str, ...] = ()              # areas that may hold memory in the clear
    swap_known: bool = True


@dataclass(frozen=True)
class Posture:
    """Everything that was observed at one time; `missing` names processes that did not answer."""

    found: Mapping[Role, Mapping[Probe, int]] = field(default_factory=dict)
    threads: Mapping[Role, Threads] = field(default_factory=dict)
    standing: Standing = field(default_factory=Standing)
    machine: Machine | None = None
    planted_heard: int = 0                  # datagrams that came to the socket that the probes were to reach
    digest: str | None = None               # of the verified model
    key: str | None = None

    @classmethod
    def unknown(cls) -> Posture:
        """Return the posture of an appliance of which nothing was observed: nothing holds."""
        return cls()

    @property
    def sealed(self) -> bool:
        """Whether every way out was tried from every process and failed, and the filter is on every thread."""
        return all(promise.holds for promise in self.promises() if promise.essential)

    def promises(self) -> tuple[Promise, ...]:
        """Return every promise that can be observed while the appliance runs (docs/promises.md has them all)."""
        return (
            self._nothing(
                "1.sockets", "No process can make a socket that leads out", Probe.FAMILIES, essential=True,
                tried=f"{len(FAMILIES)} address families", through="can be opened",
            ),
            self._nothing(
                "1.served", "A socket that serves visitors cannot be turned into a way out", Probe.SERVED, essential=True,
                tried="ways", through="get through",
            ),
            self._unix(),
            self._filter(),
            self._nothing(
                "1.calls", "What reaches into other processes, devices or the kernel is refused", Probe.CALLS, essential=True,
                tried="calls", through="get through",
            ),
            self._nothing(
                "1.loosening", "No process can take its seal off again", Probe.LOOSENING, essential=True,
                tried="ways", through="get through",
            ),
            self._network(),
            self._privileges(),
            self._nothing(
                "1.peers", "No process can read another one's memory", Probe.PEERS, among=_CONTENT,
                tried="memory and environment of the others", through="can be opened",
            ),
            Promise(
                "2.verified", "No byte of a model is used that was not verified", self.digest is not None,
                f"supervisor: the engine verified sha256:{self.digest} by key sha256:{self.key}" if self.digest
                else "supervisor: no engine has reported a verified model",
            ),
            self._files(),
            self._exactly(
                "3.cores", "No process leaves a memory dump, or can be read by its user", {Probe.DUMPABLE: 0, Probe.CORE: 0}
            ),
            self._swap(),
            self._lifetime(),
        )

    # ── One by one ────────────────────────────────────────────────────────────

    def _gather(self, probe: Probe, among: tuple[Role, ...]) -> tuple[dict[Role, int], list[str]]:
        """Return the findings that are there, and the processes that did not answer."""
        there = {role: self.found[role][probe] for role in among if probe in self.found.get(role, {})}
        return there, [role for role in among if role not in there]

    def _nothing(
        self, id_: str, title: str, probe: Probe, *, tried: str, through: str, essential: bool = False,
        among: tuple[Role, ...] = _PROBED,
    ) -> Promise:
        """Return a promise that holds where nothing got through in any process."""
        there, silent = self._gather(probe, among)
        counted = probe in (Probe.SERVED, Probe.CALLS, Probe.LOOSENING)
        amount = {role: f"{attempted(probe, role)} {tried}" if counted else tried for role in there}
        said = [f"{role}: {number} of {amount[role]} {through}" for role, number in there.items() if number]
        said += [f"{role}: did not answer" for role in silent]
        # Those who tried as much are named together.
        together = {what: tuple(role for role in there if amount[role] == what) for what in dict.fromkeys(amount.values())}
        held = "; ".join(f"{_and(roles)}: {what} tried, none {_singular(through)}" for what, roles in together.items())
        return Promise(id_, title, not said, "; ".join(said) or held, essential)

    def _exactly(self, id_: str, title: str, wanted: Mapping[Probe, int]) -> Promise:
        said = []
        for probe, value in wanted.items():
            there, silent = self._gather(probe, _PROBED)
            said += [f"{role}: {probe.name.lower()} is {number}" for role, number in there.items() if number != value]
            said += [f"{role}: did not answer" for role in silent]
        expected = ", ".join(f"{probe.name.lower()} {value}" for probe, value in wanted.items())
        return Promise(id_, title, not said, "; ".join(dict.fromkeys(said)) or f"{_and(_PROBED)}: {expected}")

    def _unix(self) -> Promise:
        base = self._nothing(
            "1.unix", "No UNIX socket of the machine can be reached: not D-Bus, not systemd, not the journal", Probe.UNIX,
            tried="3 ways", through="get through", essential=True, among=_CONTENT,
        )
        if not self.planted_heard:
            return base
        return Promise(
            base.id, base.title, False, f"supervisor: heard {self.planted_heard} datagrams on the socket that was planted", True
        )

    def _filter(self) -> Promise:
        said = []
        for role in FILTERS:
            seen = self.threads.get(role)
            if seen is None or not seen.count:
                said.append(f"{role}: not found in /proc (is that mounted with hidepid, or is ProtectProc= set?)")
            elif seen.filtered != seen.count or seen.unprivileged != seen.count:
                said.append(
                    f"{role}: of {seen.count} threads {seen.filtered} are filtered "
                    f"and {seen.unprivileged} can get no new privileges"
                )
        counted = ", ".join(f"{role} {seen.count}" for role, seen in self.threads.items())
        return Promise(
            "1.filter", "Filter and no-new-privileges are on every thread", not said,
            "; ".join(said) or f"supervisor: seen on every thread ({counted})", True,
        )

    def _network(self) -> Promise:
        title = "The processes are in a network of their own, with nothing in it"
        if self.standing.network_namespace:
            return Promise(
                "1.network", title, False,
                f"supervisor: the kernel allows no namespace ({_why(self.standing.network_namespace)}); "
                "the filter stands without it",
            )
        if self.machine is None:
            return Promise("1.network", title, False, "supervisor: has not looked yet")
        found = self.machine.interfaces
        return Promise(
            "1.network", title, not found,
            f"supervisor: {', '.join(found)} can be seen" if found else "supervisor: no interface is up",
        )

    def _privileges(self) -> Promise:
        said = [
            f"{role}: {seen.count - seen.without_capabilities} of {seen.count} threads have capabilities"
            for role, seen in self.threads.items() if seen.without_capabilities != seen.count
        ]
        missing = [f"{role}: not found" for role in FILTERS if role not in self.threads or not self.threads[role].count]
        return Promise(
            "1.privileges", "No process has a capability", not said and not missing,
            "; ".join(said + missing) or f"supervisor: none on any thread of {_and(tuple(self.threads))}",
        )

    def _files(self) -> Promise:
        title = "Each process reaches the files that it needs and no others"
        there, silent = self._gather(Probe.LANDLOCK, _PROBED)
        without = {role: number for role, number in there.items() if number}
        if without:
            number = next(iter(without.values()))
            return Promise(
                "3.files", title, False, f"{_and(tuple(without))}: no Landlock ({_why(number)}); file modes stand without it"
            )
        writes, _ = self._gather(Probe.WRITES, _PROBED)
        reads, _ = self._gather(Probe.READS, _CONTENT)
        said = [f"{role}: wrote to {number} places outside its own" for role, number in writes.items() if number]
        said += [f"{role}: opened {number} files of others" for role, number in reads.items() if number]
        said += [f"{role}: did not answer" for role in silent]
        held = f"{_and(_PROBED)}: writing elsewhere and reading what is another's failed"
        return Promise("3.files", title, not said, "; ".join(said) or held)

    def _swap(self) -> Promise:
        title = "No memory of worker or engine reaches a disk in the clear"
        there, silent = self._gather(Probe.MEMORY_LOCK, _CONTENT)
        unlocked = [role for role, number in there.items() if number]
        if not unlocked and not silent:
            return Promise("3.swap", title, True, f"{_and(_CONTENT)}: memory is locked")
        if self.machine is None or not self.machine.swap_known:
            return Promise("3.swap", title, False, "supervisor: the machine's swap cannot be looked at")
        if self.machine.swap:
            return Promise(
                "3.swap", title, False,
                f"supervisor: {', '.join(self.machine.swap)} is swap in the clear, and {_and(tuple(unlocked + silent))} "
                "is not locked in memory: switch swap off, encrypt it, or raise the memory lock limit",
            )
        return Promise("3.swap", title, True, "supervisor: no swap in the clear is active")

    def _lifetime(self) -> Promise:
        there, silent = self._gather(Probe.PARENT, _CONTENT)
        said = [f"{role}: would outlive its parent" for role, number in there.items() if number != 9]
        said += [f"{role}: did not answer" for role in silent]
        return Promise(
            "4.lifetime", "What holds content ends with the supervisor, at once", not said,
            "; ".join(said) or f"{_and(_CONTENT)}: killed by the kernel when the parent ends",
        )


# ── Looking ───────────────────────────────────────────────────────────────────


def look_at_threads(pid: int, role: Role, filters_before: int = 0, proc: Path = Path("/proc")) -> Threads:
    """Return what /proc says of every thread of `pid`; a process that is gone has none.

    `filters_before` is how many filters the supervisor had before its own: they are everybody's, and prove nothing of ours.
    """
    wanted = FILTERS[role] + filters_before
    count = filtered = unprivileged = without = 0
    try:
        tasks = sorted(os.listdir(proc / str(pid) / "task"))        # noqa: PTH208     # names are enough
    except OSError:
        tasks = []
    for task in tasks:
        try:
            said = _fields((proc / str(pid) / "task" / task / "status").read_text(encoding="ascii", errors="replace"))
        except OSError:
            continue        # the thread ended between the two looks
        count += 1
        # Seccomp_filters is there since Linux 5.9; an older kernel is taken at its word that a filter is in force.
        filtered += said.get("Seccomp") == "2" and int(said.get("Seccomp_filters", wanted)) >= wanted
        unprivileged += said.get("NoNewPrivs") == "1"
        without += all(int(said.get(name, "1"), 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
    return Threads(count, filtered, unprivileged, without)


def look_at_machine(read: Callable[[str], str]) -> Machine:
    """Return interfaces and swap; `read` returns a file's text or raises `OSError`."""
    try:
        interfaces = tuple(
            name for line in read("/proc/self/net/dev").splitlines()[2:] if (name := line.partition(":")[0].strip()) != "lo"
        )
        # A loopback interface that is up has an address: the host's has, a new namespace's has not.
        if "127.0.0.1" in read("/proc/self/net/fib_trie"):
            interfaces = (*interfaces, "lo")
    except OSError:
        interfaces = ("unknown",)
    try:
        areas = [line.split()[0] for line in read("/proc/swaps").splitlines()[1:] if line.strip()]
    except OSError:
        return Machine(interfaces, (), swap_known=False)
    return Machine(interfaces, tuple(area for area in areas if not _encrypted(area, read)))


def _encrypted(area: str, read: Callable[[str], str]) -> bool:
    """Say whether a swap area is dm-crypt's, or memory itself (zram); a file's file system is not looked through."""
    name = Path(area).name
    try:
        if re.fullmatch(r"/dev/zram\d+", area):        # memory itself, unless it writes what it does not use to a disk
            return read(f"/sys/block/{name}/backing_dev").strip() == "none"
        return read(f"/sys/block/{name}/dm/uuid").startswith("CRYPT-")
    except OSError:
        return False


def _fields(status: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in status.splitlines())
    return {name: value.strip() for name, _, value in pairs if name in _FIELDS}


def _why(number: int) -> str:
    known = {
        errno.ENOSPC: "user namespaces are limited to none", errno.EPERM: "it is forbidden here",
        errno.ENOSYS: "the kernel was built without it", errno.EOPNOTSUPP: "it was switched off at boot",
        errno.EUSERS: "namespaces are nested too deeply",
    }
    return known.get(number, os.strerror(number).lower())


def _and(roles: tuple[str, ...]) -> str:
    return " and ".join((", ".join(roles[:-1]), roles[-1])) if len(roles) > 1 else "".join(roles)


def _singular(through: str) -> str:
    return {"can be opened": "opened", "get through": "got through"}[through]
