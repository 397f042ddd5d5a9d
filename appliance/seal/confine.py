"""What closes a process off, step by step; each function changes the calling process alone.

The supervisor, with one thread and before it has started anything (`close_off_supervisor`):

1. Part from the network: a user namespace where it is needed, then network and IPC namespaces of its own, with nothing in them.
2. Give up every capability, also those that a program with file capabilities could bring back.
3. Forbid new privileges, core dumps and being read by others of the same user.
4. Restrict files (Landlock), then calls (seccomp), on every thread.

Worker, arbiter and engine inherit all of that and take more away, each with its own wall (`close_off_child`): bind to the
parent, offer itself to the OOM killer where it is expendable, forbid dumps again (an exec allows them anew), lock its memory
(locks are not inherited), restrict files, restrict calls.

The order is not free. Not dumpable makes the id maps unwritable, so namespaces come first; a new user namespace brings a full
set of capabilities, so they are dropped after it; Landlock and the filter need no-new-privileges. Namespaces and Landlock bind
the calling thread alone, so a second thread is a refusal.

A hardened host may have switched user namespaces or Landlock off. Those two walls may be missing: the functions return the errno,
and the posture says so. A filter or no-new-privileges that cannot be had raises `NotSealed`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.errors import NotSealed

_PR_SET_PDEATHSIG: Final = 1            # prctl(2)
_PR_GET_PDEATHSIG: Final = 2
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000       # unshare(2)
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522                                         # capset(2)
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4                                       # mlockall(2)
_SECCOMP_SET_MODE_FILTER: Final = 1                                                     # seccomp(2)
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
# seccomp, landlock_restrict_self: the C library has no function for them. Landlock's number is the same on every machine.
_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_LANDLOCK_RESTRICT_SELF: Final = 446


@dataclass(frozen=True)
class Standing:
    """What only the one who closed a process off could see.

    Walls that may be missing: 0, or the errno with which the kernel refused. And the signal that comes when the parent ends,
    read back from the thread that it was set on: no other thread has it.
    """

    network_namespace: int = 0
    landlock: int = 0
    memory_lock: int = 0
    filters_before: int = 0     # seccomp filters that were there already
    parent_signal: int = 0


def close_off_supervisor(*, filter_fd: int, ruleset_fd: int | None, no_landlock: int) -> Standing:
    """Close this process off, and everything that it will start. Raises `NotSealed`."""
    assert_single_thread()
    network = part_from_the_network()
    lift_the_memory_limit()
    drop_capabilities()
    forbid_new_privileges()
    forbid_core_dumps()
    landlock = no_landlock if ruleset_fd is None else restrict_files(ruleset_fd)
    filters_before = filters_in_force()
    restrict_calls(filter_fd)
    return Standing(network, landlock, filters_before=filters_before)


def close_off_child(
    parent: int, *, expendable: bool, filter_fd: int, ruleset_fd: int | None, forked: bool = False
) -> Standing:
    """Close this process off further than the one who started it is. Raises `NotSealed`.

    A process that was just `forked` has one thread, and cannot look at /proc any more where its parent could not. The
    descriptors of the walls are closed: they have done what they are for.
    """
    if not forked:
        assert_single_thread()
    settle(parent, expendable=expendable)
    memory = lock_memory()
    landlock = errno.ENOSYS if ruleset_fd is None else restrict_files(ruleset_fd)
    restrict_calls(filter_fd)
    for fd in (filter_fd, ruleset_fd):
        if fd is not None:
            os.close(fd)
    return Standing(landlock=landlock, memory_lock=memory, parent_signal=_parent_signal())


def fall_silent() -> None:
    """Put /dev/null in the place of standard output and standard error.

    They are the supervisor's: a terminal, or the journal's socket. A process that was taken over could say there what it
    likes. Call this before the calls are restricted, or while nothing has been received that could be told.
    """
    nowhere = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)       # what is written to it fails, and that is nobody's loss
    for fd in (1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)


def settle(parent: int, *, expendable: bool) -> None:
    """Bind this process to `parent`, forbid its core dumps and, where it is expendable, offer it to the OOM killer.

    In this order: once a process is not dumpable, its files in /proc belong to root and it cannot offer itself any more.
    """
    die_with_parent(parent)
    if expendable:
        volunteer_for_the_oom_killer()
    forbid_core_dumps()


def assert_single_thread() -> None:
    """Raise `NotSealed` where a second thread runs: a namespace or a ruleset would not bind it."""
    threads = len(os.listdir("/proc/self/task"))        # noqa: PTH208     # names are enough
    if threads != 1:
        raise NotSealed("threads", f"the process has {threads} threads and must have one to be closed off")


def part_from_the_network() -> int:
    """Move into a network and an IPC namespace with nothing in them; return 0, or the errno of a host that allows none.

    Sockets that are open already stay what they are (that is how visitors are answered, and why the filter is needed).
    """
    refused = _unshare(_CLONE_NEWNET | _CLONE_NEWIPC)
    if refused != errno.EPERM:
        return refused
    uid, gid = os.geteuid(), os.getegid()
    if refused := _unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC):
        return refused
    with contextlib.suppress(OSError):      # unmapped ids only look like nobody's
        Path("/proc/self/setgroups").write_bytes(b"deny")       # user_namespaces(7): before gid_map, for an ordinary user
        Path("/proc/self/uid_map").write_bytes(b"%d %d 1" % (uid, uid))
        Path("/proc/self/gid_map").write_bytes(b"%d %d 1" % (gid, gid))
    return 0


def lift_the_memory_limit() -> None:
    """Let this process and its children lock all of their memory, where it may still decide that (CAP_SYS_RESOURCE)."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def drop_capabilities() -> None:
    """Empty the bounding, ambient, permitted, effective and inheritable sets (capabilities(7)). Raises `NotSealed`."""
    for capability in range(64):
        if _libc().prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == 0:
            continue
        if ctypes.get_errno() == errno.EINVAL:
            break           # past the last one that this kernel knows
        if ctypes.get_errno() != errno.EPERM:       # an ordinary user may not: there is none to be had by exec then either
            raise _refusal("capabilities", "the kernel refused to shrink the bounding set")
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, "the kernel refused to clear the ambient set")
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if _libc().capset(header, nothing) != 0:
        raise _refusal("capabilities", "the kernel refused to take the capabilities")


def forbid_new_privileges() -> None:
    """See to it that no exec gives more than this process has (PR_SET_NO_NEW_PRIVS). Raises `NotSealed`."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "the kernel refused to forbid new privileges")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "the kernel refused to bind this process to its parent")
    # A parent that died before the call above sends no signal any more.
    if os.getppid() != parent:
        raise NotSealed("orphan", "the process that started this one is gone")


def _parent_signal() -> int:
    signum = ctypes.c_int(0)
    return signum.value if _libc().prctl(_PR_GET_PDEATHSIG, ctypes.byref(signum), 0, 0, 0) == 0 else -1


def forbid_core_dumps() -> None:
    """Set the core limit to 0 and mark the process not dumpable.

    The limit alone does not hold: it is ignored where core_pattern is a pipe (core(5)). Not dumpable also closes
    /proc/PID/mem to other processes of the same user (ptrace(2)).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0, "the kernel refused to mark this process not dumpable")


def volunteer_for_the_oom_killer() -> None:
    """Ask the kernel to take this process first when memory runs out: it can be restarted, its peers hold the pictures.

    Where the supervisor runs as root, its Landlock domain forbids writing anywhere in /proc, and so this too.
    """
    with contextlib.suppress(PermissionError):
        Path("/proc/self/oom_score_adj").write_bytes(b"1000")


def lock_memory() -> int:
    """Keep every page of this process out of swap, as it is first used; return 0, or the errno (ENOMEM: the limit)."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        return errno.ENOMEM     # under a limit, memory that is there could not be had any more later on (mlockall(2))
    return 0 if _libc().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0 else ctypes.get_errno()


def restrict_files(ruleset_fd: int) -> int:
    """Enter the Landlock domain of a ruleset (landlock_restrict_self(2)); return 0. Raises `NotSealed`."""
    if _libc().syscall(_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset_fd), 0) != 0:
        raise _refusal("landlock", "the kernel made a Landlock ruleset and refuses to enter it")
    return 0


def filters_in_force() -> int:
    """Return how many filters others have put on this process before: a container's, a unit's (proc(5), Seccomp_filters)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = [line.partition(":")[2] for line in status.splitlines() if line.startswith("Seccomp_filters:")]
    return int(found[0]) if found else 0


class _Program(ctypes.Structure):
    """struct sock_fprog (linux/filter.h)."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def restrict_calls(filter_fd: int) -> None:
    """Put the seccomp program behind `filter_fd` on every thread of this process (seccomp(2), TSYNC). Raises `NotSealed`."""
    number = _SECCOMP.get(platform.machine())
    if number is None:
        raise NotSealed("filter", f"no filter is known for the architecture {platform.machine()}")
    instructions = os.pread(filter_fd, os.fstat(filter_fd).st_size, 0)
    program = _Program(len(instructions) // 8, instructions)        # struct sock_filter is 8 bytes
    # A positive answer is the thread that could not be brought along.
    if _libc().syscall(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(program)) != 0:
        raise _refusal("filter", "the kernel refused the filter of calls")


def _unshare(flags: int) -> int:
    return 0 if _libc().unshare(flags) == 0 else ctypes.get_errno()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, refusal: str) -> None:
    if _libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise _refusal("prctl", refusal)


def _refusal(reason: str, sentence: str) -> NotSealed:
    return NotSealed(reason, f"{sentence}: {os.strerror(ctypes.get_errno())}")
