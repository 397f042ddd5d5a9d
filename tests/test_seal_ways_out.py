"""Somebody has taken the worker or the engine over, and tries to get something out.

Each way is tried from inside, with the real sockets that are there, against listeners outside that write down what arrives. The
same ways are tried again with the filter taken away: they get through then, so it is the filter that stops them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import ways_out
from tests.conftest import Appliance, eventually
from tests.takeover import Taken, taken_over
from tests.visitor import Visitor

CANARY = f"sycamore-{secrets.token_hex(8)}".encode()

# How the appliance is started: as root or not, on a host that gives out user namespaces or on one that does not. A user
# namespace around it stands for the host: 0 in its limit is what a hardened machine has, and a user id that is not 0 in it is
# an ordinary user, without a capability.
_NONE_LEFT = 'echo {left} > /proc/sys/user/max_user_namespaces && exec {then}"$@"'
_ORDINARY = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
HOSTS: dict[str, tuple[str, ...]] = {
    "root": (),
    "root without user namespaces": (
        "unshare", "--user", "--map-root-user", "sh", "-c", _NONE_LEFT.format(left=0, then=""), "sh",
    ),
    "an ordinary user": _ORDINARY,
    "an ordinary user without user namespaces": (
        "unshare", "--user", "--map-root-user", "sh", "-c", _NONE_LEFT.format(left=1, then=" ".join(_ORDINARY) + " "), "sh",
    ),
}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> tuple[str, ...]:
    launcher = HOSTS[request.param]
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("not run as root")
    if launcher and subprocess.run([*launcher, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody make the user namespace that stands for the host")
    return launcher


@dataclass
class Outside:
    """Listeners that nobody of the appliance should ever reach, and what has come to them."""

    port: int
    streams: dict[str, str]
    datagrams: dict[str, str]
    arrived: set[bytes] = field(default_factory=set)
    connected: int = 0


@contextlib.contextmanager
def listening(folder: Path) -> Iterator[Outside]:
    """Listen on TCP and UDP, and on UNIX sockets in the places of D-Bus, systemd, the journal and podman."""
    streams = {name: str(folder / name) for name in ("D-Bus", "podman")}
    datagrams = {name: str(folder / name) for name in ("journal", "notify")}
    with contextlib.ExitStack() as held:
        tcp = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = tcp.getsockname()[1]
        udp = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", port))
        outside = Outside(port, streams, datagrams)
        unix = []
        for kind, paths in ((socket.SOCK_STREAM, streams), (socket.SOCK_DGRAM, datagrams)):
            for path in paths.values():
                one = held.enter_context(socket.socket(socket.AF_UNIX, kind))
                one.bind(path)
                Path(path).chmod(0o777)     # as open to everybody as those of the system are
                unix.append(one)
        ended = threading.Event()

        def accept(listener: socket.socket) -> None:
            listener.settimeout(0.2)
            if listener.family == socket.AF_UNIX:
                listener.listen(16)
            while not ended.is_set():
                with contextlib.suppress(TimeoutError, OSError):
                    connection, _ = listener.accept()
                    outside.connected += 1
                    with connection:
                        connection.settimeout(2)
                        outside.arrived.add(connection.recv(200))

        def hear(listener: socket.socket) -> None:
            listener.settimeout(0.2)
            while not ended.is_set():
                with contextlib.suppress(TimeoutError, OSError):
                    outside.arrived.add(listener.recv(200))

        threads = [
            threading.Thread(target=accept if one.type == socket.SOCK_STREAM else hear, args=(one,))
            for one in (tcp, udp, *unix)
        ]
        for thread in threads:
            thread.start()
        try:
            yield outside
        finally:
            ended.set()
            for thread in threads:
                thread.join()


@contextlib.contextmanager
def visitors_connected(appliance: Appliance) -> Iterator[None]:
    """Hold some connections open, so that the worker has an accepted socket for each trick."""
    host, _, port = appliance.hostport.rpartition(":")
    with contextlib.ExitStack() as held:
        for _ in range(8):
            connection = held.enter_context(socket.create_connection((host, int(port)), timeout=30))
            # Asked for and answered, then idle: the worker has accepted it and waits for the next request.
            connection.sendall(f"GET /static/ready.txt HTTP/1.1\r\nHost: {appliance.hostport}\r\n\r\n".encode())
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        yield


def tried(taken: Taken, role: str, code: str) -> dict[str, str]:
    found = taken.inside(role, code, 120)
    assert isinstance(found, dict), found
    return {str(way): str(outcome) for way, outcome in found.items()}


def unix(outside: Outside) -> str:
    return ways_out.filled(ways_out.UNIX, canary=CANARY, streams=outside.streams, datagrams=outside.datagrams)


def network(outside: Outside) -> str:
    return ways_out.filled(ways_out.NETWORK, port=outside.port)


def listener(outside: Outside, *tricks: str) -> str:
    return ways_out.filled(ways_out.LISTENER, port=outside.port, tricks=tricks)


def test_nothing_gets_out_of_worker_or_engine_and_the_page_works(host: tuple[str, ...], tmp_path: Path) -> None:
    with listening(tmp_path) as outside, taken_over(tmp_path, launcher=host) as taken:
        for role in ("worker", "engine"):
            with visitors_connected(taken.appliance):
                found = tried(taken, role, network(outside))
                found |= tried(taken, role, listener(outside, *ways_out.LISTENER_TRICKS))
            found |= tried(taken, role, unix(outside))
            through = {way: outcome for way, outcome in found.items() if not outcome.startswith(("refused", "nothing"))}
            assert through == {}, role
            if role == "worker":
                assert "nothing there to try it with" not in found.values(), "the tricks need the real sockets"
        assert outside.arrived == set()
        assert outside.connected == 0
        assert Visitor(taken.appliance.hostport).get("/").status == 200
        visitor = Visitor(taken.appliance.hostport)
        assert visitor.picture(visitor.develop("a red apple", steps="2")).startswith(b"\x89PNG")


# Landlock alone stops some of the ways (a TCP connect, for one) and not the fast opens: without both, all get through, although
# the network namespace is there.
WITHOUT_WALLS = """
from appliance.seal import confine
confine.restrict_calls = lambda fd: None
confine.restrict_files = lambda fd: 0
"""


def test_without_filter_and_rulesets_the_same_ways_lead_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        listening(tmp_path) as outside,
        taken_over(tmp_path, "--allow-unsealed", alteration=WITHOUT_WALLS) as taken,
    ):
        found: dict[str, dict[str, str]] = {}
        with visitors_connected(taken.appliance):
            found["worker"] = tried(taken, "worker", network(outside))
        for role in ("worker", "engine"):
            found.setdefault(role, {}).update(tried(taken, role, unix(outside)))
        # This one costs the worker its listener and its life, so there is no answer to wait for.
        taken.order("worker", listener(outside, "listening socket, fast open after shutdown"))
        unix_ways = [way for way in found["engine"] if ", " in way]
        arrives = {b"accepted", b"sendto", b"sendmsg", b"sendmmsg", b"listener-sendto"}
        arrives |= {CANARY + b" " + way.encode() for way in unix_ways}
        assert len(unix_ways) == 8
        eventually(lambda: arrives <= outside.arrived, 60)
    with capsys.disabled():
        print("\nwithout filter and rulesets, from inside:")
        for role, ways in found.items():
            print(*(f"  {role}: {way}: {outcome}" for way, outcome in ways.items()), sep="\n")
        print(f"  arrived outside: {sorted(outside.arrived)}")
    shut = {"a new TCP socket", "a new UDP socket"}      # by the network namespace, which is still there
    for role, ways in found.items():
        assert {way for way, outcome in ways.items() if outcome != "through"} <= shut, role


def test_worker_and_engine_reach_neither_each_other_nor_files_that_are_not_theirs(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "device.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    (tmp_path / "hook").mkdir()
    with taken_over(tmp_path / "hook") as taken:
        children = taken.appliance.children()
        peers = {**children, "supervisor": taken.appliance.process.pid}
        unreadable = [
            str(keys / "device.pem"), "/etc/passwd", "/etc/shadow", "/proc/1/environ", str(taken.appliance.said),
            *(str(path) for path in (taken.appliance.folder / "darkroom").rglob("private")),
        ]
        unwritable = [
            "/", "/tmp", "/var/tmp", "/dev/shm", "/run", "/etc", "/var/log", str(Path.home()), str(tmp_path), str(keys),
            str(taken.appliance.folder), str(Path(ways_out.__file__).parent), str(Path(shutil.__file__).parent),
        ]
        bundle = Path(ways_out.__file__).parent.parent / "appliance" / "bundles" / "demo"
        for role in ("worker", "engine"):
            found = tried(taken, role, ways_out.filled(
                ways_out.OTHERS,
                peers=[pid for name, pid in peers.items() if name != role],
                unreadable=unreadable + ([str(bundle / "model.json"), str(bundle / "unet" / "model.onnx")] if role == "worker" else []),
                unwritable=unwritable,
            ))
            assert {way: outcome for way, outcome in found.items() if not outcome.startswith("refused")} == {}, role
        assert taken.appliance.children() == children, "the tries themselves must not have ended anything"


def test_without_filter_and_rulesets_the_same_tries_succeed(tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "device.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    with taken_over(tmp_path / "hook", "--allow-unsealed", alteration=WITHOUT_WALLS) as taken:
        for role in ("worker", "engine"):
            found = tried(taken, role, ways_out.filled(
                ways_out.OTHERS,
                peers=[taken.appliance.process.pid], unreadable=[str(tmp_path / "device.pem")], unwritable=[str(tmp_path)],
            ))
            for way in (f"reading {tmp_path / 'device.pem'}", f"writing in {tmp_path}", "a new process", "a memfd", "a signal to a peer"):
                assert found[way] == "through", (role, way)
