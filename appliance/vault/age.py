"""How long and how much is kept, and a clock for it that never steps back.

A wall clock can be set back, and CLOCK_BOOTTIME begins anew at each boot. `Age` counts whichever has moved more since it was last
asked, and is itself kept in the vault. So a wall clock that is set forward ends pictures early, and one that is set back keeps
none longer. One thing is not counted: the time that a machine was off, when its clock was set back meanwhile.

>>> age = Age(lambda: (1000.0, 50.0), None)
>>> age.advance()
(0.0, 1000.0, 50.0)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], tuple[float, float]]       # Unix time and CLOCK_BOOTTIME, in seconds


@dataclass(frozen=True)
class Retention:
    """How long and how much is kept, None for no limit: seconds, pictures, bytes; over every session together."""

    age: float | None = None
    count: int | None = None
    size: int | None = None


def clock() -> tuple[float, float]:
    """Return Unix time, and the seconds since this boot with those of a suspend."""
    return time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)


class Age:
    """Seconds that have passed for the vault, at least: a number that never steps back."""

    def __init__(self, read: Clock, kept: tuple[float, float, float] | None) -> None:
        """Go on from what was kept: seconds, Unix time and CLOCK_BOOTTIME of the last time; None begins at nothing."""
        self.read = read
        self.seconds, self._wall, self._boot = kept or (0.0, *read())

    def advance(self) -> tuple[float, float, float]:
        """Count what has passed since the last time and return what is to be kept."""
        wall, boot = self.read()
        # After a boot CLOCK_BOOTTIME begins anew. If it is less than it was, all of it has passed since; if it is more, the
        # difference is still no more than what has passed.
        passed = boot - self._boot if boot >= self._boot else boot
        self.seconds += max(wall - self._wall, passed)
        self._wall, self._boot = wall, boot
        return self.seconds, wall, boot
