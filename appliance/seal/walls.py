"""What each process will be closed off with, prepared by the supervisor while it may still look around.

For each role two things, both handed down as open descriptors:

    filter      a seccomp program, compiled by libseccomp from `seal.calls`, in a sealed memfd
    ruleset     a Landlock ruleset with the paths of that role; None where the kernel has no Landlock, with the reason

A child applies them with one kernel call each (`seal.confine`) and needs no library for it: libseccomp and the search for it
stay in the supervisor. A ruleset names files as they were when it was made, so a path that is swapped later opens nothing.

>>> walls = Walls.prepare(paths)                # before anything is sealed
>>> walls.of("engine").arguments()              # doctest: +SKIP
['--filter', '7', '--ruleset', '8']
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import py_landlock
import pyseccomp
from py_landlock import AccessFs

from appliance.errors import NotSealed
from appliance.seal.calls import ROLES, Role, allowed

REFUSED: Final = pyseccomp.ERRNO(errno.EPERM)       # what a call that is on no list is answered with
_READ: Final = AccessFs.READ_FILE | AccessFs.READ_DIR
_WRITE: Final = (
    AccessFs.READ_FILE | AccessFs.READ_DIR | AccessFs.WRITE_FILE | AccessFs.TRUNCATE | AccessFs.MAKE_REG
    | AccessFs.REMOVE_FILE | AccessFs.MAKE_DIR | AccessFs.REMOVE_DIR
)
_SYSTEM: Final = (      # what the dynamic linker, the C library and Python read of a Debian machine
    "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime",
    "/etc/os-release", "/etc/mime.types", "/usr/lib/ssl", "/etc/ssl/openssl.cnf",
)
_MACHINE: Final = (     # what ONNX Runtime reads to choose its kernels and its number of threads
    "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/fs/cgroup",
    "/sys/bus/pci/devices",
)
_BUSES: Final = Path("/sys/devices")    # … and the classes of the devices that are on the bus
_DEVICES: Final = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/zero")
_HEARTBEAT: Final = "/dev/shm"     # noqa: S108     # gunicorn's heartbeat file, made by the arbiter


@dataclass(frozen=True)
class Paths:
    """The paths that differ from one appliance to the next."""

    bundle: Path
    trusted: tuple[Path, ...]
    run_folder: Path                        # the control socket's
    vault: tuple[Path, ...] = ()            # written by the worker alone


@dataclass(frozen=True)
class Wall:
    """One role's filter and ruleset, as descriptors of this process."""

    role: Role
    filter_fd: int
    ruleset_fd: int | None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Return what has to be passed on for `arguments` to mean anything."""
        return (self.filter_fd,) if self.ruleset_fd is None else (self.filter_fd, self.ruleset_fd)

    def arguments(self, prefix: str = "") -> list[str]:
        """Return the command line arguments by which a child finds them."""
        given = [f"--{prefix}filter", str(self.filter_fd)]
        return given if self.ruleset_fd is None else [*given, f"--{prefix}ruleset", str(self.ruleset_fd)]


@dataclass(frozen=True)
class Walls:
    """The walls of every role; `no_landlock` is the errno of a kernel that has none, otherwise 0."""

    walls: Mapping[Role, Wall]
    no_landlock: int

    @classmethod
    def prepare(cls, paths: Paths) -> Walls:
        """Compile the filters and make the rulesets. Raises `NotSealed` where a filter cannot be compiled."""
        missing = landlock_errno()
        return cls(
            {
                role: Wall(role, _filter(role), None if missing else _ruleset(_rules(role, paths)))
                for role in ROLES
            },
            missing,
        )

    def of(self, role: Role) -> Wall:
        """Return the wall of one role."""
        return self.walls[role]

    def close(self) -> None:
        """Close every descriptor."""
        for wall in self.walls.values():
            for fd in wall.descriptors:
                os.close(fd)


def landlock_errno() -> int:
    """Return 0 where Landlock can be had, otherwise why not: ENOSYS (not built in), EOPNOTSUPP (switched off at boot)."""
    try:
        py_landlock.get_abi_version()
    except py_landlock.LandlockDisabledError:
        return errno.EOPNOTSUPP
    except py_landlock.LandlockError:
        return errno.ENOSYS
    return 0


def program(role: Role) -> bytes:
    """Return the role's seccomp program: struct sock_filter after struct sock_filter (seccomp(2)).

    Calls of another architecture's ABI (i386's by int 0x80, x32's) end the process: libseccomp's answer to an architecture
    that a filter does not name.
    """
    fd = _filter(role)
    try:
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _filter(role: Role) -> int:
    chosen = pyseccomp.SyscallFilter(REFUSED)
    try:
        # glibc asks for clone3 first and goes on to clone where that is not built in; only clone's flags can be filtered.
        chosen.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
        for one in allowed(role):
            conditions = [
                pyseccomp.Arg(is_.argument, pyseccomp.MASKED_EQ, is_.mask, is_.value) for is_ in one.conditions
            ]
            chosen.add_rule(pyseccomp.ALLOW, one.call, *conditions)
        fd = os.memfd_create(f"darkroom-filter-{role}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(os.dup(fd), "wb") as file:
            chosen.export_bpf(file)
    except OSError as error:
        raise NotSealed("filter", f"the filter of the {role} could not be compiled: {error.strerror}") from None
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _ruleset(rules: Iterator[tuple[Path, AccessFs]]) -> int:
    version = py_landlock.get_abi_version()
    handled = py_landlock.abi.get_supported_fs(version)
    ruleset = py_landlock.create_ruleset(
        # No TCP port may be bound or connected to, no abstract socket reached, no process outside signalled.
        py_landlock.RulesetAttr(
            handled, py_landlock.abi.get_supported_net(version), py_landlock.abi.get_supported_scope(version)
        )
    )
    for path, access in rules:
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue        # what is not there needs no permission
        try:
            wanted = access & handled
            if not path.is_dir():
                wanted &= AccessFs.READ_FILE | AccessFs.WRITE_FILE | AccessFs.TRUNCATE | AccessFs.EXECUTE
            py_landlock.add_rule(ruleset, py_landlock.PathBeneathAttr(wanted, parent))
        finally:
            os.close(parent)
    return int(ruleset)


def _rules(role: Role, paths: Paths) -> Iterator[tuple[Path, AccessFs]]:
    """Yield the paths of one role with what it may do beneath each."""
    runs = AccessFs.EXECUTE if role == "supervisor" else AccessFs(0)
    # The built-in model lies inside the package, where only the engine (and its parent, whose domain it inherits) may read.
    hidden = () if role in ("supervisor", "engine") else (paths.bundle.resolve(),)
    for place in (*_interpreter(), *(Path(place).resolve() for place in _SYSTEM)):
        yield from _beneath(place, _READ | runs, hidden)
    yield from ((Path(place), AccessFs.READ_FILE) for place in _DEVICES)
    yield Path("/dev/null"), AccessFs.READ_FILE | AccessFs.WRITE_FILE
    if role in ("supervisor", "engine"):
        yield from ((Path(place), _READ) for place in (paths.bundle.resolve(), *(key.resolve() for key in paths.trusted)))
        yield from ((Path(place), _READ) for place in _MACHINE)
        yield from ((place, _READ) for place in _BUSES.glob("pci*"))
    if role == "supervisor":
        # Where a child looks for the package when it starts: names only, and the child gives that up again.
        yield Path(__file__).resolve().parent.parent.parent, AccessFs.READ_DIR
        yield Path("/proc"), _READ | _offering()
        yield Path("/sys/block"), _READ                         # which swap is encrypted …
        yield Path("/sys/devices/virtual/block"), _READ         # … where the links there lead
        yield paths.run_folder, _WRITE
    if role in ("supervisor", "arbiter"):
        yield Path(_HEARTBEAT), _WRITE
    if role in ("supervisor", "arbiter", "worker"):
        yield from ((place, _WRITE) for place in paths.vault)


def _offering() -> AccessFs:
    """Return what the engine needs to offer itself to the OOM killer, for it inherits the supervisor's domain.

    Root could write /proc/sys with it, and has no need of the offer: the engine is the largest process anyway.
    """
    return AccessFs(0) if os.geteuid() == 0 else AccessFs.WRITE_FILE


def _interpreter() -> tuple[Path, ...]:
    """Return the folders that modules are imported from and the interpreter runs in, each once, none inside another."""
    named = (
        sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"), str(Path(sys.executable).resolve().parent),
    )
    found = {Path(place).resolve() for place in named} | set(_imported_from())
    return tuple(sorted(place for place in found if not any(other in place.parents for other in found)))


def _imported_from() -> Iterator[Path]:
    """Yield sys.path as the children have it, with Darkroom's own package in the place of the repository around it.

    The first entry is where the command was started from or lies (sys.flags.safe_path); the children are started without.
    """
    package = Path(__file__).resolve().parent.parent
    yield package
    for entry in sys.path if sys.flags.safe_path else sys.path[1:]:
        place = Path(entry or ".").resolve()
        if place != package.parent or "site-packages" in place.parts or "dist-packages" in place.parts:
            yield place


def _beneath(place: Path, access: AccessFs, hidden: tuple[Path, ...]) -> Iterator[tuple[Path, AccessFs]]:
    """Yield rules for everything beneath `place` but what is hidden.

    Landlock can only allow. A folder on the way to a hidden one is allowed entry by entry, and may itself be listed: the
    names in it can be seen, the contents of the hidden folder cannot.
    """
    if not any(place == one or place in one.parents for one in hidden):
        yield place, access
        return
    yield place, access & AccessFs.READ_DIR
    if place in hidden or not place.is_dir():
        return
    for entry in sorted(place.iterdir()):
        if entry in hidden:
            continue
        resolved = entry.resolve()
        # A link may lead to where the hidden folder is (lib64 to lib, in every virtual environment); one that leads to a
        # folder above it would go round for ever, and opens nothing that is not seen on the way.
        if resolved not in place.parents and resolved != place:
            yield from _beneath(resolved, access, hidden)

