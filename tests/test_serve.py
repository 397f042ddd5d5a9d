"""The appliance from the outside: how it opens, what it survives, and that nothing outlives it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.config import built_in_bundle, built_in_key
from provisioning.sign import keygen, sign
from tests.conftest import Appliance, eventually, running
from tests.visitor import Visitor

ROOT = Path(__file__).parent.parent


def darkroom(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "appliance", *arguments], capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )


def darkroom_said(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself, in an environment of its own."""
    return subprocess.run(
        [sys.executable, "-m", "appliance", *arguments], capture_output=True, text=True, timeout=180, check=False,
        stdin=subprocess.DEVNULL, env={**os.environ, **environment},
    )


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_picture_comes_out_and_the_same_request_gives_the_same_bytes_in_another_session(served: Appliance) -> None:
    pictures = []
    for _ in range(2):
        visitor = Visitor(served.hostport)
        pictures.append(visitor.picture(visitor.develop("a red apple", seed="7", steps="4")))
    assert pictures[0].startswith(b"\x89PNG")
    assert pictures[0] == pictures[1]


def test_a_picture_is_the_same_alone_in_a_batch_and_from_the_command(served: Appliance, tmp_path: Path) -> None:
    visitor = Visitor(served.hostport)
    batch = visitor.wait(visitor.develop("a red apple", seed="6", steps="3", count="2"), "done")
    pictures = batch["pictures"]
    assert isinstance(pictures, list)
    by_seed = {entry["seed"]: visitor.get(f"/pictures/{entry['id']}/png").body for entry in pictures}
    (tmp_path / "prompt.txt").write_text("a red apple", encoding="utf-8")
    out = tmp_path / "apple.png"
    made = darkroom("generate", "--prompt-file", str(tmp_path / "prompt.txt"), "--seed", "7", "--steps", "3", "--out", str(out))
    assert made.returncode == 0, made.stderr
    assert out.read_bytes() == by_seed["7"]
    assert by_seed["6"] != by_seed["7"]


def test_the_processes_are_the_ones_that_the_design_names(served: Appliance) -> None:
    children = served.children()
    assert set(children) == {"engine", "arbiter", "worker"}
    for pid in children.values():
        environment = Path(f"/proc/{pid}/environ")
        # Not dumpable: the file belongs to root, and only root may read it.
        assert environment.stat().st_uid == 0
        limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
        assert re.search(r"Max core file size +0 +0 ", limits)
    threads = len(list(Path(f"/proc/{served.process.pid}/task").iterdir()))
    assert threads == 1, "the supervisor must stay single-threaded"


def test_another_sessions_pictures_jobs_and_streams_are_answered_like_ids_that_never_were(served: Appliance) -> None:
    anna, bert = Visitor(served.hostport), Visitor(served.hostport)
    job = anna.develop("a red apple", steps="2")
    anna.picture(job)
    pictures = anna.job(job)["pictures"]
    assert isinstance(pictures, list)
    image = pictures[0]["id"]
    bert.enter()
    for path, other in (
        (f"/api/jobs/{job}", "/api/jobs/never"), (f"/api/jobs/{job}/events", "/api/jobs/never/events"),
        (f"/api/jobs/{job}/preview/1", "/api/jobs/never/preview/1"), (f"/pictures/{image}/png", "/pictures/never/png"),
        (f"/jobs/{job}", "/jobs/never"), (f"/pictures/{image}", "/pictures/never"),
    ):
        theirs, unknown = bert.get(path), bert.get(other)
        assert theirs.status == unknown.status == 404, path
        assert theirs.body.replace(job.encode(), b"never").replace(image.encode(), b"never") == unknown.body
    assert bert.post(f"/pictures/{image}/forget", {}).status == 404
    assert anna.get(f"/pictures/{image}/png").status == 200


def test_forgetting_everything_leaves_the_session_without_pictures(served: Appliance) -> None:
    visitor = Visitor(served.hostport)
    job = visitor.develop("a red apple", steps="2")
    visitor.picture(job)
    before = visitor.cookie
    assert visitor.post("/forget", {}).status == 303
    visitor.cookie = before
    assert visitor.get(f"/api/jobs/{job}").status == 404


def test_a_killed_engine_is_replaced_its_job_says_why_and_the_next_one_works() -> None:
    with running() as appliance:
        visitor = Visitor(appliance.hostport)
        job = visitor.develop("a red apple", steps="150", count="2")
        eventually(lambda: visitor.job(job)["state"] == "running")
        before = appliance.children()
        os.kill(before["engine"], signal.SIGKILL)
        failed = visitor.wait(job, "failed")
        assert "engine stopped" in str(failed["message"])
        assert visitor.picture(visitor.develop("a red apple", steps="2")).startswith(b"\x89PNG")
        after = appliance.children()
        assert after["worker"] == before["worker"]
        assert after["engine"] != before["engine"]
        assert "the engine ended with status -9" in appliance.log()


def test_a_killed_worker_is_a_close_and_the_pages_come_back_empty() -> None:
    with running() as appliance:
        visitor = Visitor(appliance.hostport)
        job = visitor.develop("a red apple", steps="2")
        visitor.picture(job)
        before = appliance.children()
        os.kill(before["worker"], signal.SIGKILL)
        eventually(lambda: set(appliance.children()) == {"engine", "arbiter", "worker"}
                   and not set(appliance.children().values()) & set(before.values()), 180)
        eventually(lambda: "HTTP" not in str(_status(appliance)) and _status(appliance) == 200, 180)
        assert all(gone(pid) for pid in before.values())
        assert visitor.get(f"/api/jobs/{job}").status == 404


def _status(appliance: Appliance) -> int:
    try:
        return Visitor(appliance.hostport).get("/").status
    except OSError:
        return 0


def test_nothing_outlives_a_killed_supervisor_not_even_with_a_stream_open() -> None:
    with running() as appliance:
        visitor = Visitor(appliance.hostport)
        job = visitor.develop("a red apple", steps="150", count="4")
        host, _, port = appliance.hostport.rpartition(":")
        children = appliance.children()
        with socket.create_connection((host, int(port)), timeout=30) as stream:
            stream.sendall(
                f"GET /api/jobs/{job}/events HTTP/1.1\r\nHost: {appliance.hostport}\r\nCookie: {visitor.cookie}\r\n\r\n".encode()
            )
            assert b"200" in stream.recv(64)
            appliance.process.kill()
            appliance.process.wait(30)
            eventually(lambda: all(gone(pid) for pid in children.values()), 10)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_closing_signal_ends_every_process_and_exits_with_0(signum: int) -> None:
    with running() as appliance:
        children = appliance.children()
        assert appliance.close(signum) == 0
        assert all(gone(pid) for pid in children.values())
        assert "closed after signal" in appliance.log()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", appliance.port)) != 0


def test_a_port_in_use_is_said_with_what_to_do() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        refused = darkroom("serve", "--port", str(other.getsockname()[1]))
    assert refused.returncode == 2
    assert "cannot be listened on" in refused.stderr
    assert "--port" in refused.stderr


def test_a_tampered_model_is_refused_before_any_page_is_answered(tmp_path: Path) -> None:
    bundle = tmp_path / "model"
    shutil.copytree(built_in_bundle(), bundle)
    graph = bundle / "unet" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    refused = darkroom("serve", "--port", "0", "--model", str(bundle), "--trust", str(built_in_key()))
    assert refused.returncode == 3
    assert "unet/model.onnx: digest mismatch" in refused.stderr
    assert "Darkroom is open" not in refused.stdout


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--host", "0.0.0.0"), 2, "TLS"),     # noqa: S104
        (("--model", "/nowhere"), 2, "listen|trust"),
        (("--config", "/nowhere.toml"), 2, "no such file"),
        (("--port", "99999"), 2, "--port must be a whole number"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(options: tuple[str, ...], code: int, said: str) -> None:
    refused = darkroom("serve", *options)
    assert refused.returncode == code
    assert re.search(said, refused.stderr)
    assert "Traceback" not in refused.stderr


def test_systemd_hears_ready_after_a_page_was_answered_and_never_for_a_tampered_model(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(60)
        with running(environment={"NOTIFY_SOCKET": address}) as appliance:
            assert systemd.recv(64) == b"READY=1\nSTATUS=sealed"
            assert Visitor(appliance.hostport).get("/").status == 200
            # Neither child has systemd's socket: gunicorn would say READY for itself.
            # (Of an ordinary user's children only root can read the environment.)
            for pid in appliance.children().values() if os.getuid() == 0 else ():
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
            appliance.close()
            assert systemd.recv(64) == b"STOPPING=1"
        bundle = tmp_path / "model"
        shutil.copytree(built_in_bundle(), bundle)
        (bundle / "LICENSE").write_bytes(b"mine now")
        systemd.settimeout(0.2)
        refused = subprocess.run(
            [sys.executable, "-m", "appliance", "serve", "--port", "0", "--model", str(bundle), "--trust", str(built_in_key())],
            env={**os.environ, "NOTIFY_SOCKET": address}, check=False, capture_output=True, timeout=120,
        )
        assert refused.returncode == 3
        with pytest.raises(TimeoutError):
            systemd.recv(64)


def test_an_engine_that_is_killed_while_it_is_being_replaced_is_replaced_again() -> None:
    with running() as appliance:
        visitor = Visitor(appliance.hostport)
        visitor.picture(visitor.develop("a red apple", steps="2"))
        first = appliance.children()
        os.kill(first["engine"], signal.SIGKILL)
        eventually(lambda: appliance.children().get("engine") not in (None, first["engine"]))
        os.kill(appliance.children()["engine"], signal.SIGKILL)
        job = visitor.develop("a red apple", steps="2")
        assert visitor.picture(job).startswith(b"\x89PNG")
        assert appliance.children()["worker"] == first["worker"]


def test_too_many_ends_in_a_short_time_end_the_appliance_with_exit_code_5() -> None:
    with running() as appliance:
        for _ in range(12):
            if appliance.process.poll() is not None:
                break
            if (engine := appliance.children().get("engine")) is not None:
                os.kill(engine, signal.SIGKILL)
            eventually(
                lambda engine=engine: appliance.process.poll() is not None      # type: ignore[misc]
                or appliance.children().get("engine") not in (None, engine)
            )
        assert appliance.process.wait(60) == 5
        assert "ended 5 times" in appliance.log()


def test_a_bundle_with_the_longest_licence_opens_too(tmp_path: Path) -> None:
    bundle = tmp_path / "model"
    shutil.copytree(built_in_bundle(), bundle)
    (bundle / "model.sig").unlink()
    (bundle / "LICENSE").write_bytes(b"All rights are reserved.\n" * 40_000)
    pair = keygen(tmp_path / "key.pem")
    sign(bundle, pair.private)
    with running("--model", str(bundle), "--trust", str(pair.public)) as appliance:
        assert "All rights are reserved." in Visitor(appliance.hostport).get("/model").text


def test_each_process_has_loaded_what_is_its_own_and_no_other(served: Appliance) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can look into processes that are not dumpable")
    libraries = {name: Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for name, pid in served.children().items()}
    libraries["supervisor"] = Path(f"/proc/{served.process.pid}/maps").read_text(encoding="utf-8")
    for name, maps in libraries.items():
        assert "torch" not in maps, name
        for library in ("onnxruntime", "numpy", "tokenizers"):
            assert (library in maps) is (name == "engine"), (name, library)


def test_a_process_of_an_ordinary_user_settles_too() -> None:
    code = """
import ctypes, os, sys
from appliance.seal.confine import settle
parent = os.getpid()
child = os.fork()
if child == 0:
    if os.getuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        # Dumpable, as a program is that such a user starts: setuid(2) has just taken that away.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    settle(parent, expendable=True)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_log_that_cannot_be_written_does_not_close_the_appliance() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open("/dev/full", "wb") as full, subprocess.Popen(     # noqa: PTH123
        [sys.executable, "-m", "appliance", "serve", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=full, cwd=ROOT
    ) as process:
        try:
            eventually(lambda: _answers(port), 180)
        finally:
            process.terminate()
            assert process.wait(60) == 0


def _answers(port: int) -> bool:
    try:
        return Visitor(f"127.0.0.1:{port}").get("/").status == 200
    except OSError:
        return False
