"""From a request to pictures with a Stable Diffusion model (Rombach et al., arXiv:2112.10752), from noise or from a picture.

A `Pipeline` is made from a `VerifiedModel` and nothing else, and keeps of it what ONNX Runtime has taken in, not its bytes.

Rules, in order:

1. The same request gives the same bytes: alone, as one of several, in another process. So pictures are made one after another,
   each chunk of a prompt is encoded by itself, and the denoising network always sees the same number of rows: two with
   guidance (Ho and Salimans, arXiv:2207.12598), one without. ADR 0004 has what more rows at once would bring.
2. Cancelling takes effect before the next step.
3. Numbers that are not finite end the generation with an `EngineError`; no black picture is handed out.
4. Arrays belong to the last size that was drawn, and are reused for the next picture of that size. When a generation ends,
   however it ends, those that held anything of it are overwritten with zeros. (What ONNX Runtime held in between lives in its
   own memory, and ends with the process.)
5. Nothing derived from a prompt or a picture is kept for the next one.
6. A picture to start from comes as an array (`start.py`), with a mask or without. Under a mask, an ordinary model is led back
   to the picture after each evaluation wherever it is not marked (as in RePaint, Lugmayr et al., arXiv:2201.09865, without its
   resampling); an inpainting model reads mask and picture instead.

    pipeline = Pipeline(verify(bundle, trusted))
    for picture in pipeline.generate(request, on_step=print, cancelled=lambda: False):
        save(picture.seed, encode_png(picture.pixels))
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from appliance.engine.bench import Bench, Ground, Layout, Networks, to_bytes, unet_channels
from appliance.engine.noise import NoiseStream
from appliance.engine.sampling import Sampler, make_sampler
from appliance.engine.sessions import Array, Network, usable_cores
from appliance.engine.start import StartPicture, steps_taken
from appliance.engine.tokenizer import Chunk, PromptTokenizer
from appliance.errors import BadRequest, Cancelled, EngineError
from appliance.request import GenerationRequest
from appliance.trust.description import INPAINTING, LatentSpace, ModelDescription
from appliance.trust.verify import VerifiedModel

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class StepProgress:
    """One step of one picture is done."""

    image_index: int
    step: int           # from 1
    steps: int
    preview: NDArray[np.uint8] = field(repr=False)      # (latent height, latent width, 3): what the picture is coming to


@dataclass(frozen=True)
class GeneratedImage:
    """One picture."""

    seed: int
    pixels: NDArray[np.uint8] = field(repr=False)       # (height, width, 3), sRGB
    variant: str


class Pipeline:
    """One model, loaded; makes one request's pictures at a time."""

    def __init__(self, model: VerifiedModel, *, threads: int | None = None, from_pictures: bool = False) -> None:
        """Load the model. `threads` is by default one for each processor that this process may use.

        With `from_pictures` the encoder is loaded too, if the bundle has one; an inpainting model's always is.

        Raises `EngineError` for a graph that cannot be used, `VerificationRefused` for such a tokenizer.
        """
        self.description = model.description
        self.threads = threads or usable_cores()
        parts = self.description.components
        self._tokenizer = PromptTokenizer(model.content(parts.tokenizer), self.description.text)
        text, unet, decoder = (
            Network(model, path, threads=self.threads) for path in (parts.text_encoder, parts.unet, parts.vae_decoder)
        )
        encoder = None
        if (from_pictures or self.description.family == INPAINTING) and parts.vae_encoder is not None:
            encoder = Network(model, parts.vae_encoder, threads=self.threads)
        self._networks = Networks(text, unet, decoder, encoder)
        _check_graphs(self.description, self._networks)
        self._bench: Bench | None = None
        self._in_use = threading.Lock()

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_step: Callable[[StepProgress], None],
        cancelled: Callable[[], bool],
        latents: Floats | None = None,
        start: StartPicture | None = None,
    ) -> Iterator[GeneratedImage]:
        """Return the request's pictures, each made when it is asked for; from `start` if it is given, or else from noise.

        `latents` is unit Gaussian noise (1, channels, height / downscale, width / downscale) to begin with in place of the
        seed's, for comparisons with other programs. Raises `BadRequest` at once; `Cancelled` and `EngineError` on the way.
        """
        space = self.description.latents
        shape = (space.channels, request.height // space.downscale, request.width // space.downscale)
        if latents is not None:
            _check_noise(latents, (1, *shape), request.count)
            latents = latents.copy()
        self._check_start(start, request)
        guided = request.guidance_scale > 1
        if guided:
            wanted, unwanted = self._tokenizer.pair(request.prompt, request.negative_prompt)
            rows = [unwanted, wanted]
        else:
            rows = [self._tokenizer.encode(request.prompt)]
        self._sampler(request)      # refuses what cannot be sampled, before anything is begun
        return self._pictures(
            request, rows, shape=shape, latents=latents, start=start, on_step=on_step, cancelled=cancelled
        )

    def _check_start(self, start: StartPicture | None, request: GenerationRequest) -> None:
        inpainting = self.description.family == INPAINTING
        if start is not None:
            if self._networks.encoder is None:
                raise BadRequest("start", "this model cannot start from a picture: its encoder is missing or was not loaded",
                                 hint="describe the picture in words, or export the model again with its encoder")
            start.check(request, self.description.latents.downscale)
        if inpainting and (start is None or start.mask is None):
            raise BadRequest("start", "this model paints into pictures and needs one, and a mask",
                             hint="choose another model to draw from words alone")

    def _pictures(
        self,
        request: GenerationRequest,
        rows: list[list[Chunk]],
        *,
        shape: tuple[int, int, int],
        latents: Floats | None,
        start: StartPicture | None,
        on_step: Callable[[StepProgress], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[GeneratedImage]:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("a pipeline makes one request's pictures at a time")
        try:
            layout = Layout(rows=len(rows), chunks=len(rows[0]), shape=shape, encoder=start is not None)
            if self._bench is None or self._bench.layout != layout:
                self._bench = None      # before the next one: never two at once
                self._bench = Bench(self.description, layout, self._networks)
            bench, ground = self._bench, None
            try:
                bench.encode(rows, cancelled)
                if start is not None:
                    ground = bench.lay(start)
                for index in range(request.count):
                    seed = request.seed + index
                    noise = NoiseStream((seed,), shape)
                    drawn = noise.initial() if latents is None else latents.copy()
                    sampling = self._begin(request, drawn, start, ground)
                    denoised = self._denoise(
                        bench, request, sampling, index=index, noise=noise, on_step=on_step, cancelled=cancelled
                    )
                    if cancelled():
                        raise Cancelled
                    pixels = bench.decode(denoised)
                    denoised.fill(0)
                    yield GeneratedImage(seed, pixels, self.description.variant)
            finally:
                bench.wipe()
                if ground is not None:
                    ground.wipe()
                if latents is not None:
                    latents.fill(0)
        finally:
            self._in_use.release()

    def _begin(
        self, request: GenerationRequest, drawn: Floats, start: StartPicture | None, ground: Ground | None
    ) -> _Sampling:
        """Return where sampling begins: at the first evaluation with noise, or later with a picture and noise."""
        sampler = self._sampler(request)
        if start is None or ground is None:
            return _Sampling(sampler, 0, sampler.initial(drawn), drawn, None)
        first = (request.steps - steps_taken(request.steps, start.strength)) * sampler.order
        alone = start.mask is not None and start.strength == 1
        latents = sampler.initial(drawn) if alone else sampler.noised(ground.clean, drawn, first)
        return _Sampling(sampler, first, latents, drawn, ground)

    def _denoise(
        self,
        bench: Bench,
        request: GenerationRequest,
        sampling: _Sampling,
        *,
        index: int,
        noise: NoiseStream,
        on_step: Callable[[StepProgress], None],
        cancelled: Callable[[], bool],
    ) -> Floats:
        sampler, latents, ground = sampling.sampler, sampling.latents, sampling.ground
        order, last = sampler.order, len(sampler.timesteps) - 1
        steps = (last - sampling.first) // order + 1
        # Overflow shows as infinity and is looked for below; numpy's warnings would go to standard error.
        with np.errstate(over="ignore", invalid="ignore"):
            for i in range(sampling.first, last + 1):
                if cancelled():
                    raise Cancelled
                step = (i - sampling.first) // order + 1
                output = bench.predict(sampler.scale_input(latents, i), sampler.timesteps[i], request.guidance_scale)
                latents, denoised = sampler.step(latents, output, i, noise.step)
                if ground is not None and ground.mask is not None:
                    latents = ground.over(latents, sampler.noised(ground.clean, sampling.drawn, i + 1))
                    denoised = ground.over(denoised, ground.clean)
                if not np.isfinite(latents).all():
                    raise EngineError(
                        "not_finite", f"step {step} of {steps} gave numbers that are not finite",
                        hint="try a lower guidance scale or smaller weights in the prompt",
                    )
                # A step is told when it is done, however often it asked the model.
                if i % order == order - 1 or i == last:
                    on_step(StepProgress(index, step, steps, _preview(denoised[0], self.description.latents)))
        return latents

    def _sampler(self, request: GenerationRequest) -> Sampler:
        return make_sampler(request.sampler, self.description.schedule, request.steps, request.spacing)


@dataclass(frozen=True)
class _Sampling:
    """One picture's sampling as it begins."""

    sampler: Sampler
    first: int                              # evaluation
    latents: Floats = field(repr=False)
    drawn: Floats = field(repr=False)       # the unit Gaussian noise in them
    ground: Ground | None = field(repr=False)


def _preview(denoised: Floats, space: LatentSpace) -> NDArray[np.uint8]:
    """Return latents (channels, height, width) as a small picture, by the model's linear map."""
    matrix = np.array(space.preview, np.float32)
    return to_bytes(np.tensordot(denoised, matrix[:-1], axes=(0, 0)) + matrix[-1])


def _check_noise(latents: Floats, shape: tuple[int, ...], count: int) -> None:
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32 or latents.shape != shape:
        found = f"{latents.dtype} {latents.shape}" if isinstance(latents, np.ndarray) else "no array"
        raise BadRequest("latents", f"the noise given is {found}, and a picture of this size needs float32 {shape}")
    if not np.isfinite(latents).all():
        raise BadRequest("latents", "the noise given holds numbers that are not finite")
    if count != 1:
        raise BadRequest("latents", f"one noise was given for {count} pictures", hint="ask for one picture")


def _check_graphs(description: ModelDescription, networks: Networks) -> None:
    """Raise `EngineError` unless the graphs read and give what this pipeline binds, in the sizes that `model.json` names."""
    tokens, width, channels = description.text.max_length, description.text.hidden_size, description.latents.channels
    latents = (None, channels, None, None)
    expected: list[tuple[Network, dict[str, tuple[type, tuple[int | None, ...]]]]] = [
        (networks.text, {"ids": (np.int64, (None, tokens)), "context": (np.float32, (None, tokens, width))}),
        (networks.unet, {"latents": (np.float32, (None, unet_channels(description), None, None)), "timestep": (np.float32, (1,)),
                         "context": (np.float32, (None, None, width)), "prediction": (np.float32, latents)}),
        (networks.decoder, {"latents": (np.float32, latents), "image": (np.float32, (None, 3, None, None))}),
    ]
    if networks.encoder is not None:
        moments = (None, 2 * channels, None, None)
        expected.append((networks.encoder, {"image": (np.float32, (None, 3, None, None)), "moments": (np.float32, moments)}))
    for network, ports in expected:
        found = {port.name: port for port in (*network.inputs, *network.outputs)}
        for name, (kind, dims) in ports.items():
            port = found.get(name)
            fits = port is not None and port.type is kind and len(port.dims) == len(dims) and all(
                had is None or wanted is None or had == wanted for had, wanted in zip(port.dims, dims, strict=True)
            )
            if not fits or len(found) != len(ports):
                raise EngineError(
                    "graph_ports", f"{network.path}: its inputs and outputs are not those of a {description.family} model",
                    hint="export the model again with this version of darkroom-provision",
                )


__all__ = ["Array", "GeneratedImage", "Pipeline", "StartPicture", "StepProgress"]
