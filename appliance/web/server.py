"""gunicorn, told to be small: one worker with threads, on a socket that it was given, saying nothing.

gunicorn is an arbiter that forks one worker. The worker holds the pictures; the arbiter holds nothing. Both are under a
supervisor of ours, and gunicorn's own ways of listening, logging and being controlled are off:

1. The socket comes as `fd://N`; gunicorn opens none, and its control socket is disabled.
2. Its messages quote request lines and exceptions, so they go nowhere: `_Silence` says at most that a request failed.
3. Its heartbeat is off; the file that it makes for one all the same lies in /dev/shm, which is memory.
4. Its worker is ours (`patience`): a thread is for a request that is there whole, within limits of size and time.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flask import request
from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger

from appliance.engine.jobs import JobQueue
from appliance.evidence.journal import Event, EventPipe
from appliance.seal.confine import Standing, close_off_child, fall_silent
from appliance.vault.volume import Vault
from appliance.web.attendant import Admitted, Attendant
from appliance.web.patience import PatientWorker
from appliance.web.room import Seal

THREADS: Final = 64         # a stream takes one each while it lasts
STREAMS: Final = 24
CONNECTIONS: Final = 512    # in all; what happens when every place is taken is said in `patience`
_LOOKED_AT_WITHIN: Final = 60.0       # seconds; whoever comes earlier waits, for a page that is true
_MEMORY: Final = "/dev/shm"     # noqa: S108     # a file system in memory


@dataclass(frozen=True)
class Descriptors:
    """What the supervisor hands down: listener, its link to the worker, the event pipe, and the walls of both processes.

    A wall is a filter and a ruleset, None where the kernel has no Landlock.
    """

    listener: int
    link: int
    events: int
    arbiter: tuple[int, int | None]
    worker: tuple[int, int | None]


@dataclass(frozen=True)
class Limits:
    """How many jobs may wait, how many bytes of pictures are kept, and the values of Host that are answered."""

    queue: int
    memory_for_pictures: int
    hosts: tuple[str, ...]


def serve(limits: Limits, descriptors: Descriptors, *, supervisor: int) -> None:
    """Run gunicorn until it is told to end."""
    filter_fd, ruleset_fd = descriptors.arbiter
    close_off_child(supervisor, expendable=False, filter_fd=filter_fd, ruleset_fd=ruleset_fd)
    _Application(limits, descriptors).run()


def _closed_until_seen(seal: Seal) -> tuple[str, int, dict[str, str]] | None:
    """Let everybody wait until the supervisor has looked at the seal, except for itself, who asks whether pages come."""
    if seal.seen is not None or request.path == "/static/ready.txt" or seal.wait(_LOOKED_AT_WITHIN):
        return None
    return "Darkroom is being sealed. Try again in a moment.\n", 503, {"Retry-After": "2", "Content-Type": "text/plain"}


class _Silence(Logger):      # type: ignore[misc]     # gunicorn publishes no types
    """A gunicorn logger that has no place to write to: what it is given may quote a request."""

    def setup(self, cfg: Any) -> None:      # noqa: ARG002     # gunicorn's name for it
        self.error_log.handlers = self.access_log.handlers = []
        self.error_log.propagate = self.access_log.propagate = False
        self.error_log.disabled = self.access_log.disabled = True

    def access(self, *_: Any, **__: Any) -> None:
        return

    def reopen_files(self) -> None:
        return

    def close_on_exec(self) -> None:
        return


class _Application(BaseApplication):      # type: ignore[misc]     # gunicorn publishes no types
    """Darkroom under gunicorn; what the worker holds is made in the worker, after the fork."""

    def __init__(self, limits: Limits, descriptors: Descriptors) -> None:
        self._limits = limits
        self._descriptors = descriptors
        self._arbiter = os.getpid()
        self._standing = Standing()     # of the worker, and the worker itself: set after the fork
        self._worker: Any = None
        self._vault: Vault | None = None
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, object] = {
            "bind": f"fd://{self._descriptors.listener}",
            "workers": 1,
            "worker_class": PatientWorker,
            "threads": THREADS,
            "worker_connections": CONNECTIONS,
            "sendfile": False,                # what is sent goes through the worker's own outlet
            "worker_tmp_dir": _MEMORY,        # the arbiter's heartbeat file holds nothing
            "control_socket_disable": True,
            "logger_class": _Silence,
            "accesslog": None,
            "timeout": 0,                     # the supervisor sees to it whether the worker lives, so there is no heartbeat
            "graceful_timeout": 1,
            "keepalive": 5,
            "limit_request_line": PatientWorker.patience.sizes.line,
            "limit_request_fields": 48,
            "limit_request_field_size": 4096,
            "forwarded_allow_ips": "",
            "preload_app": False,
            "post_fork": self._in_worker,
            "child_exit": self._worker_ended,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def _in_worker(self, _arbiter: object, worker: Any) -> None:
        # Before the walls: the worker may then write to no path at all. What it holds open has no name any more, so that
        # however it ends the kernel takes it back, and it was ciphertext in memory all along.
        folder = Path(tempfile.mkdtemp(prefix="darkroom-", dir=_MEMORY))
        try:
            self._vault = Vault.ephemeral(folder, capacity=self._limits.memory_for_pictures)
        finally:
            for file in folder.iterdir():
                file.unlink()
            above = os.open(_MEMORY, os.O_RDONLY | os.O_DIRECTORY)
            os.rmdir(folder.name, dir_fd=above)     # unlinkat: the filter has no rmdir
            os.close(above)
        fall_silent()
        filter_fd, ruleset_fd = self._descriptors.worker
        self._standing = close_off_child(
            self._arbiter, expendable=False, filter_fd=filter_fd, ruleset_fd=ruleset_fd, forked=True
        )
        self._worker = worker

    def _admit(self, connection: socket.socket) -> None:
        """Let a connection in as if the listener had accepted it, on the worker's own thread."""
        self._worker.method_queue.defer(self._worker.accept, Admitted(connection))

    def _worker_ended(self, _arbiter: object, _worker: object) -> None:
        # A worker that ended took the pictures with it: that is a close. gunicorn would fork another one, whose link and
        # engine are somebody else's past, so the arbiter ends too and the supervisor starts afresh.
        os._exit(1)

    def load(self) -> Callable[..., Any]:
        from appliance.web.app import WebSettings, create_app

        events = EventPipe(self._descriptors.events)
        vault = self._vault
        assert vault is not None    # noqa: S101     # gunicorn loads the application after post_fork
        jobs = JobQueue(
            vault,
            capacity=self._limits.queue,
            on_engine=lambda there: events.say(Event.WORKER_HAS_ENGINE if there else Event.WORKER_LOST_ENGINE),
        )
        seal = Seal()
        app = create_app(
            jobs=jobs,
            vault=vault,
            settings=WebSettings(allowed_hosts=self._limits.hosts, most_streams=STREAMS),
            on_failure=lambda status: events.say(Event.REQUEST_FAILED, status),
            seal=seal,
        )
        app.before_request(lambda: _closed_until_seen(seal))
        Attendant(socket.socket(fileno=self._descriptors.link), self._standing, jobs, seal, self._admit).start()
        events.say(Event.WORKER_READY, os.getpid())
        return app
