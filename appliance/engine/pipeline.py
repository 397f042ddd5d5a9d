"""From a request to pictures: text-to-image with a Stable Diffusion model (Rombach et al., arXiv:2112.10752).

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
5. Nothing derived from a prompt is kept for the next one.

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

from appliance.engine.noise import NoiseStream
from appliance.engine.sampling import Sampler, make_sampler
from appliance.engine.sessions import Array, BoundRun, Network, usable_cores
from appliance.engine.tokenizer import Chunk, PromptTokenizer, apply_weights
from appliance.errors import BadRequest, Cancelled, EngineError
from appliance.request import GenerationRequest
from appliance.trust.description import LatentSpace, ModelDescription
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

    def __init__(self, model: VerifiedModel, *, threads: int | None = None) -> None:
        """Load the model. `threads` is by default one for each processor that this process may use.

        Raises `EngineError` for a graph that cannot be used, `VerificationRefused` for such a tokenizer.
        """
        self.description = model.description
        self.threads = threads or usable_cores()
        parts = self.description.components
        self._tokenizer = PromptTokenizer(model.content(parts.tokenizer), self.description.text)
        text, unet, decoder = (
            Network(model, path, threads=self.threads) for path in (parts.text_encoder, parts.unet, parts.vae_decoder)
        )
        _check_graphs(self.description, text, unet, decoder)
        self._networks = (text, unet, decoder)
        self._bench: _Bench | None = None
        self._in_use = threading.Lock()

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_step: Callable[[StepProgress], None],
        cancelled: Callable[[], bool],
        latents: Floats | None = None,
    ) -> Iterator[GeneratedImage]:
        """Return the request's pictures, each made when it is asked for.

        `latents` is unit Gaussian noise (1, channels, height / downscale, width / downscale) to begin with in place of the
        seed's, for comparisons with other programs. Raises `BadRequest` at once; `Cancelled` and `EngineError` on the way.
        """
        space = self.description.latents
        shape = (space.channels, request.height // space.downscale, request.width // space.downscale)
        if latents is not None:
            _check_noise(latents, (1, *shape), request.count)
            latents = latents.copy()
        guided = request.guidance_scale > 1
        if guided:
            wanted, unwanted = self._tokenizer.pair(request.prompt, request.negative_prompt)
            rows = [unwanted, wanted]
        else:
            rows = [self._tokenizer.encode(request.prompt)]
        self._sampler(request)      # refuses what cannot be sampled, before anything is begun
        return self._pictures(
            request, rows, shape=shape, latents=latents, on_step=on_step, cancelled=cancelled
        )

    def _pictures(
        self,
        request: GenerationRequest,
        rows: list[list[Chunk]],
        *,
        shape: tuple[int, int, int],
        latents: Floats | None,
        on_step: Callable[[StepProgress], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[GeneratedImage]:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("a pipeline makes one request's pictures at a time")
        try:
            layout = _Layout(rows=len(rows), chunks=len(rows[0]), shape=shape)
            if self._bench is None or self._bench.layout != layout:
                self._bench = None      # before the next one: never two at once
                self._bench = _Bench(self.description, layout, *self._networks)
            bench = self._bench
            try:
                bench.encode(rows, cancelled)
                for index in range(request.count):
                    seed = request.seed + index
                    noise = NoiseStream((seed,), shape)
                    denoised = self._denoise(
                        bench, request, index=index, noise=noise, start=latents, on_step=on_step, cancelled=cancelled
                    )
                    if cancelled():
                        raise Cancelled
                    pixels = bench.decode(denoised)
                    denoised.fill(0)
                    yield GeneratedImage(seed, pixels, self.description.variant)
            finally:
                bench.wipe()
                if latents is not None:
                    latents.fill(0)
        finally:
            self._in_use.release()

    def _denoise(
        self,
        bench: _Bench,
        request: GenerationRequest,
        *,
        index: int,
        noise: NoiseStream,
        start: Floats | None,
        on_step: Callable[[StepProgress], None],
        cancelled: Callable[[], bool],
    ) -> Floats:
        sampler = self._sampler(request)
        last = len(sampler.timesteps) - 1
        latents = sampler.initial(noise.initial() if start is None else start.copy())
        # Overflow shows as infinity and is looked for below; numpy's warnings would go to standard error.
        with np.errstate(over="ignore", invalid="ignore"):
            for i, timestep in enumerate(sampler.timesteps):
                if cancelled():
                    raise Cancelled
                output = bench.predict(sampler.scale_input(latents, i), timestep, request.guidance_scale)
                latents, denoised = sampler.step(latents, output, i, noise.step)
                if not np.isfinite(latents).all():
                    raise EngineError(
                        "not_finite", f"step {i // sampler.order + 1} gave numbers that are not finite",
                        hint="try a lower guidance scale or smaller weights in the prompt",
                    )
                # A step is told when it is done, however often it asked the model.
                if i % sampler.order == sampler.order - 1 or i == last:
                    preview = _preview(denoised[0], self.description.latents)
                    on_step(StepProgress(index, i // sampler.order + 1, last // sampler.order + 1, preview))
        return latents

    def _sampler(self, request: GenerationRequest) -> Sampler:
        return make_sampler(request.sampler, self.description.schedule, request.steps, request.spacing)


@dataclass(frozen=True)
class _Layout:
    """What the sizes of all arrays follow from: rows of the denoising network, chunks of the prompt, shape of the latents."""

    rows: int
    chunks: int
    shape: tuple[int, int, int]


class _Bench:
    """The arrays of one layout, bound to the networks."""

    def __init__(
        self, description: ModelDescription, layout: _Layout, text: Network, unet: Network, decoder: Network
    ) -> None:
        self.layout = layout
        self._scaling_factor = description.latents.scaling_factor
        length, width = description.text.max_length, description.text.hidden_size
        channels, height, across = layout.shape
        down = description.latents.downscale
        self._ids = np.zeros((1, length), np.int64)
        self._encoded = np.zeros((1, length, width), np.float32)
        self._latents = np.zeros((layout.rows, *layout.shape), np.float32)
        self._timestep = np.zeros(1, np.float32)
        self._context = np.zeros((layout.rows, layout.chunks * length, width), np.float32)
        self._prediction = np.zeros_like(self._latents)
        self._undecoded = np.zeros((1, channels, height, across), np.float32)
        self._image = np.zeros((1, 3, height * down, across * down), np.float32)
        self._text: BoundRun = text.bind(ids=self._ids, context=self._encoded)
        self._unet: BoundRun = unet.bind(
            latents=self._latents, timestep=self._timestep, context=self._context, prediction=self._prediction
        )
        self._decoder: BoundRun = decoder.bind(latents=self._undecoded, image=self._image)

    def encode(self, rows: list[list[Chunk]], cancelled: Callable[[], bool]) -> None:
        """Fill the context: each row's chunks one after another along the tokens."""
        length = self._ids.shape[1]
        for row, chunks in enumerate(rows):
            for place, chunk in enumerate(chunks):
                if cancelled():
                    raise Cancelled
                self._ids[0] = chunk.ids
                self._text.run()
                span = slice(place * length, (place + 1) * length)
                self._context[row, span] = apply_weights(self._encoded[0], chunk.weights)

    def predict(self, latents: Floats, timestep: float, guidance_scale: float) -> Floats:
        """Return the network's output for latents (1, …), guided where there are two rows: the unwanted, then the wanted."""
        self._latents[:] = latents
        self._timestep[0] = timestep
        self._unet.run()
        if len(self._prediction) == 1:
            return self._prediction.copy()
        unwanted, wanted = self._prediction[:1], self._prediction[1:]
        guided: Floats = unwanted + np.float32(guidance_scale) * (wanted - unwanted)
        return guided

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Return the picture of latents (1, …), (height, width, 3). Raises `EngineError` where it is no picture."""
        np.divide(latents, np.float32(self._scaling_factor), out=self._undecoded)
        self._decoder.run()
        if not np.isfinite(self._image).all():
            raise EngineError("not_finite", "the decoder gave numbers that are not finite", hint="try another seed")
        return _to_bytes(self._image[0].transpose(1, 2, 0))

    def wipe(self) -> None:
        """Overwrite every array with zeros."""
        for run in (self._text, self._unet, self._decoder):
            for array in run.arrays:
                array.fill(0)


def _preview(denoised: Floats, space: LatentSpace) -> NDArray[np.uint8]:
    """Return latents (channels, height, width) as a small picture, by the model's linear map."""
    matrix = np.array(space.preview, np.float32)
    return _to_bytes(np.tensordot(denoised, matrix[:-1], axes=(0, 0)) + matrix[-1])


def _to_bytes(picture: Floats) -> NDArray[np.uint8]:
    """Return values in [-1, 1] as [0, 255]: clipped, then rounded to the nearest."""
    pixels: NDArray[np.uint8] = np.rint(np.clip(picture * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)
    return pixels


def _check_noise(latents: Floats, shape: tuple[int, ...], count: int) -> None:
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32 or latents.shape != shape:
        found = f"{latents.dtype} {latents.shape}" if isinstance(latents, np.ndarray) else "no array"
        raise BadRequest("latents", f"the noise given is {found}, and a picture of this size needs float32 {shape}")
    if not np.isfinite(latents).all():
        raise BadRequest("latents", "the noise given holds numbers that are not finite")
    if count != 1:
        raise BadRequest("latents", f"one noise was given for {count} pictures", hint="ask for one picture")


def _check_graphs(description: ModelDescription, text: Network, unet: Network, decoder: Network) -> None:
    """Raise `EngineError` unless the graphs read and give what this pipeline binds, in the sizes that `model.json` names."""
    tokens, width, channels = description.text.max_length, description.text.hidden_size, description.latents.channels
    latents = (None, channels, None, None)
    expected: list[tuple[Network, dict[str, tuple[type, tuple[int | None, ...]]]]] = [
        (text, {"ids": (np.int64, (None, tokens)), "context": (np.float32, (None, tokens, width))}),
        (unet, {"latents": (np.float32, latents), "timestep": (np.float32, (1,)), "context": (np.float32, (None, None, width)),
                "prediction": (np.float32, latents)}),
        (decoder, {"latents": (np.float32, latents), "image": (np.float32, (None, 3, None, None))}),
    ]
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


__all__ = ["Array", "GeneratedImage", "Pipeline", "StepProgress"]
