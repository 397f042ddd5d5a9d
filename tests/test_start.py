"""Painting over and into pictures, on the bundle of random weights, without torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from appliance.engine.bench import Bench
from appliance.engine.pipeline import GeneratedImage, Pipeline, StepProgress
from appliance.engine.start import StartPicture, as_encoded, latent_mask, steps_taken
from appliance.errors import BadRequest, Cancelled, EngineError
from appliance.request import SAMPLERS, GenerationRequest
from appliance.trust.description import INPAINTING
from appliance.trust.key import TrustedKey
from appliance.trust.verify import VerifiedModel, verify
from provisioning.sign import KeyPair, keygen, sign

TINY = Path(__file__).parent / "vectors" / "tiny"
CANARY = 77     # a value of pixels that is looked for


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    """Return a key pair of this run's own."""
    return keygen(tmp_path_factory.mktemp("keys") / "test.pem")


def signed(folder: Path, keys: KeyPair, **changes: object) -> VerifiedModel:
    """Return the tiny bundle, its description changed, signed and verified."""
    shutil.copytree(TINY, folder)
    document = json.loads((folder / "model.json").read_text())
    document["components"] |= changes.pop("components", {})
    (folder / "model.json").write_text(json.dumps({**document, **changes}))
    sign(folder, keys.private)
    return verify(folder, [TrustedKey.load(keys.public)])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, keys: KeyPair) -> Pipeline:
    """Return the tiny model, loaded with its encoder on one thread."""
    return Pipeline(signed(tmp_path_factory.mktemp("bundles") / "tiny", keys), threads=1, from_pictures=True)


def picture(width: int = 64, height: int = 64) -> NDArray[np.uint8]:
    """Return pixels of smooth colours with a hard edge."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 2, y * 2, 255 - x - y], axis=-1).astype(np.uint8)
    pixels[20:40, 10:50] = CANARY
    return pixels


def right_half() -> NDArray[np.uint8]:
    """Return a mask of the right half."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    return mask


def request(pipeline: Pipeline, **fields: object) -> GenerationRequest:
    """Return a parsed request of a few steps."""
    asked = {"prompt": "a red apple", "seed": 7, "steps": 4, **fields}
    return GenerationRequest.parse(asked, pipeline.description, fresh_seed=1)


def drawn(pipeline: Pipeline, start: StartPicture | None, **fields: object) -> list[GeneratedImage]:
    """Return the pictures of a request."""
    return list(pipeline.generate(request(pipeline, **fields), on_step=lambda _: None, cancelled=lambda: False, start=start))


@pytest.mark.parametrize("mask", [None, right_half()], ids=["over", "into"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_start_gives_the_same_bytes_alone_as_among_others(
    pipeline: Pipeline, sampler: str, mask: NDArray[np.uint8] | None
) -> None:
    start = StartPicture(picture(), 0.6, mask)
    together = drawn(pipeline, start, sampler=sampler, count=2)
    for seed, made in zip((7, 8), together, strict=True):
        [alone] = drawn(pipeline, start, sampler=sampler, seed=seed)
        assert alone.pixels.tobytes() == made.pixels.tobytes()
    assert together[0].pixels.tobytes() != together[1].pixels.tobytes()


def test_picture_strength_mask_and_seed_each_change_what_is_drawn(pipeline: Pipeline) -> None:
    plain = StartPicture(picture(), 0.5)
    variants = [
        plain, None, replace(plain, strength=0.8), replace(plain, pixels=255 - picture()), replace(plain, mask=right_half()),
        replace(plain, mask=right_half(), strength=1.0),
    ]
    made = [drawn(pipeline, start)[0].pixels.tobytes() for start in variants]
    made.append(drawn(pipeline, plain, seed=8)[0].pixels.tobytes())
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_what_is_not_marked_ends_as_the_picture_was(
    pipeline: Pipeline, sampler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    decode, lay = Bench.decode, Bench.lay

    def looked_at(bench: Bench, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        seen["latents"] = latents.copy()
        return decode(bench, latents)

    def laid(bench: Bench, start: StartPicture) -> Any:
        ground = lay(bench, start)
        seen["clean"] = ground.clean.copy()
        return ground

    monkeypatch.setattr(Bench, "decode", looked_at)
    monkeypatch.setattr(Bench, "lay", laid)
    drawn(pipeline, StartPicture(picture(), strength, right_half()), sampler=sampler)
    assert np.array_equal(seen["latents"][..., :4], seen["clean"][..., :4])
    assert not np.isclose(seen["latents"][..., 4:], seen["clean"][..., 4:]).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("strength", "taken"), [(0.1, 1), (0.5, 5), (0.59, 5), (1, 10)])
def test_the_steps_that_are_taken_are_told_and_no_others(pipeline: Pipeline, sampler: str, strength: float, taken: int) -> None:
    told: list[StepProgress] = []
    asked = request(pipeline, steps=10, sampler=sampler)
    list(pipeline.generate(asked, on_step=told.append, cancelled=lambda: False, start=StartPicture(picture(), strength)))
    assert [(progress.step, progress.steps) for progress in told] == [(step, taken) for step in range(1, taken + 1)]


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (StartPicture(picture(72, 64), 0.5), "the picture to start from is uint8"),
        (StartPicture(picture()[..., 0], 0.5), "picture"),
        (StartPicture(picture().astype(np.float32), 0.5), "float32"),
        (StartPicture([[0]], 0.5), "no array"),                            # type: ignore[arg-type]
        (StartPicture(picture(), 0.0), "above 0"),
        (StartPicture(picture(), -0.5), "above 0"),
        (StartPicture(picture(), 1.01), "up to 1"),
        (StartPicture(picture(), float("nan")), "number"),
        (StartPicture(picture(), float("inf")), "number"),
        (StartPicture(picture(), True), "number"),
        (StartPicture(picture(), "0.5"), "number"),                        # type: ignore[arg-type]
        (StartPicture(picture(), 0.2), "leaves none to take"),
        (StartPicture(picture(), 0.5, right_half()[:32]), "the mask to start from"),
        (StartPicture(picture(), 0.5, right_half().astype(bool)), "mask"),
        (StartPicture(picture(), 0.5, np.zeros((64, 64), np.uint8)), "marks nothing"),
        (StartPicture(picture(), 0.5, np.full((64, 64), 127, np.uint8)), "marks nothing"),
    ],
)     # fmt: skip
def test_a_start_that_does_not_fit_is_a_bad_request_before_anything_runs(
    pipeline: Pipeline, start: StartPicture, said: str
) -> None:
    with pytest.raises(BadRequest, match=said) as refused:
        pipeline.generate(request(pipeline), on_step=lambda _: None, cancelled=lambda: False, start=start)
    assert refused.value.hint


def test_steps_are_counted_as_diffusers_counts_them() -> None:
    assert [steps_taken(20, strength) for strength in (0.04, 0.05, 0.29, 0.55, 0.999, 1)] == [0, 1, 5, 11, 19, 20]


def test_a_mask_marks_a_latent_by_its_pixel_at_the_upper_left() -> None:
    mask = np.zeros((16, 24), np.uint8)
    mask[8, 16], mask[0, 0], mask[15, 15] = 128, 127, 255
    assert latent_mask(mask, 8).tolist() == [[[[0, 0, 0], [0, 0, 1]]]]


def test_the_encoder_is_shown_pixels_from_minus_one_to_one_and_grey_where_they_are_hidden() -> None:
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    assert as_encoded(pixels).ravel() == pytest.approx([-1, 1, -0.6])
    assert as_encoded(pixels, np.array([[255]], np.uint8)).ravel().tolist() == [0, 0, 0]


def test_without_an_encoder_a_start_is_a_bad_request(tmp_path: Path, keys: KeyPair) -> None:
    model = signed(tmp_path / "whole", keys)
    bare = signed(tmp_path / "bare", keys, components={"vae_encoder": None})
    for pipeline in (Pipeline(model, threads=1), Pipeline(bare, threads=1, from_pictures=True)):
        with pytest.raises(BadRequest, match="encoder"):
            drawn(pipeline, StartPicture(picture(), 0.5))
        assert len(drawn(pipeline, None)) == 1


def test_a_model_that_says_it_paints_into_pictures_and_cannot_is_refused(tmp_path: Path, keys: KeyPair) -> None:
    with pytest.raises(EngineError) as caught:
        Pipeline(signed(tmp_path / "false", keys, family=INPAINTING), threads=1)
    assert caught.value.reason == "graph_ports"


@pytest.mark.parametrize("ending", ["done", "cancelled", "failed"])
def test_however_a_generation_ends_picture_and_mask_are_overwritten(
    pipeline: Pipeline, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grounds: list[Any] = []
    lay = Bench.lay

    def laid(bench: Bench, start: StartPicture) -> Any:
        grounds.append(lay(bench, start))
        return grounds[-1]

    monkeypatch.setattr(Bench, "lay", laid)
    told: list[StepProgress] = []

    def look(progress: StepProgress) -> None:
        told.append(progress)
        assert grounds[0].clean.any()
        assert grounds[0].mask.any()
        if ending == "failed":
            raise BrokenPipeError

    start = StartPicture(picture(), 0.9, right_half())
    kept = start.pixels.copy()
    made = pipeline.generate(
        request(pipeline), on_step=look, cancelled=lambda: ending == "cancelled" and len(told) == 1, start=start
    )
    try:
        list(made)
    except (Cancelled, BrokenPipeError):
        pass
    bench = pipeline._bench
    assert told
    assert bench is not None
    assert len(bench.runs) == 4
    assert not any(array.any() for run in bench.runs for array in run.arrays)
    assert not grounds[0].clean.any()
    assert not grounds[0].mask.any()
    assert np.array_equal(start.pixels, kept)       # the caller's array stays the caller's


def test_a_start_leaves_no_trace_in_what_is_drawn_next(pipeline: Pipeline) -> None:
    [before] = drawn(pipeline, None)
    drawn(pipeline, StartPicture(picture(), 0.9, right_half()))
    [after] = drawn(pipeline, None)
    assert before.pixels.tobytes() == after.pixels.tobytes()


def test_no_repr_shows_a_picture(pipeline: Pipeline) -> None:
    assert str(CANARY) not in repr(StartPicture(picture(), 0.5, np.full((64, 64), CANARY, np.uint8)))
