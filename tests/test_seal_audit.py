"""A whole visit, with the filter only writing down what it would refuse; then with the filter in force, watched by strace."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Appliance, eventually, running
from tests.takeover import hook, taken_over
from tests.visitor import Visitor


def a_visit(appliance: Appliance) -> None:
    """Make, look at, store and forget pictures; be refused; cancel; and go."""
    visitor = Visitor(appliance.hostport)
    job = visitor.develop("a red apple", steps="3", count="2")
    visitor.picture(job)
    for path in ("/", "/pictures", "/model", "/privacy", f"/jobs/{job}", "/nowhere", "/static/darkroom.css"):
        visitor.get(path)
    cancelled = visitor.develop("a red apple", steps="150")
    eventually(lambda: visitor.job(cancelled)["state"] == "running")
    visitor.post(f"/jobs/{cancelled}/cancel", {})
    eventually(lambda: visitor.job(cancelled)["state"] == "cancelled")
    visitor.post("/forget", {})


# The probes are made to be refused: left out here, so that every refusal that is seen is one of the work's own.
QUIET = """
import appliance.seal.probes as probes
probes.probe_self = lambda *_: {}
"""
# Calls that are on no list are let through and written to the kernel's log instead (SECCOMP_RET_LOG).
LOGGED = """
if role == "serve":
    import pyseccomp
    import appliance.seal.walls as walls
    walls.REFUSED = pyseccomp.LOG
"""


def kernel_log() -> list[str]:
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout.splitlines()


def would_be_refused(before: str) -> list[str]:
    """Return the kernel's lines about calls of Python that came after the marker."""
    lines = kernel_log()
    start = max((number for number, line in enumerate(lines) if before in line), default=-1)
    assert start >= 0, "the marker is not in the kernel's log any more"
    return [line for line in lines[start:] if "type=1326" in line and "python" in line]


def mark() -> str:
    marker = f"darkroom-test-{secrets.token_hex(8)}"
    Path("/dev/kmsg").write_text(f"{marker}\n", encoding="ascii")
    return marker


@pytest.fixture
def audited() -> None:
    try:
        mark()
        readable = bool(kernel_log())
    except OSError:
        readable = False
    if not readable:
        pytest.skip("the kernel's log can be read by root alone, and not everywhere")


@pytest.mark.usefixtures("audited")
def test_a_whole_visit_makes_no_call_that_is_on_no_list(tmp_path: Path) -> None:
    with taken_over(tmp_path, "--allow-unsealed", alteration=QUIET + LOGGED) as taken:
        before = mark()
        a_visit(taken.appliance)
        taken.appliance.close()
        assert would_be_refused(before) == []


@pytest.mark.usefixtures("audited")
def test_the_log_shows_a_call_that_is_on_no_list(tmp_path: Path) -> None:
    with taken_over(tmp_path, "--allow-unsealed", alteration=QUIET + LOGGED) as taken:
        before = mark()
        for role in ("worker", "engine"):
            taken.inside(role, "import os\nos.close(os.memfd_create('x'))")
        eventually(lambda: len(would_be_refused(before)) >= 2, 10)


def test_a_whole_visit_is_refused_no_call_while_the_filter_is_in_force(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    launcher = ("strace", "--follow-forks", "--output", str(trace), "--trace=all", "--status=failed", "--quiet=all")
    with running("--allow-unsealed", environment=hook(tmp_path, QUIET), launcher=launcher) as appliance:
        try:
            a_visit(appliance)
        finally:
            # The appliance itself, whose status strace ends with: told to end, strace would leave it running.
            os.kill(int(trace.read_text(encoding="utf-8", errors="replace").split(maxsplit=1)[0]), signal.SIGTERM)
            appliance.process.wait(180)
    refused = [line for line in trace.read_text(encoding="utf-8", errors="replace").splitlines() if " EPERM " in line]
    # What the supervisor asks of the kernel before any filter is there, and may be refused by the host.
    asked_before = re.compile(r"unshare|PR_CAPBSET_DROP|RLIMIT_MEMLOCK")
    assert [line for line in refused if not asked_before.search(line)] == []

