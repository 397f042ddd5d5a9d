"""Painting over and into pictures, beside diffusers' own pipelines with the same noise."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from appliance.engine.bench import Bench
from appliance.engine.noise import NoiseStream
from appliance.engine.pipeline import Pipeline
from appliance.engine.sampling import make_sampler
from appliance.engine.start import StartPicture, steps_taken
from appliance.errors import BadRequest
from appliance.request import SAMPLERS, GenerationRequest
from appliance.trust.description import INPAINTING
from appliance.trust.key import TrustedKey
from appliance.trust.verify import verify
from provisioning.export import export
from provisioning.sign import keygen, sign
from tests.provisioning import tiny
from tests.provisioning.test_export import SCHEDULERS, STOCHASTIC

STEPS, SEED = 6, 11
LATENTS, PSNR = 1e-3, 40.0      # relative, dB
DIFFUSERS = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Keep the libraries' remarks out of the tests' output, and torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tiny model that draws, and one that paints into pictures, in diffusers' layout."""
    root = tmp_path_factory.mktemp("sources")
    return {"drawing": tiny.make(root / "drawing"), "painting": tiny.make(root / "painting", inpainting=True)}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> dict[str, Pipeline]:
    """Return both, exported, signed, verified and loaded."""
    root = tmp_path_factory.mktemp("bundles")
    (root / "LICENSE").write_text("Do as you like.\n")
    keys = keygen(root / "test.pem")
    made = {}
    for name, source in sources.items():
        export(source, root / name, licence=root / "LICENSE", source_text="random")
        sign(root / name, keys.private)
        made[name] = Pipeline(verify(root / name, [TrustedKey.load(keys.public)]), threads=1, from_pictures=True)
    return made


def start(strength: float, *, masked: bool) -> StartPicture:
    """Return a picture of smooth colours with a hard edge, and an irregular mask that no latent's border follows."""
    y, x = np.mgrid[0:64, 0:64]
    pixels = np.stack([x * 4, y * 4, 255 - x * 2 - y * 2], axis=-1).astype(np.uint8)
    pixels[20:40, 10:50] = (200, 30, 60)
    mask = (((x - 30) ** 2 + (y - 35) ** 2 < 400) * 255).astype(np.uint8)
    mask[3, :] = 127    # just not marked
    mask[:, 50] = 128   # just marked
    return StartPicture(pixels, strength, mask if masked else None)


@pytest.fixture
def compared(
    sources: dict[str, Path], pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> Callable[..., None]:
    """Return what draws one picture on both sides and holds them to each other."""

    def compare(name: str, kind: str, sampler: str, begin: StartPicture) -> None:
        warnings.simplefilter("ignore")     # diffusers 0.42 warns of its own use of numpy 2; pytest takes this back after the test
        pipeline = pipelines[name]
        request = GenerationRequest.parse(
            {"prompt": "a red apple", "negative_prompt": "blue", "steps": STEPS, "guidance_scale": 7.5, "sampler": sampler, "seed": SEED},
            pipeline.description, fresh_seed=0,
        )
        noise = NoiseStream((SEED,), (4, 8, 8))
        order = make_sampler(request.sampler, pipeline.description.schedule, STEPS, "model").order
        skipped = (STEPS - steps_taken(STEPS, begin.strength)) * order
        drawn: list[int] = []

        def of_steps(*_: Any, **__: Any) -> torch.Tensor:
            drawn.append(skipped + len(drawn))
            return torch.from_numpy(noise.step(drawn[-1]))

        for module in STOCHASTIC.values():
            monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", of_steps)
        for module in ("img2img", "inpaint"):
            monkeypatch.setattr(f"{DIFFUSERS}_{module}.randn_tensor", lambda *_, **__: torch.from_numpy(noise.initial()))
        # A draw of zeros from what the encoder says is its mean.
        monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda shape, **_: torch.zeros(shape))
        reference = tiny.reference(sources[name], kind)
        reference.scheduler = SCHEDULERS[sampler](reference.scheduler.config)
        masks = {} if begin.mask is None else {"mask_image": Image.fromarray(begin.mask), "height": 64, "width": 64}
        latents = reference(
            "a red apple", image=Image.fromarray(begin.pixels), strength=begin.strength, negative_prompt="blue",
            num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent", **masks,
        ).images
        theirs = reference.vae.decode(latents / reference.vae.config.scaling_factor).sample[0]
        shown = np.rint(np.clip(theirs.detach().numpy().transpose(1, 2, 0) / 2 + 0.5, 0, 1) * 255)

        ours: list[NDArray[np.float32]] = []
        decode = Bench.decode

        def looked_at(bench: Bench, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
            ours.append(latents.copy())
            return decode(bench, latents)

        monkeypatch.setattr(Bench, "decode", looked_at)
        [picture] = pipeline.generate(request, on_step=lambda _: None, cancelled=lambda: False, start=begin)
        difference = float(np.abs(ours[0] - latents.numpy()).max() / np.abs(latents.numpy()).max())
        error = float(np.mean((picture.pixels.astype(np.float64) - shown) ** 2))
        psnr = float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
        record_property("latents", difference)
        print(f"{kind} {name} {sampler} {begin.strength:g}: {difference:.1e}, {psnr:.1f} dB")    # shown by -rP
        assert np.std(shown) > 5, "a picture of one colour would agree with anything"
        assert difference <= LATENTS
        assert psnr >= PSNR

    return compare


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_painting_over_a_picture_agrees_with_diffusers(compared: Callable[..., None], sampler: str, strength: float) -> None:
    compared("drawing", "StableDiffusionImg2ImgPipeline", sampler, start(strength, masked=False))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.55, 1.0])
def test_painting_into_a_picture_agrees_with_diffusers(compared: Callable[..., None], sampler: str, strength: float) -> None:
    compared("drawing", "StableDiffusionInpaintPipeline", sampler, start(strength, masked=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.55, 1.0])
def test_a_model_made_for_painting_into_pictures_agrees_with_diffusers(
    compared: Callable[..., None], sampler: str, strength: float
) -> None:
    compared("painting", "StableDiffusionInpaintPipeline", sampler, start(strength, masked=True))


def test_the_bundle_of_a_model_made_for_painting_into_pictures_says_so(pipelines: dict[str, Pipeline]) -> None:
    assert pipelines["painting"].description.family == INPAINTING
    assert pipelines["drawing"].description.family == "sd1"


@pytest.mark.parametrize("begin", [None, start(0.5, masked=False)], ids=["nothing", "no mask"])
def test_a_model_made_for_painting_into_pictures_wants_one_and_a_mask(
    pipelines: dict[str, Pipeline], begin: StartPicture | None
) -> None:
    pipeline = pipelines["painting"]
    request = GenerationRequest.parse({"prompt": "red", "steps": 2}, pipeline.description, fresh_seed=5)
    with pytest.raises(BadRequest, match="a mask"):
        pipeline.generate(request, on_step=lambda _: None, cancelled=lambda: False, start=begin)


def test_what_a_mask_hides_is_not_shown_to_a_model_made_for_it(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["painting"]
    request = GenerationRequest.parse({"prompt": "red", "steps": 2}, pipeline.description, fresh_seed=5)
    begin = start(1.0, masked=True)
    assert begin.mask is not None
    other = begin.pixels.copy()
    other[begin.mask >= 128] = 255 - other[begin.mask >= 128]
    drawn = [
        next(pipeline.generate(request, on_step=lambda _: None, cancelled=lambda: False, start=StartPicture(pixels, 1.0, begin.mask))).pixels
        for pixels in (begin.pixels, other, 255 - begin.pixels)
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
