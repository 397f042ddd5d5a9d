"""The appliance as a user has it: started by its own command, reached over its own socket."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

STARTING = 180.0     # seconds until a slow, busy machine must have opened the door


@dataclass
class Appliance:
    """A running `darkroom serve`: its address, its processes, and what it has said."""

    process: subprocess.Popen[bytes]
    url: str
    said: Path
    folder: Path                # its working folder and its TMPDIR
    stopped: list[int] = field(default_factory=list)

    @property
    def hostport(self) -> str:
        return self.url.removeprefix("http://").rstrip("/")

    @property
    def port(self) -> int:
        return int(self.hostport.rpartition(":")[2])

    def children(self) -> dict[str, int]:
        """Return the pids of engine, arbiter and worker, by these names."""
        found = {}
        for pid in _children(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if len(words) < 6:
                continue        # a zombie, or not yet what it is going to be
            role = words[4].decode()
            found["arbiter" if role == "pages" else role] = pid
            if role == "pages" and (workers := _children(pid)):
                found["worker"] = workers[0]
        return found

    def log(self) -> str:
        return self.said.read_text(encoding="utf-8")

    def close(self, signum: int = signal.SIGTERM) -> int:
        """Close it and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(60)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    return []


@contextlib.contextmanager
def running(
    *options: str, environment: dict[str, str] | None = None, launcher: tuple[str, ...] = ()
) -> Iterator[Appliance]:
    """Start the appliance on a free port, by way of `launcher` where there is one, and close it afterwards."""
    with tempfile.TemporaryDirectory(prefix="darkroom-test-") as name:
        folder = Path(name)
        said = folder / "said.log"
        command = [*launcher, sys.executable, "-m", "appliance", "serve", "--port", "0", *options]
        with said.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
                env={
                    **os.environ, "TMPDIR": name, "XDG_RUNTIME_DIR": name, "PYTHONPATH": str(Path(__file__).parent.parent),
                    **(environment or {}),
                },
            )
        try:
            appliance = Appliance(process, _address(process, said), said, folder)
            yield appliance
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)


def _address(process: subprocess.Popen[bytes], said: Path) -> str:
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        for line in said.read_text(encoding="utf-8").splitlines():
            if line.startswith("Darkroom is open at "):
                return line.split()[4]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the appliance did not open its door; it said:\n{said.read_text(encoding='utf-8')}")


def eventually(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds; a machine that is busy gets its time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def served() -> Iterator[Appliance]:
    """One appliance with the built-in model for all the tests that only use it."""
    with running() as appliance:
        yield appliance
