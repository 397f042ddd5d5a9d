"""What closes a process off, step by step. So far: that it cannot outlive its parent, and leaves no core.

Each function changes the calling process alone and raises `NotSealed` when the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path
from typing import Final

from appliance.errors import NotSealed

_PR_SET_PDEATHSIG: Final = 1      # prctl(2)
_PR_SET_DUMPABLE: Final = 4


def settle(parent: int, *, expendable: bool) -> None:
    """Bind this process to `parent`, forbid its core dumps and, where it is expendable, offer it to the OOM killer.

    In this order: once a process is not dumpable, its files in /proc belong to root and it cannot offer itself any more.
    """
    die_with_parent(parent)
    if expendable:
        volunteer_for_the_oom_killer()
    forbid_core_dumps()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "the kernel refused to bind this process to its parent")
    # A parent that died before the call above sends no signal any more.
    if os.getppid() != parent:
        raise NotSealed("orphan", "the process that started this one is gone")


def forbid_core_dumps() -> None:
    """Set the core limit to 0 and mark the process not dumpable.

    The limit alone does not hold: it is ignored where core_pattern is a pipe (core(5)). Not dumpable also closes
    /proc/PID/mem to other processes of the same user (ptrace(2)).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0, "the kernel refused to mark this process not dumpable")


def volunteer_for_the_oom_killer() -> None:
    """Ask the kernel to take this process first when memory runs out: it can be restarted, its peers hold the pictures."""
    Path("/proc/self/oom_score_adj").write_bytes(b"1000")


def _prctl(option: int, value: int, refusal: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise NotSealed("prctl", f"{refusal}: {os.strerror(ctypes.get_errno())}")
