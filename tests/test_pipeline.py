"""The pipeline, on a bundle of random weights (`tests/vectors/tiny`, made by `tests/provisioning/tiny.py`), without torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance.engine.pipeline import GeneratedImage, Pipeline, StepProgress
from appliance.errors import BadRequest, Cancelled, EngineError
from appliance.request import SAMPLERS, GenerationRequest
from appliance.trust.key import TrustedKey
from appliance.trust.verify import VerifiedModel, verify
from provisioning.sign import KeyPair, keygen, sign

TINY = Path(__file__).parent / "vectors" / "tiny"
SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    """Return a key pair of this run's own."""
    return keygen(tmp_path_factory.mktemp("keys") / "test.pem")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, keys: KeyPair) -> Path:
    """Return a signed copy of the tiny bundle."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    shutil.copytree(TINY, folder)
    sign(folder, keys.private)
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path, keys: KeyPair) -> VerifiedModel:
    """Return the tiny bundle, verified."""
    return verify(bundle, [TrustedKey.load(keys.public)])


@pytest.fixture(scope="module")
def pipeline(model: VerifiedModel) -> Pipeline:
    """Return the tiny model, loaded on one thread."""
    return Pipeline(model, threads=1)


@pytest.fixture
def altered(tmp_path: Path, keys: KeyPair) -> Callable[[str, Callable[[bytes], bytes]], VerifiedModel]:
    """Return a maker of the tiny bundle with one file altered and signed by a key that is trusted."""

    def make(path: str, alter: Callable[[bytes], bytes]) -> VerifiedModel:
        folder = tmp_path / "altered"
        shutil.copytree(TINY, folder)
        before = (folder / path).read_bytes()
        after = alter(before)
        assert after != before
        (folder / path).write_bytes(after)
        sign(folder, keys.private)
        return verify(folder, [TrustedKey.load(keys.public)])

    return make


def request(pipeline: Pipeline, **fields: object) -> GenerationRequest:
    """Return a parsed request of a few steps."""
    asked = {"prompt": "a red apple", "seed": 7, "steps": 3, **fields}
    return GenerationRequest.parse(asked, pipeline.description, fresh_seed=1)


def pictures(pipeline: Pipeline, latents: Any = None, **fields: object) -> list[GeneratedImage]:
    """Return the pictures of a request."""
    asked = request(pipeline, **fields)
    return list(pipeline.generate(asked, on_step=lambda _: None, cancelled=lambda: False, latents=latents))


def digest(picture: GeneratedImage) -> str:
    """Return the SHA-256 of a picture's pixels."""
    return hashlib.sha256(picture.pixels.tobytes()).hexdigest()


# ── The same request gives the same bytes ─────────────────────────────────────


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_request_gives_the_same_bytes_again_and_in_another_pipeline(
    pipeline: Pipeline, model: VerifiedModel, sampler: str
) -> None:
    [first], [second] = pictures(pipeline, sampler=sampler), pictures(pipeline, sampler=sampler)
    [third] = pictures(Pipeline(model, threads=1), sampler=sampler)
    assert digest(first) == digest(second) == digest(third)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_is_the_same_alone_as_among_others(pipeline: Pipeline, sampler: str) -> None:
    together = pictures(pipeline, sampler=sampler, count=3)
    assert [picture.seed for picture in together] == [7, 8, 9]
    alone = [pictures(pipeline, sampler=sampler, seed=seed)[0] for seed in (9, 7, 8)]
    assert [digest(picture) for picture in together] == [digest(alone[1]), digest(alone[2]), digest(alone[0])]


def test_a_picture_is_the_same_in_a_second_process_and_on_two_threads(pipeline: Pipeline, bundle: Path, keys: KeyPair) -> None:
    script = (
        "import sys, hashlib; from pathlib import Path\n"
        "from appliance.engine.pipeline import Pipeline; from appliance.request import GenerationRequest\n"
        "from appliance.trust.key import TrustedKey; from appliance.trust.verify import verify\n"
        "model = verify(Path(sys.argv[1]), [TrustedKey.load(Path(sys.argv[2]))])\n"
        "pipeline = Pipeline(model, threads=2)\n"
        "fields = {'prompt': 'a red apple', 'seed': 7, 'steps': 3}\n"
        "request = GenerationRequest.parse(fields, model.description, fresh_seed=1)\n"
        "[picture] = pipeline.generate(request, on_step=lambda _: None, cancelled=lambda: False)\n"
        "print(hashlib.sha256(picture.pixels.tobytes()).hexdigest())\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(bundle), str(keys.public)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")      # and ONNX Runtime has nothing to say
    assert ran.stdout.strip() == digest(pictures(pipeline)[0])


def test_what_was_drawn_before_leaves_no_trace_in_what_is_drawn_next(pipeline: Pipeline) -> None:
    [before] = pictures(pipeline)
    pictures(pipeline, prompt="blue " * 100, width=64, height=64, guidance_scale=1, count=2)
    assert digest(pictures(pipeline)[0]) == digest(before)


# ── What a request says shows in the picture ──────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [{"seed": 8}, {"prompt": "a blue apple"}, {"prompt": "a (red:1.5) apple"}, {"negative_prompt": "blue"},
     {"guidance_scale": 2}, {"guidance_scale": 1}, {"steps": 4}, {"sampler": "euler"}, {"sampler": "euler", "spacing": "karras"},
     {"prompt": "a red apple" + ", apple" * 60}],
    ids=str,
)
def test_every_field_of_a_request_changes_the_picture(pipeline: Pipeline, fields: dict[str, object]) -> None:
    assert digest(pictures(pipeline, **fields)[0]) != digest(pictures(pipeline)[0])


def test_without_guidance_the_negative_prompt_is_not_looked_at(pipeline: Pipeline) -> None:
    plain, other = pictures(pipeline, guidance_scale=1), pictures(pipeline, guidance_scale=1, negative_prompt="blue")
    assert digest(plain[0]) == digest(other[0])


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 64), (64, 88), (72, 80)])
def test_a_picture_has_the_size_that_was_asked_for(pipeline: Pipeline, width: int, height: int) -> None:
    [picture] = pictures(pipeline, width=width, height=height)
    assert picture.pixels.shape == (height, width, 3)
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.std() > 1     # and is not one colour


def test_given_noise_takes_the_place_of_the_seeds(pipeline: Pipeline) -> None:
    noise = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)
    kept = noise.copy()
    [given], [other_seed] = pictures(pipeline, latents=noise), pictures(pipeline, latents=noise, seed=99)
    assert digest(given) == digest(other_seed)
    assert digest(given) != digest(pictures(pipeline)[0])
    assert np.array_equal(noise, kept)      # the caller's array stays the caller's


@pytest.mark.parametrize(
    ("noise", "fields"),
    [
        (np.zeros((1, 4, 8, 9), np.float32), {}),
        (np.zeros(SHAPE, np.float64), {}),
        (np.zeros((4, 8, 8), np.float32), {}),
        (np.full(SHAPE, np.nan, np.float32), {}),
        (np.full(SHAPE, np.inf, np.float32), {}),
        ([0.0], {}),
        (np.zeros(SHAPE, np.float32), {"count": 2}),
    ],
    ids=["shape", "dtype", "three dimensions", "nan", "inf", "no array", "two pictures"],
)
def test_noise_that_does_not_fit_is_a_bad_request_before_anything_runs(
    pipeline: Pipeline, noise: Any, fields: dict[str, object]
) -> None:
    with pytest.raises(BadRequest, match="noise"):
        pipeline.generate(request(pipeline, **fields), on_step=lambda _: None, cancelled=lambda: False, latents=noise)


def test_syntax_that_is_not_known_is_a_bad_request_before_anything_runs(pipeline: Pipeline) -> None:
    with pytest.raises(BadRequest):
        pipeline.generate(request(pipeline, prompt="[red:blue:0.5] apple"), on_step=lambda _: None, cancelled=lambda: False)


# ── Progress, cancelling, failing ─────────────────────────────────────────────


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_of_every_picture_is_told_once_with_a_small_preview(pipeline: Pipeline, sampler: str) -> None:
    told: list[StepProgress] = []
    list(pipeline.generate(request(pipeline, count=2, sampler=sampler), on_step=told.append, cancelled=lambda: False))
    assert [(t.image_index, t.step, t.steps) for t in told] == [(i, s, 3) for i in (0, 1) for s in (1, 2, 3)]
    assert {t.preview.shape for t in told} == {(8, 8, 3)}
    assert {t.preview.dtype for t in told} == {np.dtype(np.uint8)}
    assert told[0].preview.std() > 1


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_cancelling_takes_effect_before_the_next_step(pipeline: Pipeline, after: int) -> None:
    told: list[StepProgress] = []
    made = pipeline.generate(request(pipeline, count=2), on_step=told.append, cancelled=lambda: len(told) >= after)
    with pytest.raises(Cancelled):
        list(made)
    assert len(told) == after
    assert digest(pictures(pipeline)[0])    # and the next request is served


def test_numbers_that_are_not_finite_are_an_error_and_not_a_black_picture(pipeline: Pipeline) -> None:
    with pytest.raises(EngineError, match="not finite") as caught:
        pictures(pipeline, latents=np.full(SHAPE, 3e38, np.float32))
    assert caught.value.reason == "not_finite"
    assert len(pictures(pipeline)) == 1


def test_a_second_request_at_the_same_time_is_a_mistake_of_the_caller(pipeline: Pipeline) -> None:
    first = iter(pipeline.generate(request(pipeline, count=2), on_step=lambda _: None, cancelled=lambda: False))
    next(first)
    with pytest.raises(RuntimeError):
        pictures(pipeline)
    first.close()   # type: ignore[attr-defined]
    assert len(pictures(pipeline)) == 1


def test_an_error_of_the_caller_in_on_step_leaves_a_usable_pipeline(pipeline: Pipeline) -> None:
    def gone(_: StepProgress) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        list(pipeline.generate(request(pipeline), on_step=gone, cancelled=lambda: False))
    assert len(pictures(pipeline)) == 1


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder"])
def test_a_graph_that_onnx_runtime_cannot_load_is_refused_with_its_name_and_no_path_of_the_machine(
    part: str, altered: Callable[[str, Callable[[bytes], bytes]], VerifiedModel]
) -> None:
    model = altered(f"{part}/model.onnx", lambda graph: graph.replace(b"Softmax", b"Softmix"))
    with pytest.raises(EngineError) as caught:
        Pipeline(model, threads=1)
    assert caught.value.reason == "graph_unusable"
    assert str(caught.value).startswith(f"{part}/model.onnx: ")
    assert "/onnxruntime" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_graphs_in_each_others_places_are_refused(altered: Callable[[str, Callable[[bytes], bytes]], VerifiedModel]) -> None:
    model = altered("unet/model.onnx", lambda _: (TINY / "vae_decoder" / "model.onnx").read_bytes())
    with pytest.raises(EngineError) as caught:
        Pipeline(model, threads=1)
    assert caught.value.reason == "graph_ports"


def test_a_description_of_another_width_than_the_graphs_is_refused(
    altered: Callable[[str, Callable[[bytes], bytes]], VerifiedModel]
) -> None:
    def wider(description: bytes) -> bytes:
        document = json.loads(description)
        document["text"]["hidden_size"] = 64
        return json.dumps(document).encode()

    model = altered("model.json", wider)
    with pytest.raises(EngineError) as caught:
        Pipeline(model, threads=1)
    assert caught.value.reason == "graph_ports"


# ── Memory ────────────────────────────────────────────────────────────────────


def held(pipeline: Pipeline) -> list[Any]:
    """Return the arrays that a pipeline keeps between requests."""
    bench = pipeline._bench
    assert bench is not None
    return [array for run in bench.runs for array in run.arrays]


@pytest.mark.parametrize("ending", ["done", "cancelled", "failed", "abandoned"])
def test_however_a_generation_ends_its_arrays_are_overwritten(pipeline: Pipeline, ending: str) -> None:
    dirty: list[bool] = []

    def look(progress: StepProgress) -> None:
        dirty.append(any(array.any() for array in held(pipeline)))
        if ending == "failed" and progress.step == 2:
            raise BrokenPipeError

    made = pipeline.generate(
        request(pipeline, count=2), on_step=look, cancelled=lambda: ending == "cancelled" and len(dirty) == 2
    )
    try:
        next(iter(made))
        if ending == "done":
            list(made)
    except (Cancelled, BrokenPipeError):
        pass
    del made
    assert any(dirty)       # the arrays looked at are those that hold content in between
    assert not any(array.any() for array in held(pipeline))


def test_nothing_that_shows_a_prompt_or_a_picture_is_in_any_repr(pipeline: Pipeline) -> None:
    [picture] = pictures(pipeline)
    assert "pixels" not in repr(picture)
    assert "preview" not in repr(StepProgress(0, 1, 2, picture.pixels))


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_over_thirty_generations_of_changing_size(pipeline: Pipeline) -> None:
    sizes = [(64, 64), (96, 64), (64, 96)]

    def draw(times: int) -> None:
        for i in range(times):
            width, height = sizes[i % 3]
            pictures(pipeline, width=width, height=height, prompt="red " * (1 + 40 * (i % 2)), seed=i)

    draw(12)
    before = resident()
    draw(30)
    assert resident() - before < 4 << 20
