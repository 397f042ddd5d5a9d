"""The appliance under systemd: sockets that are passed, and what it is told of life."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.conftest import eventually, running
from tests.test_serve import darkroom_said, gone
from tests.visitor import Visitor

ROOT = Path(__file__).parent.parent
ACTIVATE = shutil.which("systemd-socket-activate")


@contextlib.contextmanager
def activated(listen: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the appliance by systemd's own socket activation: it is started by the first connection."""
    said = (folder / "said.log").open("wb")
    with said, subprocess.Popen(
        [
            str(ACTIVATE), "--listen", listen, f"--setenv=PYTHONPATH={ROOT}", f"--setenv=XDG_RUNTIME_DIR={folder}",
            f"--setenv=PATH={os.environ['PATH']}", sys.executable, "-m", "appliance", "serve", "--port", "8123",
        ],
        stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            assert process.wait(60) in (0, -signal.SIGTERM)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.skipif(ACTIVATE is None, reason="systemd-socket-activate is not installed")
def test_a_tcp_socket_that_systemd_passes_is_the_one_that_answers(tmp_path: Path) -> None:
    port = free_port()
    with activated(f"127.0.0.1:{port}", tmp_path):
        eventually(lambda: _connects(port), 60)
        with socket.create_connection(("127.0.0.1", port), timeout=180) as first:
            # The connection that started it is answered too, once the appliance is ready.
            first.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
            assert first.recv(64).startswith(b"HTTP/1.1 200")
        assert Visitor(f"127.0.0.1:{port}").get("/status").status in (200, 404)
        assert f"Darkroom is open at http://127.0.0.1:{port}/" in (tmp_path / "said.log").read_text()


def _connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class _Unix(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("127.0.0.1", 8123, timeout=180)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(180)
        self.sock.connect(self._path)


@pytest.mark.skipif(ACTIVATE is None, reason="systemd-socket-activate is not installed")
def test_a_unix_socket_that_systemd_passes_leaves_no_inet_socket_in_any_process(tmp_path: Path) -> None:
    path = str(tmp_path / "door")
    with activated(path, tmp_path) as process:
        eventually(lambda: Path(path).exists(), 60)
        door = _Unix(path)
        door.request("GET", "/")        # as systemd-socket-proxyd passes a visitor's request on: Host is what was typed
        assert door.getresponse().status == 200
        door.close()
        if os.geteuid() == 0:
            inodes = set()
            for table in ("tcp", "tcp6", "udp", "udp6"):
                for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                    inodes.add(f"socket:[{line.split()[9]}]")
            for pid in _tree(process.pid):
                held = {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir()}
                assert held & inodes == set(), pid


def _tree(pid: int) -> list[int]:
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(below for child in children for below in _tree(child))]


def test_a_listen_pid_of_somebody_else_fails_loudly_instead_of_listening_nowhere(tmp_path: Path) -> None:
    ended = darkroom_said(
        "serve", "--port", "0", environment={"LISTEN_FDS": "1", "LISTEN_PID": "1", "XDG_RUNTIME_DIR": str(tmp_path)}
    )
    assert ended.returncode == 2
    assert "LISTEN_PID is not this process" in ended.stderr


def test_systemds_watchdog_hears_of_life_and_of_none_while_the_supervisor_stands_still(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(180)
        with running(environment={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "2000000"}) as appliance:
            heard = [systemd.recv(64) for _ in range(4)]
            assert heard[0].startswith(b"READY=1")
            assert heard[1:] == [b"WATCHDOG=1"] * 3
            # An engine that is replaced is no reason to restart the unit.
            engine = appliance.children()["engine"]
            os.kill(engine, signal.SIGSTOP)
            eventually(lambda: gone(engine))
            # The supervisor itself stands still: nothing is said any more.
            appliance.process.send_signal(signal.SIGSTOP)
            systemd.settimeout(3)
            with contextlib.suppress(TimeoutError):
                for _ in range(100):        # what was said before
                    systemd.recv(64)
            with pytest.raises(TimeoutError):
                systemd.recv(64)
            appliance.process.send_signal(signal.SIGCONT)
            systemd.settimeout(180)
            assert systemd.recv(64) == b"WATCHDOG=1"


def test_a_watchdog_of_another_process_is_not_ours(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(180)
        with running(environment={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}):
            assert systemd.recv(64).startswith(b"READY=1")
            systemd.settimeout(2)
            with pytest.raises(TimeoutError):
                systemd.recv(64)
