"""The `darkroom` command: what it makes, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from appliance.config import built_in_bundle, built_in_key
from appliance.developing import write_whole
from appliance.errors import BadRequest


def darkroom(
    *arguments: str, prompt: bytes = b"a red apple", folder: Path | None = None, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "appliance", *arguments], input=prompt, capture_output=True, timeout=120, check=False,
        cwd=folder, preexec_fn=before,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def test_the_same_request_gives_the_same_bytes_in_two_processes(tmp_path: Path) -> None:
    digests = []
    for name in ("one.png", "two.png"):
        made = darkroom("generate", "--seed", "7", "--steps", "3", "--out", name, "--json", folder=tmp_path)
        assert made.returncode == 0, made.stderr
        (entry,) = json.loads(made.stdout)
        assert entry["seed"] == 7
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
        assert digests[-1] == entry["sha256"]
    assert digests[0] == digests[1]


def test_several_pictures_are_named_by_their_seeds_and_equal_to_each_made_alone(tmp_path: Path) -> None:
    assert darkroom("generate", "--seed", "5", "--count", "2", "--steps", "2", "--out", "p.png", folder=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-5.png", "p-6.png"]
    assert darkroom("generate", "--seed", "6", "--steps", "2", "--out", "alone.png", folder=tmp_path).returncode == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "p-6.png").read_bytes()
    assert (tmp_path / "p-5.png").read_bytes() != (tmp_path / "p-6.png").read_bytes()


def test_given_noise_takes_the_place_of_the_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    np.save(tmp_path / "a.npy", rng.standard_normal((1, 4, 24, 24)).astype(np.float32))
    for seed in ("1", "2"):
        made = darkroom("generate", "--latents", "a.npy", "--sampler", "ddim", "--steps", "2", "--seed", seed, "--out", f"{seed}.png",
                        folder=tmp_path)
        assert made.returncode == 0, made.stderr
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "prompt", "said"),
    [
        ((), b"", "the prompt is empty"), ((), b" \n\t ", "the prompt is empty"), ((), b"\xff\xfe", "UTF-8"),
        ((), b"a\x00b", "control characters"), ((), b"x" * 100_000, "100,000 characters"),
        (("--steps", "0"), b"a", "steps"), (("--steps", "-1"), b"a", "steps"), (("--steps", "10000"), b"a", "steps"),
        (("--steps", "NaN"), b"a", "steps"), (("--guidance", "inf"), b"a", "guidance"), (("--size", "190x192"), b"a", "width must be 192"),
        (("--size", "9000x9000"), b"a", "width must be 192"), (("--size", "huge"), b"a", "width x height"), (("--sampler", "plms"), b"a", "sampler"),
        (("--seed", "-1"), b"a", "seed"), (("--seed", str(2**64)), b"a", "seed"), (("--count", "0"), b"a", "count"),
        (("--threads", "0"), b"a", "threads"), (("--threads", "100000"), b"a", "threads"), (("--threads", "many"), b"a", "--threads"),
        (("--latents", "none.npy"), b"a", "none.npy"), (("--prompt-file", "none.txt"), b"", "could not be read"),
        (("--model", "nowhere", "--trust", "k.pem"), b"a", "k.pem"), (("--model", "nowhere"), b"a", "--trust"),
        ((), b"a [red:blue:0.5] apple", "from:to"), ((), b"an apple <lora:style:1>", "lora"), ((), b"apple BREAK pear", "BREAK"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence_and_leaves_no_file(
    tmp_path: Path, arguments: tuple[str, ...], prompt: bytes, said: str
) -> None:
    refused = darkroom("generate", "--out", "out.png", *arguments, prompt=prompt, folder=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert said.encode() in refused.stderr
    assert b"Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_cannot_be_given_as_an_argument(tmp_path: Path) -> None:
    for arguments in (("a red apple",), ("--prompt", "a red apple"), ("--prompt=a red apple",)):
        refused = darkroom("generate", "--out", "o.png", *arguments, folder=tmp_path)
        assert refused.returncode == 2
        assert b"red apple" not in refused.stdout + refused.stderr
        assert b"standard input" in refused.stderr


@pytest.mark.parametrize("out", ["missing/out.png", "picture.gif", ".", "/proc/out.png", "x" * 300 + ".png"])
def test_a_place_that_cannot_be_written_is_found_out_before_a_picture_is_made(tmp_path: Path, out: str) -> None:
    refused = darkroom("generate", "--out", out, folder=tmp_path)
    assert refused.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_picture_and_no_half_of_a_new_one(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"the picture of yesterday")

    def no_room() -> None:
        # A file may not grow beyond a kilobyte: the kernel's answer to a write is then EFBIG, as ENOSPC is on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    refused = darkroom("generate", "--steps", "1", "--out", str(out), before=no_room)
    assert refused.returncode == 2, refused.stderr
    assert b"cannot be written" in refused.stderr
    assert out.read_bytes() == b"the picture of yesterday"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    for content in (b"first" * 1000, b"second"):
        write_whole(out, content)
        assert out.read_bytes() == content
        assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(BadRequest, match="cannot be written"):
        write_whole(tmp_path / "missing" / "out.png", b"x")


def test_verify_prints_digests_that_sha256sum_checks(tmp_path: Path) -> None:
    listed = darkroom("verify", "--print")
    assert listed.returncode == 0, listed.stderr
    (tmp_path / "list").write_bytes(listed.stdout)
    checked = subprocess.run(
        ["sha256sum", "-c", "--strict", str(tmp_path / "list")], cwd=built_in_bundle(), capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    on_disk = {str(p.relative_to(built_in_bundle())) for p in built_in_bundle().rglob("*") if p.is_file()} - {"model.sig"}
    assert {line.split(": ")[0] for line in checked.stdout.splitlines()} == on_disk


def test_verify_says_what_it_verified() -> None:
    said = darkroom("verify")
    assert said.returncode == 0
    assert re.search(rb"digest  sha256:[0-9a-f]{64}\n", said.stdout)
    found = json.loads(darkroom("verify", str(built_in_bundle()), "--trust", str(built_in_key()), "--json").stdout)
    assert found["verified"] is True
    assert found["digest"] in said.stdout.decode()


@pytest.mark.parametrize("prepare", ["missing", "empty"])
def test_a_missing_or_empty_model_folder_is_a_bad_request(tmp_path: Path, prepare: str) -> None:
    bundle = tmp_path / "model"
    if prepare == "empty":
        bundle.mkdir()
    refused = darkroom("verify", str(bundle), "--trust", str(built_in_key()))
    assert refused.returncode == 2
    assert b"model" in refused.stderr


def test_a_refusal_is_json_where_a_script_asks_for_it(tmp_path: Path) -> None:
    refused = darkroom("generate", "--out", "o.png", "--steps", "0", "--json", folder=tmp_path)
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["error"] == "steps"


def test_the_help_names_every_command_and_exit_code_and_no_inner_one() -> None:
    said = " ".join(darkroom("--help").stdout.decode().split())
    for word in ("serve", "generate", "verify", "3 verification refused"):
        assert word in said
    assert "engine" not in said.replace("5 engine", "")


def test_two_builds_of_onnxruntime_at_once_are_refused_with_the_remedy(tmp_path: Path) -> None:
    other = tmp_path / "site" / "onnxruntime_gpu-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n", encoding="ascii")
    refused = subprocess.run(
        [sys.executable, "-m", "appliance", "serve", "--port", "0"], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}:{other.parent}"},
    )
    assert refused.returncode == 2
    assert "pip uninstall onnxruntime onnxruntime-gpu" in refused.stderr


@pytest.mark.parametrize(
    "content",
    [
        b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"not numbers at all",
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 1099511627776), }".ljust(127) + b"\n",
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O', 'fortran_order': False, 'shape': (1, 4, 24, 24), }".ljust(127) + b"\n",
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f8', 'fortran_order': False, 'shape': (0,), }".ljust(127) + b"\n",
    ],
)
def test_latents_that_are_no_float32_array_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "noise.npy").write_bytes(content)
    refused = darkroom("generate", "--out", "out.png", "--latents", "noise.npy", folder=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert b"noise.npy" in refused.stderr
    assert not (tmp_path / "out.png").exists()


def test_an_interruption_while_a_file_is_put_in_place_leaves_no_other_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"old")

    def interrupted(_: Path, __: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(out, b"new")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"old"
