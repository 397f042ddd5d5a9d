"""The control socket: how `darkroom status` asks a running appliance, and how it answers.

Each appliance has a folder of its own, named after its process id, in a run folder that only its user can enter:

    <run folder>/4711/control       a listening UNIX socket
    <run folder>/4711/planted       a datagram socket that the probes try to reach, and must not
    <run folder>/4711/private       a file that only the supervisor may read, for the probes to try

One question, one answer, then the connection is closed. A question is one line; it holds no content and neither does an answer.
The peer must be of the same user, or root. The answering side never waits: what does not come at once is not answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.errors import BadRequest, DarkroomError

CONTROL: Final = "control"
PLANTED: Final = "planted"
PRIVATE: Final = "private"
_LONGEST_QUESTION: Final = 64           # bytes
_LONGEST_ANSWER: Final = 1 << 20
_QUESTION_LIMIT: Final = 2.0            # seconds for a question to be whole
_ANSWER_LIMIT: Final = 30.0             # seconds that a command waits for its answer
_PEER: Final = struct.Struct("3i")      # struct ucred: pid, uid, gid (unix(7))


def run_folder(chosen: Path | None, environment: Mapping[str, str]) -> Path:
    """Return where control sockets live: the configured folder, the user's runtime folder, or one in /run or /tmp."""
    if chosen is not None:
        return chosen
    if runtime := environment.get("RUNTIME_DIRECTORY"):         # systemd.exec(5), RuntimeDirectory=
        return Path(runtime.split(":")[0])
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "darkroom"
    return Path("/run/darkroom") if os.geteuid() == 0 else Path(f"/tmp/darkroom-{os.geteuid()}")      # noqa: S108


class ControlSocket:
    """The listening side, in the supervisor; made before the seal and answered from its one loop."""

    def __init__(self, folder: Path) -> None:
        """Make this appliance's folder and sockets. Raises `BadRequest` where the folder is not this user's alone."""
        _own(folder)
        _sweep(folder)
        self.folder = folder / str(os.getpid())
        try:
            self.folder.mkdir(mode=0o700)
        except FileExistsError:     # the same number in another PID namespace
            raise BadRequest(
                "run_folder", f"{self.folder}: another appliance is there, in a container of its own",
                hint="give each appliance a run folder of its own with [run] folder",
            ) from None
        (self.folder / PRIVATE).touch(mode=0o600)
        self.listener = _bound(socket.SOCK_STREAM, self.folder / CONTROL)
        self.listener.listen(8)
        self.planted = _bound(socket.SOCK_DGRAM, self.folder / PLANTED)
        self._asking: dict[socket.socket, tuple[bytearray, float]] = {}

    @property
    def waited_for(self) -> list[socket.socket]:
        """Return the sockets to wait for."""
        return [self.listener, *self._asking]

    def questions(self, readable: list[socket.socket | int]) -> list[tuple[socket.socket, str]]:
        """Take what is readable and return the questions that are whole, with where to answer them."""
        if self.listener in readable:
            with contextlib.suppress(OSError):
                self._welcome(*self.listener.accept())
        asked = []
        for connection, (said, until) in list(self._asking.items()):
            if connection in readable:
                try:
                    got = connection.recv(_LONGEST_QUESTION)
                except OSError:
                    got = b""
                said.extend(got)
                if not got or len(said) > _LONGEST_QUESTION:
                    self._drop(connection)
                elif said.endswith(b"\n"):
                    del self._asking[connection]
                    asked.append((connection, said.decode("ascii", "replace").strip()))
            elif time.monotonic() > until:
                self._drop(connection)
        return asked

    def heard(self) -> int:
        """Return how many datagrams came to the planted socket; none should."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self.planted.recv(1)
                count += 1
        return count

    def close(self) -> None:
        """Close the sockets and remove the folder."""
        for connection in list(self._asking):
            self._drop(connection)
        self.listener.close()
        self.planted.close()
        for name in (CONTROL, PLANTED, PRIVATE):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _welcome(self, connection: socket.socket, _: object) -> None:
        _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        # In a user namespace of our own every other user looks the same; only root can have come through the folder.
        if uid not in (os.geteuid(), 0, 65534) or len(self._asking) >= 8:
            connection.close()
            return
        connection.setblocking(False)
        self._asking[connection] = (bytearray(), time.monotonic() + _QUESTION_LIMIT)

    def _drop(self, connection: socket.socket) -> None:
        self._asking.pop(connection, None)
        connection.close()


def answer(connection: socket.socket, said: Mapping[str, object]) -> None:
    """Send an answer and hang up; an asker that does not take it loses it."""
    with connection, contextlib.suppress(OSError):
        connection.settimeout(1.0)
        connection.sendall(json.dumps(said).encode("utf-8"))


# ── The asking side ───────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Running:
    """A running appliance: its process id and its control socket."""

    pid: int
    socket: Path


class NoneRunning(DarkroomError):
    """No appliance of this user is running; exit code 1."""

    def __init__(self) -> None:
        super().__init__("none_running", "no appliance of this user is running here", hint="start one with darkroom serve")


def find(folder: Path) -> tuple[Running, ...]:
    """Return the appliances that listen in this run folder."""
    found = []
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return ()
    for entry in entries:
        if entry.name.isdigit() and _listens(entry / CONTROL):
            found.append(Running(int(entry.name), entry / CONTROL))
    return tuple(found)


def the_only(folder: Path) -> Running:
    """Return the running appliance. Raises `NoneRunning`, and `BadRequest` with a list where there are several."""
    running = find(folder)
    if not running:
        raise NoneRunning
    if len(running) > 1:
        raise BadRequest(
            "several_running",
            f"{len(running)} appliances are running, as processes {', '.join(str(one.pid) for one in running)}",
            hint="choose one with --pid",
        )
    return running[0]


def ask(running: Running, question: str) -> dict[str, object]:
    """Ask a running appliance. Raises `BadRequest` where it does not answer as it should."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_ANSWER_LIMIT)
            connection.connect(str(running.socket))
            connection.sendall(question.encode("ascii") + b"\n")
            said = bytearray()
            while (got := connection.recv(1 << 16)) and len(said) < _LONGEST_ANSWER:
                said += got
        parsed = json.loads(said)
    except (OSError, ValueError):
        raise BadRequest("control", f"the appliance with process id {running.pid} does not answer", hint="try again") from None
    if not isinstance(parsed, dict):
        raise BadRequest("control", f"the appliance with process id {running.pid} gave no answer that can be read")
    return parsed


def _listens(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
    except BlockingIOError:     # its backlog is full: somebody is there
        return True
    except OSError:
        return False
    return True


def _own(folder: Path) -> None:
    """Make the run folder, or see to it that the one that is there is this user's alone. Raises `BadRequest`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = folder.lstat()
    except OSError as error:
        raise BadRequest(
            "run_folder", f"{folder}: cannot be made: {(error.strerror or '').lower()}",
            hint="choose another one with [run] folder",
        ) from None
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
        raise BadRequest("run_folder", f"{folder}: is not a folder of this user", hint="choose another one with [run] folder")
    if stat.S_IMODE(seen.st_mode) & 0o077:
        try:
            folder.chmod(0o700)
        except OSError:
            raise BadRequest("run_folder", f"{folder}: others may enter it", hint="chmod 700 it") from None


def _sweep(folder: Path) -> None:
    """Remove what appliances that were killed have left: folders in which nobody listens."""
    for entry in folder.iterdir():
        # One that is just being made does not listen yet, and its process is there.
        if not entry.name.isdigit() or entry.is_symlink() or (Path("/proc") / entry.name).exists():
            continue
        if not _listens(entry / CONTROL):
            shutil.rmtree(entry, ignore_errors=True)


def _bound(kind: socket.SocketKind, path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        bound.bind(str(path))
        path.chmod(0o600)
    except OSError as error:
        bound.close()
        raise BadRequest(
            "run_folder", f"{path}: cannot be listened on: {(error.strerror or str(error)).lower()}",
            hint="choose a shorter path with [run] folder" if len(str(path)) > 100 else None,
        ) from None
    bound.setblocking(False)
    return bound
