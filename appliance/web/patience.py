"""A gunicorn worker that waits for many and is held up by none: a thread is for a request that is there, and for nothing else.

gunicorn's `gthread` reads a request and writes its answer on one of its threads, at the speed of whoever is at the other
end: as many slow connections as there are threads stop it. Here one thread, the poller, does all the waiting, and the
threads only compute:

1. *Arriving.* The poller accepts, reads without blocking, and keeps in memory what came (`arrival`), never on a disk. A
   head has `head_seconds` from its first byte (from the accept, on a new connection), a body that long again and its
   length at `rate`; then 408. What is too large is refused as soon as that is clear.
2. *Working.* A whole request goes to a thread. What the thread writes is sent while the kernel takes it and kept
   otherwise (`Outlet`): the thread is free when the answer is made, not when it was read. An answer that is being made
   while too much of it is unread, which is a stream with a dead reader or a very large one, waits for its reader within the
   time of 3 and then fails.
3. *Answering.* The poller sends the rest. All of an answer must have been taken within `answer_seconds` and its length at
   `rate`; a reader that is slower is cut off.
4. *Idle.* A connection that is kept alive waits for its next request as long as gunicorn's `keepalive` says.
5. *Leaving.* After the last answer the poller reads what still comes, for a moment and a few megabytes: a socket closed over
   unread bytes sends a reset, which can take the answer away from the one who was reading it (RFC 9112, 9.6).

No limit is moved by sending a byte: time runs from the stage's beginning. When every place is taken, the connection whose
last completed request (its accept, if it has completed none) lies furthest back makes room for the newcomer. Completing is
what someone who only wants to hold a place avoids, and a visitor does at once: a browser sends its request in one piece
within a round trip, and what is there on accepting goes to a thread without ever being up for eviction. Bytes are no
measure, since a byte a second is bought cheaply; being young is none, since a flood is always younger. If a kept-alive
connection of a visitor's is the one to go, nothing is lost: between requests a client must expect that (RFC 9112, 9.5).

What this relies on of gunicorn 27.0.1, read and pinned (`READ_AGAINST`, and a test that compares): `ThreadWorker.run`,
`set_accept_enabled`, `enqueue_req`, `poller`, `method_queue`, `tpool`, `nr_conns`, `worker_connections`,
`handle_request(req, conn)` with `conn.sock`, `.client`, `.server`, `Worker.handle_error`, `RequestParser`. Replaced are
`check_config`, `init_process`, `accept`, `handle`, `finish_request`, `murder_keepalived`, `murder_pending`. Neither TLS nor
HTTP/2 passes through here: `check_config` refuses both.

After its start a worker makes no descriptor but by accept4(2): no socket(2), connect, bind or listen, no dup; its poller is
woken through a pipe.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import select
import selectors
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NoReturn

from gunicorn.http.errors import NoMoreData
from gunicorn.http.parser import RequestParser
from gunicorn.workers.gthread import ThreadWorker

from appliance.web.arrival import Arrival, Refusal, Sizes

READ_AGAINST: Final = "27.0.1"
_PIECE: Final = 16 * 1024           # bytes of one read: a connection holds at most this much beyond its request
_SWEEP: Final = 0.25                # seconds between two looks at the clock
_LEAVING_SECONDS: Final = 2.0
_LEAVING_BYTES: Final = 8 << 20
_OTHER_DESCRIPTORS: Final = 128     # pipes, wires, libraries, and a few to spare
_AT_ONCE: Final = 64                # connections accepted before the others get their turn
_NO_ROOM: Final = (errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RESET: Final = struct.pack("ii", 1, 0)     # struct linger: on, zero seconds


@dataclass(frozen=True)
class Patience:
    """How long each stage may take (seconds, and bytes a second for what has a length), and what an answer may leave unread."""

    head_seconds: float = 10.0
    body_seconds: float = 10.0
    answer_seconds: float = 20.0
    rate: float = 32 * 1024
    unread: int = 4 << 20       # bytes of an answer that is still being made; beyond it the thread waits
    sizes: Sizes = field(default_factory=Sizes)


class Outlet:
    """Where a thread writes an answer; what gunicorn calls on a socket, and nothing that waits for a slow reader for long."""

    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        self._sock = sock
        self._patience = patience
        self._unsent: list[memoryview] = []
        self._size = 0
        self.deadline = 0.0             # by when what is unsent now must be gone

    @property
    def is_empty(self) -> bool:
        """Whether the kernel has taken all of it."""
        return not self._unsent

    def sendall(self, data: bytes) -> None:
        """Send what the kernel takes and keep the rest. Raises `OSError` where the reader is gone or has used up its time."""
        now = time.monotonic()
        if not self._unsent:
            self.deadline = now + self._patience.answer_seconds
        self.deadline += len(data) / self._patience.rate
        if data:
            self._unsent.append(memoryview(data))      # not copied: a picture is the vault's own bytes
            self._size += len(data)
        self.flush()
        while self._size > self._patience.unread:
            self._wait_for_the_reader()
            self.flush()
        if self._unsent and time.monotonic() > self.deadline:
            raise TimeoutError(errno.ETIMEDOUT, "the answer is not being read")

    def flush(self) -> None:
        """Send what the kernel takes now. Raises `OSError`."""
        try:
            while self._unsent:
                sent = self._sock.send(self._unsent[0])
                self._size -= sent
                if sent == len(self._unsent[0]):
                    del self._unsent[0]
                else:
                    self._unsent[0] = self._unsent[0][sent:]
        except BlockingIOError:
            return

    def _wait_for_the_reader(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        left = self.deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            raise TimeoutError(errno.ETIMEDOUT, "the answer is not being read")

    # The rest is called by gunicorn's error paths; the poller alone closes a connection, when it has sent what there is.

    def gettimeout(self) -> float:
        """Say that nothing blocks here, so that `util.write_error` writes as it is."""
        return 0.0

    def shutdown(self, _how: int) -> NoReturn:
        """Refuse, which is how `util.close_graceful` learns that there is nothing for it to wait for."""
        raise OSError(errno.ENOTCONN, "closed by the poller")

    def close(self) -> None:
        """Leave it open: the poller still has the end of an answer to send."""


@dataclass(eq=False)
class Connection:
    """One connection: the poller's while it waits, a thread's while its request is worked on, and never both's."""

    socket: socket.socket
    client: Any
    server: Any
    arrival: Arrival
    sock: Outlet                # gunicorn's name for what an answer is written to
    deadline: float             # of the stage that it is in
    request: bytes = b""
    keep: bool = False          # whether another request may follow
    is_new: bool = True         # nothing came on it yet
    leaving: int = 0            # bytes that are still read and thrown away


class PatientWorker(ThreadWorker):      # type: ignore[misc]     # gunicorn publishes no types
    """`gthread` with a poller that does the waiting."""

    patience: ClassVar[Patience] = Patience()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.worker_connections: int = self.cfg.worker_connections
        # What waits, in the order of the last completed request: the first one has gone longest without completing any.
        self._waiting: dict[Connection, Callable[[Connection], None]] = {}
        self._swept = 0.0

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Refuse what would go past the poller."""
        super().check_config(cfg, log)
        if cfg.is_ssl or "h2" in cfg.http_protocols or cfg.proxy_protocol != "off":
            raise RuntimeError("the patient worker serves HTTP/1.1 alone")

    def notify(self) -> None:
        """Say nothing to the arbiter: the supervisor asks for pages itself, and the worker may not touch a file's time."""

    def init_process(self) -> None:
        """Make sure of a descriptor for every place, then run."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.worker_connections + _OTHER_DESCRIPTORS
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            with contextlib.suppress(OSError, ValueError):      # a filter may forbid it: then there are fewer places
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                soft = most
            self.worker_connections = max(1, soft - _OTHER_DESCRIPTORS)
        super().init_process()

    # ── Places ────────────────────────────────────────────────────────────────

    def accept(self, listener: Any) -> None:
        """Accept whoever is there, and take what they have sent already."""
        # What is no listener of the worker's was accepted elsewhere and is handed in as one that gives one connection.
        for _ in range(_AT_ONCE if listener in self.sockets else 1):
            try:
                sock, client = listener.accept()
            except OSError as error:
                # accept(2): errors of the network that wait on the new socket come out here, and are the peer's.
                if error.errno == errno.EMFILE:
                    self._make_room()
                elif error.errno in _NO_ROOM:
                    time.sleep(_SWEEP / 10)     # the machine's want, not ours: the listener stays readable meanwhile
                return
            self.nr_conns += 1
            sock.setblocking(False)
            connection = Connection(
                sock, client, listener.getsockname(), Arrival(self.patience.sizes), Outlet(sock, self.patience),
                time.monotonic() + self.patience.head_seconds,
            )
            self._wait(connection, selectors.EVENT_READ, self._arrive)
            self._arrive(connection)
            # `run` stops accepting when this many are there, which happens only where none of them can be sent away.
            while self.nr_conns >= self.worker_connections and self._make_room():
                pass
            if self.nr_conns >= self.worker_connections:
                return

    def _make_room(self) -> bool:
        """Send away the connection that has gone longest without completing a request; False where none is waiting."""
        leaving = (connection for connection in self._waiting if connection.leaving)
        connection = next(leaving, None) or next(iter(self._waiting), None)
        if connection is not None:
            self._drop(connection)
        return connection is not None

    def _wait(self, connection: Connection, event: int, then: Callable[[Connection], None]) -> None:
        self._waiting[connection] = then
        self.poller.register(connection.socket, event, lambda _: self._came(connection, then))

    def _came(self, connection: Connection, then: Callable[[Connection], None]) -> None:
        # One event of a batch can send away the connection of another.
        if self._waiting.get(connection) == then:
            then(connection)

    def _stop_waiting(self, connection: Connection) -> None:
        if self._waiting.pop(connection, None) is not None:
            self.poller.unregister(connection.socket)

    def _drop(self, connection: Connection) -> None:
        self._stop_waiting(connection)
        self._close(connection)

    # ── Arriving ──────────────────────────────────────────────────────────────

    def _arrive(self, connection: Connection) -> None:
        """Take what came; hand the request on when it is whole."""
        try:
            data = connection.socket.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # Whoever has closed the sending side gets no answer to half a request.
            self._drop(connection)
            return
        if not connection.is_new and not connection.arrival.begun:
            connection.deadline = time.monotonic() + self.patience.head_seconds
        connection.is_new = False
        connection.arrival.feed(data)
        self._take(connection)

    def _take(self, connection: Connection) -> None:
        head_was_whole = connection.arrival.body is not None
        try:
            request = connection.arrival.take()
        except Refusal as refusal:
            self._refuse(connection, refusal)
            return
        if request is not None:
            self._stop_waiting(connection)
            connection.request = request
            self.enqueue_req(connection)
        elif not head_was_whole and (body := connection.arrival.body) is not None:
            connection.deadline = time.monotonic() + self.patience.body_seconds + body / self.patience.rate

    def _refuse(self, connection: Connection, refusal: Refusal) -> None:
        self._stop_waiting(connection)
        connection.keep = False
        try:
            connection.sock.sendall(refusal.answer(as_json=connection.arrival.asks_for_json))
        except OSError:
            self._close(connection)
            return
        self._go_on(connection)

    # ── Working ───────────────────────────────────────────────────────────────

    def handle(self, connection: Connection) -> bool | None:
        """Answer one request, on a thread; whether another may follow, or None for a connection that is broken."""
        request = None
        try:
            # A parser of its own for each request: its bytes, and then the end.
            request = next(RequestParser(self.cfg, [connection.request], connection.client))
            connection.request = b""
            return bool(self.handle_request(request, connection))
        except (StopIteration, NoMoreData):
            return False        # it broke off in the middle of the answer, or frames itself in a way of its own
        except OSError:
            return None
        except Exception as error:      # noqa: BLE001     # whatever it is, gunicorn has an answer to it
            self.handle_error(request, connection.sock, connection.client, error)
            return False

    def finish_request(self, connection: Connection, future: Future[bool | None]) -> None:
        """Take the connection back from its thread."""
        more = None if future.cancelled() or future.exception() is not None else future.result()
        if more is None:
            self._close(connection)
            return
        connection.keep = more and self.alive
        self._go_on(connection)

    # ── Answering, and what comes after ───────────────────────────────────────

    def _go_on(self, connection: Connection) -> None:
        """Send what is unsent, then wait for the next request or for the peer to leave; it waits for nothing now."""
        connection.deadline = connection.sock.deadline
        try:
            connection.sock.flush()
        except OSError:
            self._close(connection)
            return
        if not connection.sock.is_empty:
            self._wait(connection, selectors.EVENT_WRITE, self._send)
        elif connection.keep:
            begun = connection.arrival.begun
            connection.deadline = time.monotonic() + (self.patience.head_seconds if begun else self.cfg.keepalive)
            self._wait(connection, selectors.EVENT_READ, self._arrive)
            if begun:           # sent ahead of the last answer
                self._take(connection)
        else:
            self._leave(connection)

    def _send(self, connection: Connection) -> None:
        try:
            connection.sock.flush()
        except OSError:
            self._drop(connection)
            return
        if connection.sock.is_empty:
            self._stop_waiting(connection)
            self._go_on(connection)

    def _leave(self, connection: Connection) -> None:
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        connection.leaving = _LEAVING_BYTES
        connection.deadline = time.monotonic() + _LEAVING_SECONDS
        self._wait(connection, selectors.EVENT_READ, self._see_out)

    def _see_out(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(16 * _PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        connection.leaving -= len(data)
        if not data or connection.leaving <= 0:
            self._drop(connection)

    def _close(self, connection: Connection) -> None:
        """Close a connection that is not waiting; what its reader has not taken is dropped by the kernel too."""
        if not connection.sock.is_empty:
            with contextlib.suppress(OSError):
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.socket.close()
        self.nr_conns -= 1

    # ── Time ──────────────────────────────────────────────────────────────────

    def murder_keepalived(self, force: bool = False) -> None:
        """End what has had its time; called by `run` on every turn. A worker that is closing waits for nobody."""
        now = time.monotonic()
        if self.alive and not force and now - self._swept < _SWEEP:
            return
        self._swept = now
        for connection, then in list(self._waiting.items()):
            late = connection.deadline < now
            if late and self.alive and then == self._arrive and connection.arrival.begun:
                self._refuse(connection, Refusal(408, "Request Timeout", "too_slow", "the request took too long to arrive"))
            elif late or force or (not self.alive and connection.sock.is_empty):
                self._drop(connection)

    def murder_pending(self) -> None:
        """Do nothing: no thread of this worker ever hands a connection back because nothing has come."""
