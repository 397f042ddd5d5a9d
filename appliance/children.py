"""One child of the supervisor: its process, the pipe of its events, and the link over which it is asked.

    events      from the child: twelve-byte records (`evidence.journal`), each from the process that the pipe belongs to
    link        both ways: messages (`appliance.link`)

What comes from a child is numbers under limits; a message of another form is dropped.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from appliance.errors import BadRequest, DarkroomError, EngineError, NotSealed, VerificationRefused
from appliance.evidence.journal import Event, Record, records
from appliance.link import ALIVE, LARGEST_MESSAGE, MODEL, PROBE, REPORT, SECONDS
from appliance.seal.calls import Role
from appliance.seal.probes import Errand, Probe, unpack

_TWO_DIGESTS: Final = re.compile(rb"[0-9a-f]{128}")
# What each child may say of itself: an engine cannot say that the worker is ready, nor the other way round.
_SPEAKS: Final[dict[Role, frozenset[Event]]] = {
    "engine": frozenset({
        Event.ENGINE_VERIFIED, Event.ENGINE_READY, Event.JOB_DONE, Event.JOB_CANCELLED, Event.JOB_FAILED,
    }),
    "arbiter": frozenset({
        Event.WORKER_READY, Event.WORKER_HAS_ENGINE, Event.WORKER_LOST_ENGINE, Event.REQUEST_FAILED,
    }),
}


class Child:
    """The engine, or gunicorn with its worker (which speaks for both)."""

    def __init__(self, role: Role, command: list[str], *descriptors: int) -> None:
        """Start `python -m appliance COMMAND` with these descriptors, an event pipe and a link."""
        self.role = role
        self.report: dict[Probe, int] | None = None
        self.alive_at = time.monotonic()
        self.step_seconds = 0
        self.model: tuple[str, str] | None = None       # digest and key fingerprint, hexadecimal
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.events, events_end = os.pipe()
        os.set_blocking(self.events, False)
        self.link.setblocking(False)
        self._unread = bytearray()
        self._closed = False
        try:
            # A session of its own: Ctrl+C at the terminal reaches the supervisor alone, who ends its children in order.
            self.process = subprocess.Popen(
                [
                    sys.executable, "-P", "-m", "appliance", *command, "--supervisor", str(os.getpid()),
                    "--events", str(events_end), "--link", str(theirs.fileno()),
                ],
                pass_fds=(*descriptors, events_end, theirs.fileno()), stdin=subprocess.DEVNULL, start_new_session=True,
                env=_environment(),
            )
        finally:
            os.close(events_end)
            theirs.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def status(self) -> int | None:
        """Exit status, or minus the signal; None while it runs."""
        return self.process.poll()

    def heard(self) -> list[Record]:
        """Return the records that have come, of those that this child may say."""
        with contextlib.suppress(BlockingIOError):
            self._unread += os.read(self.events, 4096)
        return [record for record in records(self._unread) if record.event in _SPEAKS[self.role]]

    def take_message(self) -> None:
        """Take one message from the link."""
        try:
            message = self.link.recv(LARGEST_MESSAGE)
        except OSError:
            return
        kind, rest = message[:1], message[1:]
        if kind == REPORT:
            self.report = unpack(rest)
        elif kind == ALIVE and len(rest) == SECONDS.size:
            self.alive_at = time.monotonic()
            self.step_seconds = SECONDS.unpack(rest)[0]
        elif kind == MODEL and self.role == "engine" and _TWO_DIGESTS.fullmatch(rest):
            self.model = (rest[:64].decode("ascii"), rest[64:].decode("ascii"))

    def send(self, kind: bytes, rest: bytes = b"", descriptor: int | None = None) -> bool:
        """Send one message; False where the child is gone or does not take it."""
        try:
            if descriptor is None:
                self.link.send(kind + rest)
            else:
                socket.send_fds(self.link, [kind + rest], [descriptor])
        except OSError:
            return False
        return True

    def ask_for_a_report(self, errand: Errand) -> None:
        """Have the child probe itself; the answer arrives as `report`."""
        self.report = None
        self.send(PROBE, errand.pack())

    def is_stopped(self) -> bool:
        """Say whether the child was stopped (SIGSTOP), which ends nothing by itself."""
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
            return found is not None and found.si_code == os.CLD_STOPPED
        return False

    def end(self, grace: float) -> None:
        """End and reap it and all of its process group, asking first where there is `grace` (seconds)."""
        if self.process.returncode is None:
            if grace:
                self.process.terminate()
            until = time.monotonic() + grace
            # Looked at without being reaped: as long as it is not, its process group cannot be another one's.
            while time.monotonic() < until and not self._has_ended():
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
        # One that was reaped already took whatever it had started with it (PDEATHSIG).
        if not self._closed:
            self._closed = True
            self.link.close()
            os.close(self.events)

    def _has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reason_of(status: int) -> DarkroomError:
    """Return the error that a child's exit status stands for; the child has said the sentence on standard error."""
    if status == VerificationRefused.exit_code:
        return VerificationRefused("model", "model", "was refused, for the reason above")
    if status == BadRequest.exit_code:
        return BadRequest("model", "the model could not be opened, for the reason above")
    if status == NotSealed.exit_code:
        return NotSealed("child", "a process could not be closed off, for the reason above")
    return EngineError("start", f"a process of the appliance ended with status {status} while it was being started")


def state_of(pid: int) -> tuple[str, int]:
    """Return a process's state letter and its parent's id (proc(5)); an empty letter where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[1])


def _environment() -> dict[str, str]:
    """Return what a child needs and nothing of systemd's: gunicorn would take NOTIFY_SOCKET and LISTEN_FDS for its own."""
    kept = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TZ", "HOME")
    given = {name: os.environ[name] for name in kept if name in os.environ}
    return given | {"PYTHONDONTWRITEBYTECODE": "1", "ORT_DISABLE_TELEMETRY": "1"}      # see appliance.engine
