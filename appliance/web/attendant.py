"""The worker's end of the link to its supervisor: engines, visits, probes, and what was found of the seal.

    ENGINE      the wire of an engine, for the queue
    VISIT       a connection as if somebody had come in at the door: the supervisor asks for a page itself, to see life
    PROBE       try the ways out from here, and report
    POSTURE     what the supervisor has seen, for the pages

A link that ends, or that is silent for too long, ends the worker: a supervisor that is stopped cannot close anything any more.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

from appliance.engine.jobs import JobQueue
from appliance.link import ENGINE, LARGEST_MESSAGE, POSTURE, PROBE, REPORT, VISIT
from appliance.seal.confine import Standing
from appliance.seal.probes import Errand, pack, probe_self
from appliance.web.room import Seal

_SILENCE: Final = 120.0     # seconds; the supervisor makes a visit every few


class Attendant:
    """Serves the link on a thread of its own."""

    def __init__(
        self, link: socket.socket, standing: Standing, jobs: JobQueue, seal: Seal, admit: Callable[[socket.socket], None]
    ) -> None:
        """Take the link over; `admit` lets a connection in as if the listener had accepted it."""
        link.settimeout(_SILENCE)
        self._link = link
        self._standing = standing
        self._jobs = jobs
        self._seal = seal
        self._admit = admit

    def start(self) -> None:
        """Begin to serve."""
        threading.Thread(target=self._serve, name="supervisor-link", daemon=True).start()

    def _serve(self) -> None:
        try:
            while True:
                message, descriptors, _, _ = socket.recv_fds(self._link, LARGEST_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
                if not message or not self._take(message[:1], message[1:], descriptors):
                    break
        finally:
            # A worker that can be given no engine any more would show "being started" for ever; its end is a close.
            os._exit(1)

    def _take(self, kind: bytes, rest: bytes, descriptors: list[int]) -> bool:
        if kind == ENGINE and len(descriptors) == 1:
            self._jobs.attach(socket.socket(fileno=descriptors[0]))
        elif kind == VISIT and len(descriptors) == 1:
            self._admit(socket.socket(fileno=descriptors[0]))
        elif kind == PROBE:
            found = probe_self("worker", Errand.unpack(rest), self._standing)
            self._link.send(REPORT + pack(found))
        elif kind == POSTURE:
            self._seal.show(json.loads(rest))
        else:
            return False
        return True


class Admitted:
    """Looks to gunicorn's worker like a listener that has just accepted one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the connection, and the address of nobody in particular."""
        return self._connection, ("127.0.0.1", 0)

    def getsockname(self) -> tuple[str, int]:
        """Return where it came in."""
        return ("127.0.0.1", 0)
