"""The kernel calls that each process may make, in groups, each with its reason; everything else is refused.

The lists are allow-lists, so that a call which the kernel learns next year is refused as well. They nest: a filter is inherited
and can only be tightened, so the supervisor's list holds whatever its children still need while they start, and each child
takes the rest away from itself (`seal.confine`). What is on no list is on none on purpose: `connect`, `bind` and `listen` would
make a way out of a socket that is already there, `sendmmsg` and any `sendto` with an address too, `io_uring_*` would do all
that without being seen by a filter, `ptrace`, `process_vm_*` and `pidfd_getfd` reach into another process.

A condition compares an argument of the call as the kernel sees it. A filter cannot follow a pointer, so a call whose danger
lies behind one (`sendmsg` has its address there, `clone3` its flags) is withheld from worker and engine altogether.

Pure data; `docs/seccomp.md` is written from it.
"""

from __future__ import annotations

import socket
import termios
from collections.abc import Iterable
from dataclasses import dataclass
from fcntl import F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_GETLK, F_SETFD, F_SETFL, F_SETLK, F_SETLKW
from typing import Final, Literal

Role = Literal["supervisor", "arbiter", "worker", "engine"]
ROLES: Final[tuple[Role, ...]] = ("supervisor", "arbiter", "worker", "engine")

MSG_FASTOPEN: Final = 0x20000000            # linux/socket.h: data with the first packet, to the address that comes with it
_CLONE_THREAD: Final = 0x00010000           # linux/sched.h
_CLONE_NEW: Final = 0x7E020000              # every CLONE_NEW* that clone(2) takes
_TYPE_MASK: Final = 0xF                     # of socket(2)'s type, less SOCK_CLOEXEC and SOCK_NONBLOCK
# O_ACCMODE, O_CREAT, O_TRUNC, O_APPEND and __O_TMPFILE (asm-generic/fcntl.h)
_OPEN_TO_CHANGE: Final = 0x3 | 0o100 | 0o1000 | 0o2000 | 0o20000000
_FIONBIO, _FIOCLEX, _FIONCLEX, _FIONREAD = 0x5421, 0x5451, 0x5450, 0x541B       # asm-generic/ioctls.h
_F_OFD = (36, 37, 38)                       # F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW (linux/fcntl.h)
# prctl(2), linux/prctl.h
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 1, 2, 3, 4
_PR_CAPBSET_READ, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS, _PR_SET_VMA = 23, 38, 39, 0x53564D41


@dataclass(frozen=True)
class Is:
    """Argument `argument`, less the bits outside `mask`, equals `value`."""

    argument: int
    value: int
    mask: int = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True)
class Allowed:
    """One call, allowed where every condition holds; several entries of one call are alternatives."""

    call: str
    conditions: tuple[Is, ...] = ()


@dataclass(frozen=True)
class Group:
    """Calls that are allowed together, the processes that may make them, and why."""

    title: str
    reason: str
    roles: tuple[Role, ...]
    allowed: tuple[Allowed, ...]


def _plain(calls: str) -> tuple[Allowed, ...]:
    return tuple(Allowed(call) for call in calls.split())


def _where(call: str, argument: int, values: Iterable[int], mask: int = 0xFFFF_FFFF) -> tuple[Allowed, ...]:
    """Return one alternative for each value of a 32-bit argument."""
    return tuple(Allowed(call, (Is(argument, value, mask),)) for value in values)


def _socket_options(*options: tuple[int, int]) -> tuple[Allowed, ...]:
    return tuple(
        Allowed("setsockopt", (Is(1, level, 0xFFFF_FFFF), Is(2, option, 0xFFFF_FFFF))) for level, option in options
    )


_ALL: Final = ROLES
_PAGES: Final[tuple[Role, ...]] = ("supervisor", "arbiter", "worker")
_PARENTS: Final[tuple[Role, ...]] = ("supervisor", "arbiter")

GROUPS: Final[tuple[Group, ...]] = (
    Group(
        "memory", "Python and ONNX Runtime take, move and give back memory; libraries are mapped when a module is imported",
        _ALL, _plain("brk mmap mprotect mremap munmap madvise mbind mincore get_mempolicy"),
    ),
    Group(
        "memory that stays", "SQLCipher locks the pages of its keys and of what it has decrypted",
        _PAGES, _plain("mlock munlock"),
    ),
    Group(
        "threads and waiting", "locks, the clock, sleeping, and the scheduler's view of the cores",
        _ALL,
        _plain(
            "futex set_robust_list get_robust_list rseq sched_yield sched_getaffinity getcpu nanosleep "
            "clock_nanosleep clock_gettime clock_getres gettimeofday time restart_syscall membarrier exit exit_group "
            "set_tid_address arch_prctl"
        ),
    ),
    Group(
        "new threads", "pthread_create. clone3 answers ENOSYS, because its flags lie behind a pointer; glibc then uses clone",
        _ALL, (Allowed("clone", (Is(0, _CLONE_THREAD, _CLONE_THREAD | _CLONE_NEW),)),),
    ),
    Group(
        "signals", "handling them; worker and engine can send none, not even to themselves",
        _ALL, _plain("rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack"),
    ),
    Group(
        "files", "reading modules, templates, the model and the machine's own description; Landlock says which paths",
        _ALL,
        _plain(
            "read pread64 readv write writev close close_range lseek stat fstat lstat newfstatat statx access faccessat "
            "faccessat2 readlink readlinkat getdents64 getcwd dup dup2 dup3 fadvise64"
        ),
    ),
    Group(
        "opening to read",
        "nothing that writes, creates, truncates or makes a file without a name: also where there is no Landlock, worker and "
        "engine can change no file that they do not hold open",
        ("worker", "engine"), (Allowed("openat", (Is(2, 0, _OPEN_TO_CHANGE),)),),
    ),
    Group(
        "opening", "the heartbeat, the folder of the control socket; Landlock says where",
        _PARENTS, _plain("openat"),
    ),
    Group(
        "descriptors", "flags and locks of a descriptor; not F_SETOWN or F_SETSIG, which would signal another process",
        _ALL,
        _where(
            "fcntl", 1,
            (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC, *_F_OFD),
        )
        + _where("ioctl", 1, (_FIONBIO, _FIOCLEX, _FIONCLEX, _FIONREAD, termios.TCGETS, termios.TIOCGWINSZ)),
    ),
    Group(
        "writing to the vault", "the database that the worker was given open, which is ciphertext in memory and has no name",
        _PAGES, _plain("pwrite64 pwritev fsync fdatasync ftruncate fallocate"),
    ),
    Group(
        "making and taking away files",
        "gunicorn's heartbeat, the vault before it loses its name, the control folder. Landlock has no say over modes, owners "
        "and times, so the worker has none of these",
        _PARENTS, _plain("fchmod fchown unlink unlinkat rename renameat2 mkdir rmdir utimensat"),
    ),
    Group(
        "who and where", "identities and limits, read only; prlimit64 of this process, with nothing to set",
        _ALL,
        (
            *_plain(
                "getpid getppid gettid getuid geteuid getgid getegid getgroups getrusage times uname sysinfo capget getsid "
                "getpgid"
            ),
            Allowed("prlimit64", (Is(0, 0, 0xFFFF_FFFF), Is(2, 0))),
        ),
    ),
    Group("randomness", "keys, identifiers and seeds", _ALL, _plain("getrandom")),
    Group(
        "what a process may ask of itself",
        "reading what was set before. Not a name for a thread: everybody on the machine can read it",
        _ALL,
        _where(
            "prctl", 0,
            (_PR_GET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_CAPBSET_READ, _PR_GET_NO_NEW_PRIVS, _PR_SET_VMA),
        ),
    ),
    Group(
        "conversation", "over sockets that are there already. sendto only without an address and without MSG_FASTOPEN: with "
        "either it is a connect by another name",
        _ALL,
        (
            *_plain("recvfrom recvmsg poll ppoll select pselect6 getsockname getpeername getsockopt"),
            Allowed("sendto", (Is(3, 0, MSG_FASTOPEN), Is(4, 0))),
        ),
    ),
    Group(
        "hanging up", "telling the other side that no more comes. Not the receiving half: on the listener that would close the "
        "door and leave a socket that data can be sent from",
        ("arbiter", "worker"), _where("shutdown", 1, (socket.SHUT_WR,)),
    ),
    Group(
        "hanging up on the wire", "both halves of it; the engine holds no listener",
        ("supervisor", "engine"), _plain("shutdown"),
    ),
    Group(
        "answering visitors", "accepting connections and waiting for many of them at once",
        _PAGES,
        (
            *_plain("accept4 epoll_create1 epoll_ctl epoll_wait epoll_pwait pipe2 eventfd2 sendfile"),
            *_where("socketpair", 0, (socket.AF_UNIX,)),
            *_socket_options(
                (socket.SOL_SOCKET, socket.SO_SNDTIMEO), (socket.SOL_SOCKET, socket.SO_RCVTIMEO),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.SOL_SOCKET, socket.SO_LINGER),
                (socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            ),
        ),
    ),
    Group(
        "interpreter's poller", "the selectors module asks once whether epoll is there",
        ("engine",), _plain("epoll_create1"),
    ),
    Group(
        "gunicorn's arbiter",
        "forks the one worker and reaps it",
        _PARENTS,
        (
            *_plain("wait4 waitid kill umask"),
            Allowed("clone", (Is(0, 0, _CLONE_NEW),)),
            *_socket_options((socket.SOL_SOCKET, socket.SO_REUSEADDR)),
        ),
    ),
    Group(
        "closing oneself off", "what worker and arbiter still have to do to themselves: bind to the parent, never be dumpable, "
        "add a filter and a Landlock domain. Each only tightens",
        _PARENTS,
        (
            *_plain("seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self mlockall"),
            Allowed("prctl", (Is(0, _PR_SET_PDEATHSIG, 0xFFFF_FFFF), Is(1, 9))),
            Allowed("prctl", (Is(0, _PR_SET_DUMPABLE, 0xFFFF_FFFF), Is(1, 0))),
            Allowed("prctl", (Is(0, _PR_SET_NO_NEW_PRIVS, 0xFFFF_FFFF), Is(1, 1))),
            Allowed("prlimit64", (Is(0, 0, 0xFFFF_FFFF),)),
        ),
    ),
    Group(
        "starting processes",
        "the supervisor starts engine and pages anew when they end, in groups of their own",
        ("supervisor",), _plain("execve vfork setsid setpgid"),
    ),
    Group(
        "telling systemd", "sd_notify and the journal: datagrams to a path, without connect. Only the supervisor, which never "
        "held a prompt or a picture, can make such a socket",
        ("supervisor",),
        (
            Allowed("socket", (Is(0, socket.AF_UNIX, 0xFFFF_FFFF), Is(1, socket.SOCK_DGRAM, _TYPE_MASK))),
            Allowed("sendmsg", (Is(2, 0, MSG_FASTOPEN),)),
            *_socket_options((socket.SOL_SOCKET, socket.SO_SNDBUF), (socket.SOL_SOCKET, 32)),      # 32: SO_SNDBUFFORCE
        ),
    ),
)


def allowed(role: Role) -> tuple[Allowed, ...]:
    """Return everything that a process may call in this role."""
    return tuple(one for group in GROUPS if role in group.roles for one in group.allowed)


def names(role: Role) -> tuple[str, ...]:
    """Return the names of the calls that a role may make, in alphabetical order."""
    return tuple(sorted({one.call for one in allowed(role)}))
