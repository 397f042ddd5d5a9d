"""The control socket, and the command that asks it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.errors import BadRequest
from appliance.seal.control import ControlSocket, NoneRunning, answer, ask, find, run_folder, the_only
from tests.conftest import Appliance, running

ROOT = Path(__file__).parent.parent


def status(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "appliance", "status", *arguments], capture_output=True, text=True, timeout=120, check=False,
        cwd=ROOT, env={**os.environ, "XDG_RUNTIME_DIR": str(folder)}, stdin=subprocess.DEVNULL,
    )


def test_status_says_what_every_process_observed(served: Appliance) -> None:
    said = status(folder=served.folder)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("sealed\n")
    for expected in ("1.sockets", "46 address families", "supervisor, worker and engine", "sha256:"):
        assert expected in said.stdout


def test_status_as_json_has_the_form_that_is_promised(served: Appliance) -> None:
    said = json.loads(status("--json", folder=served.folder).stdout)
    assert set(said) == {"sealed", "model", "vault", "promises"}
    assert said["sealed"] is True
    assert {"id", "title", "holds", "observed"} <= set(said["promises"][0])
    assert len({promise["id"] for promise in said["promises"]}) == len(said["promises"])
    documented = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    for promise in said["promises"]:
        assert f"| {promise['id']} |" in documented, promise["id"]
        assert promise["title"] in documented, promise["id"]


def test_where_none_is_running_that_is_said_with_exit_code_1(tmp_path: Path) -> None:
    said = status(folder=tmp_path)
    assert said.returncode == 1
    assert "no appliance of this user is running" in said.stderr


def test_where_several_are_running_they_are_listed_with_exit_code_2(served: Appliance) -> None:
    with running(environment={"XDG_RUNTIME_DIR": str(served.folder)}) as other:
        said = status(folder=served.folder)
        assert said.returncode == 2
        for pid in (served.process.pid, other.process.pid):
            assert str(pid) in said.stderr
        assert status("--pid", str(other.process.pid), folder=served.folder).returncode == 0
        assert status("--pid", "1", folder=served.folder).returncode == 2
    assert status(folder=served.folder).returncode == 0


def test_what_a_killed_appliance_left_is_swept_away_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / "darkroom" / "4000000"
    left.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(left / "control"))
    with contextlib.closing(ControlSocket(tmp_path / "darkroom")):
        assert not left.exists()
    assert list((tmp_path / "darkroom").iterdir()) == []


def test_a_run_folder_that_others_may_enter_is_closed_and_one_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with contextlib.closing(ControlSocket(tmp_path / "open")):
        assert (tmp_path / "open").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(BadRequest, match="not a folder of this user"):
        ControlSocket(tmp_path / "link")
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, 65534)
        with pytest.raises(BadRequest, match="not a folder of this user"):
            ControlSocket(tmp_path / "theirs")


def test_a_path_that_is_too_long_for_a_socket_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as refused:
        ControlSocket(tmp_path / ("long" * 30))
    assert "shorter" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/darkroom"),
        ({"RUNTIME_DIRECTORY": "/run/darkroom", "XDG_RUNTIME_DIR": "/run/user/7"}, "/run/darkroom"),
    ],
)
def test_the_run_folder_is_the_users_runtime_folder(environment: dict[str, str], expected: str) -> None:
    assert run_folder(None, environment) == Path(expected)
    assert run_folder(Path("/chosen"), environment) == Path("/chosen")


@contextlib.contextmanager
def answering(folder: Path) -> Iterator[ControlSocket]:
    """Serve a control socket on a thread, as the supervisor does in its loop."""
    control = ControlSocket(folder)
    ended = threading.Event()

    def loop() -> None:
        while not ended.is_set():
            readable, _, _ = select.select(control.waited_for, [], [], 0.05)
            for connection, question in control.questions(list(readable)):
                answer(connection, {"asked": question})

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield control
    finally:
        ended.set()
        thread.join()
        control.close()


def connected(control: ControlSocket) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(control.folder / "control"))
    return connection


def test_a_question_that_never_ends_and_one_that_never_begins_hold_nobody_up(tmp_path: Path) -> None:
    with answering(tmp_path / "run") as control:
        slow, endless = connected(control), connected(control)
        with slow, endless:
            slow.sendall(b"sta")
            with contextlib.suppress(OSError):
                endless.sendall(b"x" * 100_000)
            assert ask(the_only(tmp_path / "run"), "status") == {"asked": "status"}
            with contextlib.suppress(ConnectionError):
                assert endless.recv(10) == b""
            assert slow.recv(10) == b"", "it was given up after its time"


def test_more_askers_than_there_are_places_are_turned_away_and_the_next_is_answered(tmp_path: Path) -> None:
    with answering(tmp_path / "run") as control:
        held = []
        for _ in range(12):
            held.append(connected(control))
            time.sleep(0.1)         # each is taken from the backlog before the next one comes
        assert len(control.waited_for) <= 1 + 8
        for connection in held:
            connection.close()
        time.sleep(0.3)
        assert ask(find(tmp_path / "run")[0], "status") == {"asked": "status"}


def test_a_foreign_question_is_answered_with_that(served: Appliance) -> None:
    assert ask(the_only(served.folder / "darkroom"), "open sesame") == {"error": "unknown_question"}


def test_the_folder_is_gone_after_a_close() -> None:
    with running() as appliance:
        folder = appliance.folder / "darkroom"
        assert [one.pid for one in find(folder)] == [appliance.process.pid]
        assert folder.stat().st_mode & 0o777 == 0o700
        appliance.close()
        assert list(folder.iterdir()) == []
        with pytest.raises(NoneRunning):
            the_only(folder)
