"""The closing signals, and the way out that they open."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Final

CLOSING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Closing(Exception):      # not an error: the way out of whatever is being waited for
    """A closing signal has come."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """The closing signals, written down when they come and acted on where the supervisor waits.

    A handler that raised would be lost in a destructor, and would tear up whatever was half done.
    """

    def __init__(self) -> None:
        """Begin to listen; `fd` becomes readable when a signal comes."""
        self.received: int | None = None
        self.fd, self._end = os.pipe()
        os.set_blocking(self._end, False)
        signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)
        self._before = {signum: signal.signal(signum, self._write_down) for signum in CLOSING}

    def _write_down(self, signum: int, _: FrameType | None) -> None:
        self.received = self.received or signum

    def close(self) -> None:
        """Put back what was there before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._end)
