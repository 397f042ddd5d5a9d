"""A process is killed, crashes or is stopped, with a stream open and a picture half made."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Appliance, eventually, running
from tests.takeover import taken_over
from tests.test_serve import gone
from tests.visitor import Visitor

ENDS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)


@contextlib.contextmanager
def a_stream(appliance: Appliance, visitor: Visitor, job: str) -> Iterator[None]:
    """Hold the job's stream of events open."""
    host, _, port = appliance.hostport.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as stream:
        stream.sendall(
            f"GET /api/jobs/{job}/events HTTP/1.1\r\nHost: {appliance.hostport}\r\nCookie: {visitor.cookie}\r\n\r\n".encode()
        )
        assert stream.recv(4096)
        yield


def in_mid_generation(appliance: Appliance) -> tuple[Visitor, str]:
    visitor = Visitor(appliance.hostport)
    job = visitor.develop("a red apple", steps="150", count="4")
    eventually(lambda: visitor.job(job)["state"] == "running")
    return visitor, job


def milliseconds_until_gone(pids: list[int], began: float) -> int:
    eventually(lambda: all(gone(pid) for pid in pids))
    return round(1000 * (time.monotonic() - began))


def makes_a_picture(appliance: Appliance) -> bool:
    try:
        visitor = Visitor(appliance.hostport)
        return visitor.picture(visitor.develop("a red apple", steps="2")).startswith(b"\x89PNG")
    except (OSError, AssertionError):
        return False


def test_an_engine_that_ends_or_stands_still_is_replaced_and_only_its_job_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as appliance:
        worker = appliance.children()["worker"]
        for signum in ENDS:
            visitor, job = in_mid_generation(appliance)
            waiting = visitor.develop("a red apple", steps="2")
            engine = appliance.children()["engine"]
            with a_stream(appliance, visitor, job):
                began = time.monotonic()
                os.kill(engine, signum)
                took = milliseconds_until_gone([engine], began)
            with capsys.disabled():
                print(f"\nengine after {signum.name}: gone after {took} ms")
            failed = visitor.wait(job, "failed")
            assert "engine stopped" in str(failed["message"])
            assert visitor.picture(waiting).startswith(b"\x89PNG"), "a job that waited is the next engine's"
            assert appliance.children()["worker"] == worker
        assert "has stood still" in appliance.log()


@pytest.mark.parametrize("role", ["worker", "arbiter"])
def test_pages_that_end_or_stand_still_are_a_close(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    with running() as appliance:
        for signum in ENDS:
            visitor, job = in_mid_generation(appliance)
            before = appliance.children()
            with a_stream(appliance, visitor, job):
                began = time.monotonic()
                os.kill(before[role], signum)
                took = milliseconds_until_gone(list(before.values()), began)
            with capsys.disabled():
                print(f"\n{role} after {signum.name}: everything that held content is gone after {took} ms")
            eventually(lambda: makes_a_picture(appliance), 180)
            assert visitor.get(f"/api/jobs/{job}").status == 404
            assert not set(appliance.children().values()) & set(before.values())


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_nothing_outlives_its_supervisor(signum: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    with running() as appliance:
        visitor, job = in_mid_generation(appliance)
        children = list(appliance.children().values())
        with a_stream(appliance, visitor, job):
            began = time.monotonic()
            appliance.process.send_signal(signum)
            took = milliseconds_until_gone(children, began)
        with capsys.disabled():
            print(f"\nsupervisor after {signum.name}: everything else is gone after {took} ms")


def test_a_supervisor_that_is_stopped_cannot_close_anything_so_worker_and_engine_end_by_themselves(tmp_path: Path) -> None:
    alteration = "import appliance.web.attendant as attendant\nattendant._SILENCE = 8.0"
    guarded = "if role == 'pages':\n" + "".join(f"    {line}\n" for line in alteration.splitlines())
    with taken_over(tmp_path, alteration=guarded) as taken:
        appliance = taken.appliance
        children = appliance.children()
        appliance.process.send_signal(signal.SIGSTOP)
        try:
            eventually(lambda: all(gone(pid) for pid in children.values()), 120)
        finally:
            appliance.process.send_signal(signal.SIGCONT)
        eventually(lambda: makes_a_picture(appliance), 180)
