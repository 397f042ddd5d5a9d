"""The parent of everything that holds content: it binds, spawns, reaps and ends, and never holds any itself.

    supervisor      one thread, no numpy, no pictures, no prompts
    ├── engine      verifies the bundle, then loads it
    └── gunicorn    answers on the listening socket that was made here
        └── worker  the pages and the pictures

In order:

1. Bind the listening socket, so that a port in use is said before anything is started.
2. Start the engine and wait until it has verified and loaded the model. A refusal ends everything with its exit code.
3. Start gunicorn, hand the engine's wire to the worker, and wait until a request is answered.
4. Only then say ready: to systemd where it listens, and to whoever waits for the address.
5. Watch. An engine that ends is replaced, and the worker is given the next one's wire. A worker that ends is a close:
   what it held is gone with it, the engine is ended as well, and both are started afresh. Too many ends in a short time
   end the supervisor too, with exit code 5.
6. On SIGTERM, SIGINT or SIGHUP: end the worker and the engine, reap both, and return.

Engine and worker are told who their parent is, and the kernel ends them with it (`seal.confine`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from types import FrameType
from typing import Final

from appliance.config import Config
from appliance.errors import BadRequest, DarkroomError, EngineError, VerificationRefused
from appliance.evidence.journal import Event, Record, records

CLOSING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NEW_ENGINE: Final = b"E"        # the message that carries an engine's wire to the worker
_GRACE: Final = 1.5             # seconds between asking gunicorn to end and ending it
_START_LIMIT: Final = 600.0     # seconds for verifying and loading a large model
_ANSWER_LIMIT: Final = 30.0     # seconds for the pages to answer
_PAGE_LIMIT: Final = 10.0       # … for one of them, asked for by the supervisor itself
_MOST_ENDS: Final = 5           # of children, within `_ENDS_WINDOW` seconds
_ENDS_WINDOW: Final = 60.0


class _Closing(Exception):      # not an error: the way out of whatever is being waited for
    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _PagesEnded(EngineError):
    """gunicorn ended while something else was being waited for."""

    def __init__(self) -> None:
        super().__init__("start", "the pages ended while they were being started")


def serve(config: Config, *, ready: Callable[[str], None], publish: Callable[[Record], None]) -> None:
    """Run the appliance until it is told to close.

    `ready` is called with the address once a request has been answered. Raises `BadRequest` where the port cannot be had,
    `VerificationRefused` where the model is not what a trusted key signed, `EngineError` where children keep ending.
    """
    with listen(config.host, config.port) as listener, closing(_Signals()) as signals:
        _Supervisor(config, listener, signals, ready, publish).run()


def listen(host: str, port: int) -> socket.socket:
    """Return a bound, listening TCP socket. Raises `BadRequest`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # So that a restart does not wait for the last connections' TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise BadRequest(
            "listen", f"{host} port {port} cannot be listened on: {(error.strerror or 'unknown').lower()}",
            hint="end the other program, or choose another port with --port",
        ) from None
    return listener


def allowed_hosts(listener: socket.socket, host: str) -> tuple[str, ...]:
    """Return the Host values under which the pages answer: the name that was asked for, and those of loopback."""
    port = listener.getsockname()[1]
    names = {"127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host}
    return tuple(sorted(f"{name}:{port}" for name in names) + (sorted(names) if port == 80 else []))


def address(listener: socket.socket, host: str) -> str:
    """Return the address to open in a browser."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"


class _Signals:
    """The closing signals, written down when they come and acted on where the supervisor waits.

    A handler that raised would be lost in a destructor, and would tear up whatever was half done.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.fd, self._end = os.pipe()
        os.set_blocking(self._end, False)
        signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)
        self._before = {signum: signal.signal(signum, self._write_down) for signum in CLOSING}

    def _write_down(self, signum: int, _: FrameType | None) -> None:
        self.received = self.received or signum

    def close(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._end)


class _Supervisor:
    """The children and the pipes to them; one thread."""

    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        signals: _Signals,
        ready: Callable[[str], None],
        publish: Callable[[Record], None],
    ) -> None:
        self._config = config
        self._listener = listener
        self._signals = signals
        self._ready = ready
        self._publish = publish
        self._events, self._events_end = os.pipe()
        os.set_blocking(self._events, False)
        self._unread = bytearray()
        self._engine: subprocess.Popen[bytes] | None = None
        self._pages: subprocess.Popen[bytes] | None = None
        self._wire: socket.socket | None = None         # the worker's end of the running engine's wire
        self._link: socket.socket | None = None         # to the worker
        self._ends: deque[float] = deque(maxlen=_MOST_ENDS)

    def run(self) -> None:
        try:
            self._open()
            notify("READY=1")
            self._ready(address(self._listener, self._config.host))
            while True:
                self._watch()
        except _Closing as told:
            notify("STOPPING=1")
            started = time.monotonic()
            self._end_everything()
            self._publish(Record(Event.CLOSED, told.signum, round(1000 * (time.monotonic() - started))))
        finally:
            self._end_everything()
            for fd in (self._events, self._events_end):
                os.close(fd)

    # ── Starting ──────────────────────────────────────────────────────────────

    def _open(self) -> None:
        """Start the engine, then the pages; return when both have said that they are ready and a page was answered."""
        self._start_engine()
        self._start_pages()
        self._hand_over_engine()
        self._ask_for_a_page()

    def _start_engine(self) -> None:
        config = self._config
        ours, theirs = socket.socketpair()
        command = [
            "engine", "--bundle", str(config.bundle), "--wire", str(theirs.fileno()), "--events", str(self._events_end),
            *(argument for key in config.trust for argument in ("--trust", str(key))),
            *(("--threads", str(config.threads)) if config.threads else ()),
        ]
        with theirs:
            self._engine = _spawn(command, theirs.fileno(), self._events_end)
        self._wire = ours
        self._await(Event.ENGINE_READY, _START_LIMIT)

    def _start_pages(self) -> None:
        ours, theirs = socket.socketpair()
        command = [
            "pages", "--listener", str(self._listener.fileno()), "--link", str(theirs.fileno()),
            "--events", str(self._events_end), "--queue", str(self._config.queue),
            "--memory-for-pictures", str(self._config.memory_for_pictures),
            *(argument for host in allowed_hosts(self._listener, self._config.host) for argument in ("--host", host)),
        ]
        with theirs:
            self._pages = _spawn(command, self._listener.fileno(), theirs.fileno(), self._events_end)
        self._link = ours
        self._await(Event.WORKER_READY, _ANSWER_LIMIT)

    def _hand_over_engine(self) -> None:
        if self._link is None or self._wire is None:
            raise _PagesEnded
        socket.send_fds(self._link, [NEW_ENGINE], [self._wire.fileno()])
        # The worker holds the only end now: its wire closes when the engine does, and the other way round.
        self._wire.close()
        self._wire = None
        self._await(Event.WORKER_HAS_ENGINE, _ANSWER_LIMIT)

    def _ask_for_a_page(self) -> None:
        """Ask for a page as a browser would: ready is what was answered, not what was started."""
        host, port = self._listener.getsockname()[:2]
        name = allowed_hosts(self._listener, self._config.host)[0]
        try:
            with socket.create_connection((host, port), timeout=_PAGE_LIMIT) as connection:
                connection.sendall(f"GET /static/ready.txt HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode("ascii"))
                answer = connection.recv(64)
        except OSError as error:
            raise EngineError("pages", f"the pages do not answer: {error.strerror or 'timed out'}") from None
        if b" 200 " not in answer.split(b"\r\n", 1)[0]:
            raise EngineError("pages", "the pages do not answer as they should")

    # ── Watching ──────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        """Publish what is said and see to who has ended; returns after at most a quarter of a second."""
        for record in self._heard(0.25):
            self._publish(record)
        if self._pages is not None and self._pages.poll() is not None:
            self._begin_afresh()
        elif self._engine is not None and self._engine.poll() is not None:
            self._replace_engine()

    def _replace_engine(self) -> None:
        """Start the next engine for the worker that is there, again and again while engines keep ending."""
        while True:
            if self._engine is not None:
                self._publish(Record(Event.ENGINE_ENDED, self._engine.poll() or 0))
                _end(self._engine, 0)
            self._count_an_end()
            try:
                self._start_engine()
                self._hand_over_engine()
            except (_PagesEnded, OSError):
                # The engine had ended because its worker did, which shows a moment later.
                self._begin_afresh()
            except EngineError:
                continue
            return

    def _begin_afresh(self) -> None:
        """Close, since the worker has ended and what it held is gone, and open again."""
        while True:
            if self._pages is not None:
                self._publish(Record(Event.WORKER_ENDED, self._pages.poll() or 0))
            self._count_an_end()
            self._end_everything()
            try:
                self._open()
            except (EngineError, OSError):
                continue
            return

    def _await(self, event: Event, limit: float) -> None:
        """Return when a child says `event`; raise as soon as one ends instead, or when `limit` seconds have passed."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            heard = self._heard(0.1)
            for record in heard:
                self._publish(record)
            if any(record.event == event for record in heard):
                return
            if self._pages is not None and self._pages.poll() is not None:
                raise _PagesEnded
            if self._engine is not None and (status := self._engine.poll()) is not None:
                raise _reason(status)
        raise EngineError("start", f"{event.name.lower().replace('_', ' ')} was waited for longer than {limit:.0f} seconds")

    def _heard(self, seconds: float) -> list[Record]:
        """Return the events that children have said, waiting at most `seconds` for the first. Raises `_Closing`."""
        readable: list[int] = []
        if self._signals.received is None:
            readable, _, _ = select.select([self._events, self._signals.fd], [], [], seconds)
        if self._signals.received is not None:
            raise _Closing(self._signals.received)
        if self._events in readable:
            self._unread += os.read(self._events, 4096)
        return list(records(self._unread))

    def _count_an_end(self) -> None:
        now = time.monotonic()
        self._ends.append(now)
        if len(self._ends) == _MOST_ENDS and now - self._ends[0] < _ENDS_WINDOW:
            raise EngineError(
                "restarts", f"the appliance's processes ended {_MOST_ENDS} times within {_ENDS_WINDOW:.0f} seconds",
                hint="look at the events above; a model that is too large for this machine's memory is a common cause",
            )

    # ── Ending ────────────────────────────────────────────────────────────────

    def _end_everything(self) -> None:
        """End and reap every child: the worker is asked first, so that an answer under way can finish."""
        if self._pages is not None:
            _end(self._pages, _GRACE)
        if self._engine is not None:
            _end(self._engine, 0)
        self._pages = self._engine = None
        for end in (self._wire, self._link):
            if end is not None:
                end.close()
        self._wire = self._link = None


def _spawn(command: list[str], *descriptors: int) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl+C at the terminal reaches the supervisor alone, who ends its children in order.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "appliance", *command, "--supervisor", str(os.getpid())],
        pass_fds=descriptors, stdin=subprocess.DEVNULL, start_new_session=True, env=_environment(),
    )


def _environment() -> dict[str, str]:
    """Return what a child needs and nothing of systemd's: gunicorn would take NOTIFY_SOCKET and LISTEN_FDS for its own."""
    kept = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TZ", "HOME")
    given = {name: os.environ[name] for name in kept if name in os.environ}
    return given | {"PYTHONDONTWRITEBYTECODE": "1", "ORT_DISABLE_TELEMETRY": "1"}      # see appliance.engine


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    if child.returncode is not None:
        return      # reaped already; whatever it had started dies with it (PDEATHSIG)
    if grace:
        child.terminate()
    until = time.monotonic() + grace
    # Looked at without being reaped: as long as it is not, its process group cannot be another one's.
    while time.monotonic() < until and os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _reason(status: int) -> DarkroomError:
    """Return the error that a child's exit status stands for; the child has said the sentence on standard error."""
    if status == VerificationRefused.exit_code:
        return VerificationRefused("model", "model", "was refused, for the reason above")
    if status == BadRequest.exit_code:
        return BadRequest("model", "the model could not be opened, for the reason above")
    return EngineError("start", f"a process of the appliance ended with status {status} while it was being started")


def notify(state: str) -> None:
    """Tell systemd, where it listens (sd_notify(3))."""
    if "NOTIFY_SOCKET" in os.environ:
        from systemd import daemon

        daemon.notify(state)
