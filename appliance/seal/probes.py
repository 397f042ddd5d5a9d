"""Ways out, tried by a process on itself; what is reported is how many were found open.

Nothing here looks at what was configured. Each probe attempts the thing, in a form that does no harm where it succeeds: a call
is made on descriptor −1 or with flags that no kernel knows, so that a filter which lets it through shows in the errno (EBADF,
EINVAL, EFAULT instead of the filter's EPERM). A filter sees numbers, never what stands behind a descriptor or a pointer: what
it refuses on −1 it refuses on every socket. The tests try the same ways with real sockets against a real listener.

A result is a `Probe` and a whole number, packed as six bytes: nothing else can be said, and the supervisor parses nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import json
import os
import platform
import resource
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from appliance.seal.calls import MSG_FASTOPEN, Role
from appliance.seal.confine import Standing

FAMILIES: Final = range(46)                 # AF_UNSPEC … AF_MCTP (linux/socket.h)
_TYPES: Final = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)
_RESULT: Final = struct.Struct(">Hi")
_LARGEST: Final = 1 << 14                   # bytes of an errand or of a report


class Probe(enum.IntEnum):
    """What a process finds out about itself. 0 is what should be, except where the comment says otherwise."""

    FAMILIES = 1        # address families of which a socket could be made
    SERVED = 2          # calls let through that turn a served socket into a way out
    UNIX = 3            # ways to a UNIX socket that let something through
    CALLS = 4           # forbidden calls let through
    LOOSENING = 5       # calls let through that would take the seal off again
    WRITES = 6          # places written to that are none of this process's
    READS = 7           # files read that are none of this process's
    PEERS = 8           # peers whose memory or environment could be opened
    DUMPABLE = 9        # PR_GET_DUMPABLE
    PARENT = 10         # the signal that comes when the parent ends; should be SIGKILL, 9
    CORE = 11           # the core limit, bytes
    MEMORY_LOCK = 12    # errno of mlockall, where it was refused
    LANDLOCK = 13       # errno of Landlock, where there is none


@dataclass(frozen=True)
class Errand:
    """What the supervisor knows and the process that probes itself does not: places and peers to try."""

    write: tuple[str, ...] = ()     # folders
    read: tuple[str, ...] = ()      # files
    peers: tuple[int, ...] = ()     # process ids
    planted: str = ""               # a UNIX datagram socket that listens

    def pack(self) -> bytes:
        """Return this as JSON bytes."""
        return json.dumps([self.write, self.read, self.peers, self.planted]).encode("ascii")

    @classmethod
    def unpack(cls, message: bytes) -> Errand:
        """Return what `pack` packed; the sender is the supervisor, whom its children trust."""
        write, read, peers, planted = json.loads(message)
        return cls(tuple(write), tuple(read), tuple(peers), planted)


def pack(found: Mapping[Probe, int]) -> bytes:
    """Return a report as bytes."""
    return b"".join(_RESULT.pack(probe, max(-(2**31), min(2**31 - 1, number))) for probe, number in found.items())


def unpack(untrusted: bytes) -> dict[Probe, int]:
    """Return a report; what is no known probe is dropped, and what is missing is for the reader to miss."""
    found = {}
    for number, value in _RESULT.iter_unpack(untrusted[: len(untrusted) // _RESULT.size * _RESULT.size][:_LARGEST]):
        with contextlib.suppress(ValueError):
            found[Probe(number)] = value
    return found


def probe_self(role: Role, errand: Errand, standing: Standing) -> dict[Probe, int]:
    """Try every way out from the calling thread; `standing` is what was seen when the process was closed off."""
    libc = ctypes.CDLL(None, use_errno=True)
    return {
        Probe.FAMILIES: sum(_family_opens(family, role) for family in FAMILIES),
        Probe.SERVED: _let_through(libc, _SERVED, spared=_SPARED[role]),
        Probe.UNIX: _unix_ways(errand.planted) if role != "supervisor" else 0,
        Probe.CALLS: _let_through(libc, _FORBIDDEN, spared=_SPARED[role]),
        Probe.LOOSENING: _let_through(libc, _LOOSENING, spared=_SPARED[role]),
        Probe.WRITES: sum(_can_write(folder) for folder in errand.write),
        Probe.READS: sum(_can_open(path) for path in errand.read),
        Probe.PEERS: sum(_can_open(f"/proc/{pid}/{what}") for pid in errand.peers for what in ("mem", "environ")),
        Probe.DUMPABLE: libc.prctl(3, 0, 0, 0, 0),
        Probe.PARENT: standing.parent_signal,
        Probe.CORE: resource.getrlimit(resource.RLIMIT_CORE)[1],
        Probe.MEMORY_LOCK: standing.memory_lock,
        Probe.LANDLOCK: standing.landlock,
    }


def _family_opens(family: int, role: Role) -> bool:
    for kind in _TYPES:
        if role == "supervisor" and (family, kind) == (socket.AF_UNIX, socket.SOCK_DGRAM):
            continue        # how the supervisor tells systemd; it cannot connect it
        try:
            socket.socket(family, kind).close()
        except OSError:
            continue
        return True
    return False


@dataclass(frozen=True)
class _Attempt:
    """A call by its number on each architecture, with arguments that do no harm; `refusal` is the filter's answer."""

    name: str
    x86_64: int
    aarch64: int
    arguments: tuple[int, ...]
    refusal: int = errno.EPERM


_NOWHERE: Final = 0xFFFF_FFFF_FFFF_FFFF        # descriptor −1, or an address that is none
_SERVED: Final = (
    _Attempt("connect", 42, 203, (_NOWHERE, 0, 0)),
    _Attempt("bind", 49, 200, (_NOWHERE, 0, 0)),
    _Attempt("listen", 50, 201, (_NOWHERE, 0)),
    _Attempt("sendto with an address", 44, 206, (_NOWHERE, 0, 0, 0, 1, 16)),
    _Attempt("sendto with MSG_FASTOPEN", 44, 206, (_NOWHERE, 0, 0, MSG_FASTOPEN, 0, 0)),
    _Attempt("sendto with both", 44, 206, (_NOWHERE, 0, 0, MSG_FASTOPEN, 1, 16)),
    _Attempt("sendmsg", 46, 211, (_NOWHERE, 0, 0)),
    _Attempt("sendmsg with MSG_FASTOPEN", 46, 211, (_NOWHERE, 0, MSG_FASTOPEN)),
    _Attempt("sendmmsg", 307, 269, (_NOWHERE, 0, 1, 0)),
    _Attempt("sendmmsg with MSG_FASTOPEN", 307, 269, (_NOWHERE, 0, 1, MSG_FASTOPEN)),
    _Attempt("shutdown of a listener", 48, 210, (_NOWHERE, socket.SHUT_RDWR)),
    _Attempt("setsockopt TCP_FASTOPEN_CONNECT", 54, 208, (_NOWHERE, socket.IPPROTO_TCP, 30, 0, 4)),
)
_FORBIDDEN: Final = (
    _Attempt("ptrace", 101, 117, (_NOWHERE, 0, 0, 0)),
    _Attempt("process_vm_readv", 310, 270, (0, 0, 0, 0, 0, 1)),
    _Attempt("process_vm_writev", 311, 271, (0, 0, 0, 0, 0, 1)),
    _Attempt("process_madvise", 440, 440, (_NOWHERE, 0, 0, 0, 1)),
    _Attempt("pidfd_open", 434, 434, (_NOWHERE, 0)),
    _Attempt("pidfd_getfd", 438, 438, (_NOWHERE, 0, 1)),
    _Attempt("pidfd_send_signal", 424, 424, (_NOWHERE, 0, 0, 0)),
    _Attempt("kcmp", 312, 272, (0x7FFF_FFFF, 0x7FFF_FFFF, 0, 0, 0)),
    _Attempt("io_uring_setup", 425, 425, (0, 0)),
    _Attempt("io_uring_enter", 426, 426, (_NOWHERE, 0, 0, 0, 0, 0)),
    _Attempt("io_uring_register", 427, 427, (_NOWHERE, 0, 0, 0)),
    _Attempt("setns", 308, 268, (_NOWHERE, 0)),
    _Attempt("unshare", 272, 97, (1,)),
    _Attempt("mount", 165, 40, (0, 0, 0, 0, 0)),
    _Attempt("umount2", 166, 39, (0, _NOWHERE)),
    _Attempt("chroot", 161, 51, (0,)),
    _Attempt("bpf", 321, 280, (_NOWHERE, 0, 0)),
    _Attempt("keyctl", 250, 219, (_NOWHERE, 0, 0, 0, 0)),
    _Attempt("add_key", 248, 217, (0, 0, 0, 0, 0)),
    _Attempt("request_key", 249, 218, (0, 0, 0, 0)),
    _Attempt("userfaultfd", 323, 282, (_NOWHERE,)),
    _Attempt("open_by_handle_at", 304, 265, (_NOWHERE, 0, 0)),
    _Attempt("name_to_handle_at", 303, 264, (_NOWHERE, 0, 0, 0, _NOWHERE)),
    _Attempt("perf_event_open", 298, 241, (0, 0, 0, 0, _NOWHERE)),
    _Attempt("execve", 59, 221, (0, 0, 0)),
    _Attempt("execveat", 322, 281, (_NOWHERE, 0, 0, 0, _NOWHERE)),
    _Attempt("clone3", 435, 435, (0, 0), errno.ENOSYS),
    _Attempt("kill", 62, 129, (0x7FFF_FFFF, 0)),
    _Attempt("tgkill", 234, 131, (0x7FFF_FFFF, 0x7FFF_FFFF, 0)),
    _Attempt("sched_setaffinity", 203, 122, (0x7FFF_FFFF, 0, 0)),
    _Attempt("openat to write", 257, 56, (_NOWHERE, 0, os.O_WRONLY, 0)),
    _Attempt("openat to create", 257, 56, (_NOWHERE, 0, os.O_CREAT, 0)),
    _Attempt("openat without a name", 257, 56, (_NOWHERE, 0, os.O_TMPFILE | os.O_RDWR, 0)),
    _Attempt("utimensat", 280, 88, (_NOWHERE, 0, 0, 0)),
    _Attempt("fchmod", 91, 52, (_NOWHERE, 0)),
    _Attempt("fchown", 93, 55, (_NOWHERE, _NOWHERE, _NOWHERE)),
    _Attempt("unlinkat", 263, 35, (_NOWHERE, 0, _NOWHERE)),
    _Attempt("mkdirat", 258, 34, (_NOWHERE, 0, 0)),
    _Attempt("memfd_create", 319, 279, (0, _NOWHERE)),
    _Attempt("mknodat", 259, 33, (_NOWHERE, 0, 0, 0)),
    _Attempt("symlinkat", 266, 36, (0, _NOWHERE, 0)),
    _Attempt("linkat", 265, 37, (_NOWHERE, 0, _NOWHERE, 0, _NOWHERE)),
    _Attempt("shmget", 29, 194, (0, 0, 0)),
    _Attempt("mq_open", 240, 180, (0, 0, 0, 0)),
    _Attempt("init_module", 175, 105, (0, 0, 0)),
    _Attempt("vmsplice", 278, 75, (_NOWHERE, 0, 0, 0)),
)
_LOOSENING: Final = (
    _Attempt("prctl PR_SET_DUMPABLE", 157, 167, (4, 7, 0, 0, 0)),
    _Attempt("prctl PR_SET_PDEATHSIG", 157, 167, (1, 0x7FFF, 0, 0, 0)),
    _Attempt("prctl PR_SET_NAME", 157, 167, (15, 0, 0, 0, 0)),
    _Attempt("prctl PR_SET_PTRACER", 157, 167, (0x59616D61, 0x7FFF_FFFF, 0, 0, 0)),
    _Attempt("prlimit64 with a new limit", 302, 261, (0, 9999, 1, 0)),
    _Attempt("capset", 126, 91, (0, 0)),
    _Attempt("setuid", 105, 146, (0xFFFF_FFFF,)),
    _Attempt("setresgid", 119, 149, (0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF)),
    _Attempt("personality", 135, 92, (0xFFFF_FFFF,)),
    _Attempt("seccomp", 317, 277, (_NOWHERE, 0, 0)),
    _Attempt("fcntl F_SETOWN", 72, 25, (_NOWHERE, 8, 0)),
)
# What a parent needs for its work; the filter takes these from the children that hold content.
_SPARED: Final[Mapping[Role, frozenset[str]]] = {
    "supervisor": frozenset({
        "shutdown of a listener", "sendmsg", "openat to write", "openat to create", "openat without a name", "utimensat",
        "fchmod", "fchown", "unlinkat", "execve", "kill", "prctl PR_SET_PDEATHSIG",
        "prlimit64 with a new limit", "seccomp",
    }),
    "arbiter": frozenset(),     # looked at from outside; it holds no content
    "worker": frozenset(),
    "engine": frozenset({"shutdown of a listener"}),        # it holds none
}
_ATTEMPTS: Final = {Probe.SERVED: _SERVED, Probe.CALLS: _FORBIDDEN, Probe.LOOSENING: _LOOSENING}


def attempted(probe: Probe, role: Role) -> int:
    """Return how many ways a process of this role tries: what its work needs is not among them."""
    return sum(attempt.name not in _SPARED[role] for attempt in _ATTEMPTS[probe])


def _let_through(libc: ctypes.CDLL, attempts: tuple[_Attempt, ...], *, spared: frozenset[str]) -> int:
    return sum(not _refused(libc, attempt) for attempt in attempts if attempt.name not in spared)


def _refused(libc: ctypes.CDLL, attempt: _Attempt) -> bool:
    number = attempt.x86_64 if platform.machine() == "x86_64" else attempt.aarch64
    ctypes.set_errno(0)
    answer = libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in attempt.arguments))
    return bool(answer == -1 and ctypes.get_errno() == attempt.refusal)


def _unix_ways(planted: str) -> int:
    """Count the ways by which a byte gets to a UNIX socket outside: a socket of our own, and a pair turned round."""
    ways = 0
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with contextlib.suppress(OSError):
            socket.socket(socket.AF_UNIX, kind).close()
            ways += 1
    if planted:
        with contextlib.suppress(OSError):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            with ours, theirs:
                ours.sendto(b"probe", planted)
                ways += 1
    return ways


def _can_write(folder: str) -> bool:
    # A file without a name: where it can be made nothing is left of it, not even by a process that may not unlink.
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError:
        return False
    return True


def _can_open(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True

