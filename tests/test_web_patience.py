"""That slow and idle connections stop nobody, and that a request ends where it ends however it was cut."""

from __future__ import annotations

import contextlib
import itertools
import resource
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gunicorn
import pytest
from gunicorn.config import Config
from gunicorn.http.parser import RequestParser
from hypothesis import given
from hypothesis import strategies as st

from appliance.web import patience
from appliance.web.arrival import Arrival, Refusal, Sizes
from appliance.web.border import LARGEST_BODY
from tests.conftest import Appliance, eventually
from tests.visitor import Visitor

ROOT = Path(__file__).parent.parent
MANY = 500
LIMIT = 120.0       # seconds after which a silent machine is a failed one


# ── Framing ───────────────────────────────────────────────────────────────────


def outcome(pieces: list[bytes], sizes: Sizes | None = None) -> tuple[list[bytes], int | None]:
    """Return the requests that were taken, and the status of the refusal that ended it."""
    arrival, taken = Arrival(sizes or Sizes()), []
    for piece in pieces:
        arrival.feed(piece)
        try:
            while (request := arrival.take()) is not None:
                taken.append(request)
        except Refusal as refusal:
            return taken, refusal.status
    return taken, None


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(whole) + 1) for place in places}), len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(edges)]


GOOD = st.builds(
    lambda path, extra, body, empty: (
        (b"\r\n" if empty else b"")
        + (b"POST /%d HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n" % (path, extra, len(body)) + body if body is not None
           else b"GET /%d HTTP/1.1\r\nHost: a\r\n%b\r\n" % (path, extra))
    ),
    st.integers(0, 99), st.sampled_from([b"", b"X-A: 1\r\n", b"Accept: text/html\r\nX-B: \t2 \r\n"]),
    st.none() | st.binary(max_size=60) | st.just(b"GET /smuggled HTTP/1.1\r\n\r\n"), st.booleans(),
)
SCRAPS = st.sampled_from([
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"GET / HTTP/1.1", b"POST / HTTP/1.0\r\n", b"Content-Length: 3\r\n", b"Content-Length: 99",
    b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b": ", b"x" * 30, b"\0",
])
SMALL = Sizes(line=40, head=120, body=64)


@given(st.lists(GOOD, max_size=4), st.lists(st.integers(0, 2000), max_size=30))
def test_the_parser_is_handed_the_same_bytes_however_they_came(requests: list[bytes], places: list[int]) -> None:
    whole = b"".join(requests)
    assert outcome(cut(whole, places)) == (requests, None)
    assert outcome([whole[n : n + 1] for n in range(len(whole))]) == (requests, None)


@given(st.lists(SCRAPS | GOOD, max_size=12).map(b"".join), st.lists(st.integers(0, 2000), max_size=30))
def test_whatever_is_sent_no_cut_of_it_changes_what_is_taken_or_refused(whole: bytes, places: list[int]) -> None:
    byte_by_byte = outcome([whole[n : n + 1] for n in range(len(whole))], SMALL)
    assert outcome([whole], SMALL) == outcome(cut(whole, places), SMALL) == byte_by_byte


@given(st.lists(GOOD, min_size=1, max_size=4))
def test_gunicorn_reads_from_each_request_alone_what_it_reads_from_all_of_them_in_a_row(requests: list[bytes]) -> None:
    cfg, peer = Config(), ("127.0.0.1", 1)

    def read(request: object) -> tuple[object, ...]:
        return request.method, request.uri, request.headers, request.body.read()     # type: ignore[attr-defined]

    row = RequestParser(cfg, [b"".join(requests)], peer)
    assert [read(next(RequestParser(cfg, [request], peer))) for request in requests] == [read(next(row)) for _ in requests]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: identity\r\n\r\n", 411),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: +3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: \xb2\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nContent-Length:\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 262145\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", 417),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
        (b"GET /" + b"x" * 2048, 414),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 4000, 431),
    ],
)
def test_what_does_not_say_clearly_where_it_ends_or_is_too_much_is_refused(request_: bytes, status: int) -> None:
    assert outcome([request_]) == ([], status)


def test_http_1_0_may_expect_in_vain_and_the_largest_body_is_the_borders() -> None:
    old = b"POST / HTTP/1.0\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\nx"
    assert outcome([old]) == ([old], None)
    assert Sizes().body == LARGEST_BODY


def test_gunicorn_is_the_version_that_was_read() -> None:
    """When this fails: read the new gthread.py against what `patience` says that it relies on, then change `READ_AGAINST`."""
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert f"gunicorn=={patience.READ_AGAINST}" in pinned
    assert gunicorn.__version__ == patience.READ_AGAINST


@pytest.mark.parametrize(("name", "value"), [("certfile", str(ROOT / "LICENSE")), ("proxy_protocol", "auto")])
def test_what_would_go_past_the_poller_is_refused(name: str, value: str) -> None:
    cfg = Config()
    patience.PatientWorker.check_config(cfg, SimpleNamespace())
    cfg.set(name, value)
    with pytest.raises(RuntimeError, match=r"HTTP/1\.1 alone"):
        patience.PatientWorker.check_config(cfg, SimpleNamespace())


# ── Time: a worker in a hurry, with two threads ───────────────────────────────

IN_A_HURRY = """
import sys
from gunicorn.app.base import BaseApplication
from gunicorn.workers.gthread import ThreadWorker
from appliance.web.patience import Patience, PatientWorker

class Hurried(PatientWorker):
    patience = Patience(head_seconds=1.5, body_seconds=1.0, answer_seconds=3.0, rate=16 << 20, unread=32 << 20)

ended = []

class Endless:
    def __iter__(self):
        return self
    def __next__(self):
        return bytes(1 << 20)
    def close(self):
        ended.append(1)

def pages(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/endless":
        start_response("200 OK", [])
        return Endless()
    body = {"/echo": lambda: environ["wsgi.input"].read(), "/large": lambda: bytes(16 << 20),
            "/ended": lambda: b"%d" % len(ended)}.get(path, lambda: b"here")()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

class Application(BaseApplication):
    def load_config(self):
        for name, value in {"bind": "fd://" + sys.argv[1], "workers": 1, "worker_class": globals()[sys.argv[2]], "threads": 2, "keepalive": 2,
                            "worker_connections": 60, "control_socket_disable": True, "graceful_timeout": 1}.items():
            self.cfg.set(name, value)
    def load(self):
        return pages

Application().run()
"""


@pytest.fixture(scope="module")
def hurried() -> Iterator[int]:
    """The port of a worker with two threads, sixty places and short limits."""
    with worker("Hurried") as port:
        yield port


@contextlib.contextmanager
def worker(name: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener, subprocess.Popen(
        [sys.executable, "-c", IN_A_HURRY, str(listener.fileno()), name], pass_fds=[listener.fileno()], cwd=ROOT,
        stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"},
    ) as process:
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.wait(60)


def connect(port: int, *, small: bool = False) -> socket.socket:
    sock = socket.socket()
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(LIMIT)
    sock.connect(("127.0.0.1", port))
    return sock


def everything(sock: socket.socket) -> bytes:
    """Read until the other side closes; a reset is an end too."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            said += data
    return said


def ask(port: int, request: bytes) -> bytes:
    with connect(port) as sock:
        sock.sendall(request)
        return everything(sock)


def page(port: int, path: str = "/") -> bytes:
    return ask(port, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()).rpartition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("sends", [b"GET / HTTP/1.1\r\nHo", b"POST /echo HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf"])
def test_what_stops_gunicorns_own_worker_does_not_stop_ours(hurried: int, sends: bytes) -> None:
    """The positive control: as many half requests as there are threads, and then a whole one."""
    whole = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
    with worker("ThreadWorker") as gthread:
        assert page(gthread) == b"here"
        with contextlib.ExitStack() as stack:
            crowd(stack, gthread, sends, many=2)
            visitor = stack.enter_context(connect(gthread))
            visitor.settimeout(2)
            visitor.sendall(whole)
            with pytest.raises(TimeoutError):
                visitor.recv(1)
    with contextlib.ExitStack() as stack:
        crowd(stack, hurried, sends, many=2)
        assert ask(hurried, whole).endswith(b"here")


def test_half_a_head_and_half_a_body_are_answered_408_and_silence_is_closed(hurried: int) -> None:
    assert ask(hurried, b"GET / HTTP/1.1\r\nHo").startswith(b"HTTP/1.1 408 ")
    assert ask(hurried, b"POST /echo HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf").startswith(b"HTTP/1.1 408 ")
    assert ask(hurried, b"") == b""


def test_sending_a_byte_now_and_then_moves_no_limit(hurried: int) -> None:
    with connect(hurried) as sock:
        sock.settimeout(0.1)
        said = b""
        for byte in b"GET / HTTP/1.1\r\nX: " + b"y" * 1000:
            with contextlib.suppress(ConnectionError):
                sock.send(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                said = sock.recv(4096)
                break
        assert said.startswith(b"HTTP/1.1 408 ")


def test_a_connection_is_kept_alive_answers_what_was_sent_ahead_in_order_and_is_closed_when_idle(hurried: int) -> None:
    post = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b"
    said = ask(hurried, post % (5, b"first") + b"\r\n" + post % (6, b"second") + post % (5, b"third"))
    assert said.count(b"HTTP/1.1 200 ") == 3
    assert said.index(b"first") < said.index(b"second") < said.index(b"third")


def test_a_refusal_reaches_whoever_is_still_sending(hurried: int) -> None:
    with connect(hurried) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nAccept: application/json\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000)
        said = everything(sock)
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b'"error": "too_large"' in said


def test_what_gunicorn_cannot_parse_is_answered_and_closed(hurried: int) -> None:
    assert ask(hurried, b"GET / HTTP/9.9\r\n\r\nGET / HTTP/1.1\r\n\r\n").count(b"HTTP/1.1 ") == 1
    assert ask(hurried, b"POST / HTTP/1.1\r\nContent-Length : 3\r\n\r\nabc").startswith(b"HTTP/1.1 400 ")


def test_slow_readers_hold_no_thread_and_are_cut_off(hurried: int) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(hurried, small=True)) for _ in range(20)]
        for sock in slow:
            sock.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        assert page(hurried) == b"here"
        # Every one of them was sent something, and none of them all of it in the time that it had.
        assert all(sock.recv(15).startswith(b"HTTP/1.1 200") for sock in slow)
        eventually(lambda: _is_reset(slow[0]))


def _is_reset(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def test_a_stream_whose_reader_has_stopped_reading_ends_and_so_does_one_whose_reader_is_gone(hurried: int) -> None:
    before = int(page(hurried, "/ended"))
    with connect(hurried, small=True) as sock:
        sock.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        assert sock.recv(1) == b"H"
        eventually(lambda: int(page(hurried, "/ended")) == before + 1)
    with connect(hurried) as sock:
        sock.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        assert sock.recv(1) == b"H"
    eventually(lambda: int(page(hurried, "/ended")) == before + 2)


def test_when_every_place_is_taken_whoever_has_gone_longest_without_a_request_makes_room(hurried: int) -> None:
    with contextlib.ExitStack() as stack:
        holding = [stack.enter_context(connect(hurried)) for _ in range(120)]       # twice as many as there are places
        assert page(hurried) == b"here"
        assert everything(holding[0]) == b""
        assert page(hurried) == b"here"


# ── The appliance, with many at its door ──────────────────────────────────────

KINDS = {
    "idle": b"",
    "half a head": b"GET / HTTP/1.1\r\nHost: ",
    "half a body": b"POST /jobs HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\np",
    "a head without an end": b"GET / HTTP/1.1\r\n" + b"X-Padding: " + b"y" * 12_000,
    "far too large a head": b"GET / HTTP/1.1\r\n" + (b"X-Padding: " + b"y" * 3000 + b"\r\n") * 20,
}


@pytest.fixture
def room_for_many() -> Iterator[None]:
    """Allow this process a descriptor for each of the connections that it is going to hold."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MANY + 256
    if before[0] != resource.RLIM_INFINITY and before[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def crowd(stack: contextlib.ExitStack, port: int, sends: bytes, many: int = MANY) -> list[socket.socket]:
    held = []
    for _ in range(many):
        held.append(stack.enter_context(connect(port)))
        with contextlib.suppress(ConnectionError):
            held[-1].sendall(sends)
    return held


def visit(appliance: Appliance) -> None:
    """Do everything that an ordinary visitor does."""
    visitor = Visitor(appliance.hostport)
    for path in ("/", "/pictures", "/model", "/privacy", "/static/darkroom.css", "/static/develop.js"):
        assert visitor.get(path).status == 200, path
    assert visitor.picture(visitor.develop("a red apple", steps="1")).startswith(b"\x89PNG")
    assert visitor.get("/pictures").status == 200


@pytest.mark.usefixtures("room_for_many")
@pytest.mark.parametrize("kind", KINDS)
def test_a_visitor_gets_every_page_while_500_hold_on(served: Appliance, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        held = crowd(stack, served.port, KINDS[kind])
        visit(served)
        for sock in held:       # and again while each of them sends one byte more
            with contextlib.suppress(ConnectionError):
                sock.send(b"x")
        visit(served)


@pytest.mark.usefixtures("room_for_many")
def test_a_visitor_gets_in_when_more_hold_on_than_there_are_places(served: Appliance) -> None:
    with contextlib.ExitStack() as stack:
        crowd(stack, served.port, KINDS["half a head"], many=2 * MANY)
        visit(served)


def test_a_visitor_gets_every_page_while_others_ask_for_a_picture_and_read_nothing(served: Appliance) -> None:
    anna = Visitor(served.hostport)
    job = anna.develop("a red apple", steps="1")
    anna.picture(job)
    pictures = anna.job(job)["pictures"]
    assert isinstance(pictures, list)
    asks = (
        f"GET /pictures/{pictures[0]['id']}/png HTTP/1.1\r\nHost: {served.hostport}\r\nCookie: {anna.cookie}\r\n\r\n".encode()
    )
    with contextlib.ExitStack() as stack:
        for _ in range(80):     # more than there are threads
            sock = stack.enter_context(connect(served.port, small=True))
            sock.sendall(asks * 4)
        visit(served)
