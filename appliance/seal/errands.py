"""Where each process tries to get to when it probes itself: places that are none of its own, and the other processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import appliance
from appliance.seal.calls import Role
from appliance.seal.control import PLANTED, PRIVATE
from appliance.seal.probes import Errand

_OUTSIDE: Final = ("/", "/tmp", "/var/tmp", "/dev/shm", "/run", "/etc", "/var/lib")     # noqa: S108     # tried, to no avail


def places_outside(bundle: Path) -> tuple[str, ...]:
    """Return the folders that no process has any business writing to; looked up once, since a working folder may go."""
    home = (os.environ["HOME"],) if "HOME" in os.environ else ()
    return (*_OUTSIDE, *home, str(Path.cwd()), str(Path(appliance.__file__).parent), str(bundle))


def errands_for(pids: Mapping[Role, int], places: tuple[str, ...], bundle: Path, control: Path) -> dict[Role, Errand]:
    """Return what supervisor, worker and engine are to try; `control` is the folder of this appliance's control socket."""
    private, planted = str(control / PRIVATE), str(control / PLANTED)

    def others(role: Role) -> tuple[int, ...]:
        return tuple(pid for other, pid in pids.items() if other != role and pid)

    return {
        # gunicorn's heartbeat is made in /dev/shm, so that lies within the domain which its parent passes on.
        "supervisor": Errand(write=tuple(place for place in places if place != "/dev/shm")),       # noqa: S108
        "worker": Errand(
            (*places, str(control)), (private, str(bundle / "model.json"), str(bundle / "model.sig")), others("worker"), planted
        ),
        "engine": Errand((*places, str(control)), (private,), others("engine"), planted),
    }
