"""Postures as a supervisor may find them: everything holds, walls are missing, a way out is open; as it tells the pages."""

from __future__ import annotations

import errno
from dataclasses import replace

from appliance.seal.calls import Role
from appliance.seal.confine import Standing
from appliance.seal.posture import FILTERS, Machine, Posture, Threads
from appliance.seal.probes import Probe

_FINE = {**dict.fromkeys(Probe, 0), Probe.PARENT: 9}
_THREADS: dict[Role, int] = {"supervisor": 1, "arbiter": 1, "worker": 7, "engine": 4}

HELD = Posture(
    found={"supervisor": _FINE, "worker": _FINE, "engine": _FINE},
    threads={role: Threads(count, count, count, count) for role, count in _THREADS.items()},
    machine=Machine(),
    digest="ab" * 32, key="cd" * 32,
)
# A hardened host: no user namespaces, no Landlock, and a swap partition that is not encrypted.
_BARE = {**_FINE, Probe.LANDLOCK: errno.EOPNOTSUPP, Probe.MEMORY_LOCK: errno.ENOMEM}
WALLS_MISSING = replace(
    HELD, found={"supervisor": _FINE | {Probe.LANDLOCK: errno.EOPNOTSUPP}, "worker": _BARE, "engine": _BARE},
    standing=Standing(network_namespace=errno.ENOSPC), machine=Machine(interfaces=("eth0", "lo"), swap=("/dev/vda2",)),
)
# The filter is off in the worker: its threads have the supervisor's and the arbiter's only, and two families of sockets open.
OPEN = replace(
    HELD,
    found={"supervisor": _FINE, "worker": {**_FINE, Probe.FAMILIES: 2}, "engine": _FINE},
    threads={**HELD.threads, "worker": Threads(7, 0, 7, 7)},
)
assert set(FILTERS) == set(HELD.threads)


def told(posture: Posture) -> dict[str, object]:
    """Return what the supervisor tells the pages."""
    return {"sealed": posture.sealed, "promises": [promise.as_json() for promise in posture.promises()]}
