"""Each step of the seal is taken away in turn, and the promise that it serves is seen to break."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.seal.control import ask, the_only
from tests.conftest import Appliance
from tests.takeover import hook, taken_over
from tests.test_serve import darkroom_said


def status(appliance: Appliance) -> dict[str, object]:
    return ask(the_only(appliance.folder / "darkroom"), "status")


def broken(said: dict[str, object]) -> dict[str, str]:
    promises = said["promises"]
    assert isinstance(promises, list)
    return {promise["id"]: promise["observed"] for promise in promises if not promise["holds"]}


def test_with_every_step_every_promise_holds(served: Appliance) -> None:
    said = status(served)
    assert broken(said) == {}
    assert said["sealed"] is True


@dataclass(frozen=True)
class Step:
    alteration: str
    promises: frozenset[str]            # that break without it
    seen_by: str                        # the process that the observation names


CONFINE = "from appliance.seal import confine\n"
WALLS: dict[str, Step] = {
    "the network namespace": Step(
        CONFINE + "confine.part_from_the_network = lambda: 0", frozenset({"1.network"}), "supervisor"
    ),
    "network namespaces, refused by the host": Step(
        CONFINE + "confine.part_from_the_network = lambda: 28", frozenset({"1.network"}), "user namespaces are limited to none"
    ),
    "core and dump": Step(
        CONFINE + "confine.forbid_core_dumps = lambda: None", frozenset({"3.cores", "1.peers"}), "engine: dumpable is 1"
    ),
    "the parent's death": Step(
        CONFINE + "confine.die_with_parent = lambda parent: None", frozenset({"4.lifetime"}), "worker: would outlive its parent"
    ),
    "Landlock, of the children": Step(
        CONFINE + "if role != 'serve': confine.restrict_files = lambda fd: 0", frozenset({"3.files"}), "engine"
    ),
    "Landlock, switched off at boot": Step(
        "if role == 'serve':\n    import appliance.seal.walls as walls\n    walls.landlock_errno = lambda: 95", frozenset({"3.files"}),
        "it was switched off at boot",
    ),
}
if os.geteuid() == 0:
    WALLS["capabilities"] = Step(
        CONFINE + "confine.drop_capabilities = lambda: None", frozenset({"1.privileges"}), "worker"
    )


@pytest.mark.parametrize("step", WALLS)
def test_a_wall_that_is_missing_is_seen_and_named(step: str, tmp_path: Path) -> None:
    taken = WALLS[step]
    with taken_over(tmp_path, alteration=taken.alteration) as altered:
        said = status(altered.appliance)
    found = broken(said)
    assert taken.promises & set(found), found
    assert set(found) <= taken.promises, found
    assert any(taken.seen_by in observed for observed in found.values()), found
    assert said["sealed"] is True, "a missing wall alone opens no way out"


# What decides: without it nothing is served.
ESSENTIAL: dict[str, Step] = {
    "the filter of the worker": Step(
        CONFINE + "import sys\n"
        "whole = confine.restrict_calls\n"
        "calls = []\n"
        "def second_left_out(fd):\n"
        "    calls.append(fd)\n"
        "    if role != 'pages' or len(calls) == 1: whole(fd)\n"
        "confine.restrict_calls = second_left_out",
        frozenset({"1.filter"}), "worker",
    ),
    "the filter of the engine": Step(
        CONFINE + "if role == 'engine': confine.restrict_calls = lambda fd: None", frozenset({"1.filter"}), "engine"
    ),
    "the filter of everybody": Step(
        CONFINE + "confine.restrict_calls = lambda fd: None",
        frozenset({"1.filter", "1.sockets", "1.served", "1.unix", "1.calls", "1.loosening"}), "supervisor",
    ),
    "connect, allowed by mistake": Step(
        "from appliance.seal import calls\n"
        "calls.GROUPS += (calls.Group('mistake', '', calls.ROLES, (calls.Allowed('connect'),)),)", frozenset({"1.served"}), "worker",
    ),
    "sendmsg with fast open, allowed by mistake": Step(
        "from appliance.seal import calls\n"
        "calls.GROUPS += (calls.Group('mistake', '', calls.ROLES, (calls.Allowed('sendmsg'),)),)",
        frozenset({"1.served"}), "engine",
    ),
}


@pytest.mark.parametrize("step", ESSENTIAL)
def test_without_what_decides_nothing_is_served(step: str, tmp_path: Path) -> None:
    taken = ESSENTIAL[step]
    ended = darkroom_said("serve", "--port", "0", environment={**hook(tmp_path, taken.alteration), "XDG_RUNTIME_DIR": str(tmp_path)})
    assert ended.returncode == 6, ended.stderr
    assert "Darkroom is open at" not in ended.stdout
    for promise in taken.promises:
        assert promise in ended.stderr
    assert taken.seen_by in ended.stderr
    assert "--allow-unsealed" in ended.stderr


def test_no_new_privileges_cannot_be_left_out(tmp_path: Path) -> None:
    alteration = CONFINE + "confine.forbid_new_privileges = lambda: None"
    ended = darkroom_said("serve", "--port", "0", environment={**hook(tmp_path, alteration), "XDG_RUNTIME_DIR": str(tmp_path)})
    assert ended.returncode == 6
    assert "Operation not permitted" in ended.stderr


def test_a_second_thread_in_the_supervisor_is_a_refusal(tmp_path: Path) -> None:
    alteration = "if role == 'serve': threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    ended = darkroom_said("serve", "--port", "0", environment={**hook(tmp_path, alteration), "XDG_RUNTIME_DIR": str(tmp_path)})
    assert ended.returncode == 6
    assert "2 threads" in ended.stderr


def test_what_is_open_is_served_where_that_is_allowed_and_every_page_says_so(tmp_path: Path) -> None:
    from tests.visitor import Visitor

    with taken_over(tmp_path, "--allow-unsealed", alteration=ESSENTIAL["the filter of everybody"].alteration) as altered:
        said = status(altered.appliance)
        assert said["sealed"] is False
        assert "NOT sealed" in altered.appliance.log()
        visitor = Visitor(altered.appliance.hostport)
        for path in ("/", "/pictures", "/privacy", "/model", "/nowhere"):
            assert "not sealed" in visitor.get(path).text.lower(), path


def test_nobody_is_answered_before_the_seal_was_looked_at(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Everything is open, nothing of it was allowed: the appliance ends, and whoever was waiting has read nothing.
    environment = {**os.environ, **hook(tmp_path, ESSENTIAL["the filter of everybody"].alteration), "XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "appliance", "serve", "--port", str(port)], env=environment, stderr=subprocess.DEVNULL
    ) as process:
        heard = b""
        while process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=60) as visitor:
                    visitor.sendall(f"GET /model HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
                    while got := visitor.recv(65536):
                        heard += got
            except OSError:
                continue
    assert process.returncode == 6
    assert b"200 OK" not in heard
