"""A prompt that nobody else would write goes through everything that can happen, and is then looked for everywhere.

Raw, base64, URL-encoded, JSON-escaped and UTF-16; in what the appliance said, in the list of processes, in their environments,
in every file that it can have written, in what it answered to others, and in the PNG itself. Each place has a positive control:
the same search finds the canary where the test plants it.
"""

from __future__ import annotations

import base64
import os
import re
import secrets
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from tests.conftest import Appliance, eventually, running
from tests.visitor import Visitor

# Made anew for each run: no older file of this machine can hold it.
WORD = f"xylophone-{secrets.token_hex(6)}".encode()
CANARY = f"{WORD.decode()} ünter"
SHAPES = {
    "raw": CANARY.encode(),
    "latin-1": CANARY.encode("latin-1"),
    "word": WORD,
    "UTF-16": CANARY.encode("utf-16-le"),
    "URL": quote(CANARY).encode(),
    "form": quote_plus(CANARY).encode(),
    "JSON": WORD + rb" \u00fcnter",
    # Base64 at each of the three alignments, less the characters that neighbours change.
    **{f"base64+{k}": base64.b64encode(b"\0" * k + WORD)[4:-4] for k in range(3)},
}


def found(content: bytes) -> list[str]:
    return [shape for shape, needle in SHAPES.items() if needle in content]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_search_finds_each_shape_where_it_is_planted(shape: str) -> None:
    assert shape in found(b"before" + SHAPES[shape] + b"after")
    assert found(b"nothing of the kind") == []


def places(appliance: Appliance) -> Iterator[tuple[str, bytes]]:
    """Yield every place that could have kept something, by name."""
    yield "said", appliance.said.read_bytes()
    pids = {"supervisor": appliance.process.pid, **appliance.children()}
    for name, pid in pids.items():
        for what in ("cmdline", "comm"):
            yield f"{name} {what}", Path(f"/proc/{pid}/{what}").read_bytes()
        try:
            yield f"{name} environ", Path(f"/proc/{pid}/environ").read_bytes()
            descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        except PermissionError:
            # An ordinary user's own processes, not dumpable: nobody but root can look, and that is the point of it.
            assert os.getuid() != 0
            assert name != "supervisor"
            continue
        for descriptor in descriptors:
            # Files that were unlinked but are still open are files all the same.
            try:
                target = os.readlink(descriptor)
                if target.startswith("/") and not target.startswith(("/dev/", "/proc/", "/usr/")) and descriptor.is_file():
                    yield f"{name} has open {target}", descriptor.read_bytes()
            except OSError:
                continue
    for folder in (appliance.folder, Path("/dev/shm"), Path("/tmp"), Path("/var/tmp")):
        # Folders of other programs come and go meanwhile: os.walk goes on where one is gone.
        for path in (Path(within) / name for within, _, names in os.walk(folder) for name in names):
            try:
                recent = path.is_file() and not path.is_symlink() and path.stat().st_mtime >= appliance.folder.stat().st_ctime - 3600
                if recent and path.stat().st_size < 8 << 20 and "pytest" not in str(path):
                    yield str(path), path.read_bytes()
            except OSError:
                continue


def test_a_file_an_argument_and_an_environment_variable_with_the_canary_would_be_found(served: Appliance) -> None:
    planted = served.folder / "spooled"
    planted.write_text(CANARY, encoding="utf-8")
    try:
        assert any(found(content) for name, content in places(served) if name == str(planted))
    finally:
        planted.unlink()
    with subprocess.Popen(
        [sys.executable, "-c", "input()", CANARY], env={**os.environ, "SPOOLED": CANARY}, stdin=subprocess.PIPE
    ) as process:
        assert found(Path(f"/proc/{process.pid}/cmdline").read_bytes())
        eventually(lambda: found(Path(f"/proc/{process.pid}/environ").read_bytes()))
        process.communicate(b"\n")


@pytest.fixture(scope="module")
def went_through() -> Iterator[tuple[Appliance, list[tuple[str, bytes]]]]:
    """One appliance after success, bad requests, a cancel, a large form and an engine that died, and what others were told."""
    told: list[tuple[str, bytes]] = []
    with running() as appliance:
        visitor, stranger = Visitor(appliance.hostport), Visitor(appliance.hostport)
        job = visitor.develop(CANARY, negative_prompt=CANARY, steps="2", seed="3")
        png = visitor.picture(job)
        told.append(("the picture", png))
        told += [(f"chunk {kind}", data) for kind, data in chunks(png)]
        for bad in ({"steps": "10000"}, {"guidance_scale": "inf"}, {"surprise": CANARY}, {"sampler": CANARY}, {"seed": CANARY}):
            answer = visitor.post("/jobs", {"prompt": CANARY, **bad})
            assert 400 <= answer.status < 500
        assert visitor.post("/jobs", {"prompt": CANARY + "[from:to:0.5]"}).status == 303
        assert visitor.post("/jobs", {"prompt": CANARY + "x" * 100_000}).status in (400, 413)
        assert visitor.post("/jobs", {"prompt": CANARY + "x" * 3_000_000}).status == 413
        long = visitor.develop(CANARY, steps="150")
        visitor.post(f"/jobs/{long}/cancel", {})
        visitor.wait(long, "cancelled")
        doomed = visitor.develop(CANARY, steps="150")
        eventually(lambda: visitor.job(doomed)["state"] == "running")
        os.kill(appliance.children()["engine"], 9)
        visitor.wait(doomed, "failed")
        eventually(lambda: "engine" in appliance.children())
        told += [("a stranger's page", stranger.get(path).body) for path in ("/", "/pictures", "/model", "/privacy", "/status", f"/jobs/{job}")]
        told.append(("a foreign host", visitor.get("/", Host="example.org").body))
        yield appliance, told


def chunks(png: bytes) -> list[tuple[str, bytes]]:
    out, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        kind, data = png[at + 4 : at + 8].decode("ascii"), png[at + 8 : at + 8 + length]
        out.append((kind, zlib.decompress(data) if kind == "IDAT" else data))
        at += length + 12
    return out


def test_the_canary_is_nowhere_on_the_machine(went_through: tuple[Appliance, list[tuple[str, bytes]]]) -> None:
    appliance, _ = went_through
    names = []
    for name, content in places(appliance):
        assert found(content) == [], name
        names.append(name)
    for looked_at in ("said", "supervisor environ", "worker cmdline", "engine cmdline", "arbiter cmdline"):
        assert looked_at in names


def test_nobody_else_was_told_the_canary(went_through: tuple[Appliance, list[tuple[str, bytes]]]) -> None:
    for name, content in went_through[1]:
        assert found(content) == [], name


def test_the_picture_holds_its_pixels_and_nothing_else(went_through: tuple[Appliance, list[tuple[str, bytes]]]) -> None:
    png = next(content for name, content in went_through[1] if name == "the picture")
    assert {kind for kind, _ in chunks_raw(png)} <= {"IHDR", "sRGB", "IDAT", "IEND"}


def chunks_raw(png: bytes) -> Iterator[tuple[str, int]]:
    at = 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        yield png[at + 4 : at + 8].decode("ascii"), length
        at += length + 12
    assert at == len(png), "bytes after the end of the picture"


def test_what_was_said_is_events_and_numbers_alone(went_through: tuple[Appliance, list[tuple[str, bytes]]]) -> None:
    appliance, _ = went_through
    for line in appliance.log().splitlines():
        assert line.startswith(("darkroom: ", "Darkroom is open at http://127.0.0.1:")), line
        assert not re.search(r"Traceback|GET |POST |/jobs|/pictures", line), line
    assert "a job was cancelled" in appliance.log()
    assert "a job failed" in appliance.log()


@pytest.mark.parametrize(
    ("options", "code"), [((), 0), (("--steps", "10000"), 2), (("--model", "/nowhere"), 2), (("--sampler", "plms"), 2)]
)
def test_the_command_says_nothing_of_the_prompt_and_leaves_no_file_of_it(
    tmp_path: Path, options: tuple[str, ...], code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "generate", "--steps", "2", "--out", str(tmp_path / "out.png"), *options],
        input=CANARY.encode(), capture_output=True, timeout=120, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == code, done.stderr
    assert found(done.stdout + done.stderr) == []
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in written] == (["out.png"] if code == 0 else [])
    assert all(found(path.read_bytes()) == [] for path in written)
