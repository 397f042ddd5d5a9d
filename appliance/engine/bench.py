"""The arrays that a model's graphs read and write, for one size of picture at a time.

This room does the arithmetic around the graphs, guidance among it, and holds content only between `encode` and `wipe`. Which
sizes there are, when to stop and what to say is the pipeline's.

Rules, in order:

1. Every array that a graph reads or writes is made once for a layout and bound; a run copies nothing.
2. After `wipe` each of them is zero.
3. Numbers that are not finite come out of here as an `EngineError`, never as a picture.

    bench = Bench(description, Layout(rows=2, chunks=1, shape=(4, 64, 64), encoder=False), networks)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from appliance.engine.sessions import BoundRun, Network
from appliance.engine.start import StartPicture, as_encoded, latent_mask
from appliance.engine.tokenizer import Chunk, apply_weights
from appliance.errors import Cancelled, EngineError
from appliance.trust.description import INPAINTING, ModelDescription

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Networks:
    """A model's graphs; `encoder` only where pictures may be started from."""

    text: Network
    unet: Network
    decoder: Network
    encoder: Network | None


@dataclass(frozen=True)
class Layout:
    """What the sizes of all arrays follow from: rows of the denoising network, chunks of the prompt, shape of the latents."""

    rows: int
    chunks: int
    shape: tuple[int, int, int]
    encoder: bool       # whether a picture to start from is encoded


@dataclass(frozen=True)
class Ground:
    """A picture to start from, as latents."""

    clean: Floats               # (1, channels, height, width)
    mask: Floats | None         # (1, 1, height, width): one where it is painted anew

    def over(self, latents: Floats, known: Floats) -> Floats:
        """Return `latents` where they are painted anew, and `known` elsewhere."""
        return latents if self.mask is None else (1 - self.mask) * known + self.mask * latents

    def wipe(self) -> None:
        """Overwrite it with zeros."""
        for array in (self.clean, self.mask):
            if array is not None:
                array.fill(0)


class Bench:
    """The arrays of one layout, bound to the networks."""

    def __init__(self, description: ModelDescription, layout: Layout, networks: Networks) -> None:
        self.layout = layout
        self._scaling_factor = np.float32(description.latents.scaling_factor)
        self._downscale = description.latents.downscale
        self._painted = description.family == INPAINTING
        length, width = description.text.max_length, description.text.hidden_size
        channels, height, across = layout.shape
        picture = (1, 3, height * self._downscale, across * self._downscale)
        self._ids = np.zeros((1, length), np.int64)
        self._encoded = np.zeros((1, length, width), np.float32)
        self._latents = np.zeros((layout.rows, unet_channels(description), height, across), np.float32)
        self._timestep = np.zeros(1, np.float32)
        self._context = np.zeros((layout.rows, layout.chunks * length, width), np.float32)
        self._prediction = np.zeros((layout.rows, *layout.shape), np.float32)
        self._undecoded = np.zeros((1, channels, height, across), np.float32)
        self._image = np.zeros(picture, np.float32)
        self._text: BoundRun = networks.text.bind(ids=self._ids, context=self._encoded)
        self._unet: BoundRun = networks.unet.bind(
            latents=self._latents, timestep=self._timestep, context=self._context, prediction=self._prediction
        )
        self._decoder: BoundRun = networks.decoder.bind(latents=self._undecoded, image=self._image)
        self._encoder: BoundRun | None = None
        if layout.encoder and networks.encoder is not None:
            self._start = np.zeros(picture, np.float32)
            self._moments = np.zeros((1, 2 * channels, height, across), np.float32)
            self._encoder = networks.encoder.bind(image=self._start, moments=self._moments)

    @property
    def runs(self) -> tuple[BoundRun, ...]:
        """Return what is bound, and with it every array that content passes through."""
        return tuple(run for run in (self._text, self._unet, self._decoder, self._encoder) if run is not None)

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

    def lay(self, start: StartPicture) -> Ground:
        """Return a picture to start from as latents; an inpainting model is shown from then on what is not painted anew."""
        clean = self._latents_of(as_encoded(start.pixels))
        if start.mask is None:
            return Ground(clean, None)
        mask = latent_mask(start.mask, self._downscale)
        if not self._painted:
            return Ground(clean, mask)
        channels = self.layout.shape[0]
        self._latents[:, channels : channels + 1] = mask
        self._latents[:, channels + 1 :] = self._latents_of(as_encoded(start.pixels, start.mask))
        # What stays is in the network's input, and it paints all of the picture.
        return Ground(clean, None)

    def _latents_of(self, image: Floats) -> Floats:
        if self._encoder is None:
            raise AssertionError("a layout without an encoder")
        self._start[:] = image
        self._encoder.run()
        means = self._moments[:, : self.layout.shape[0]]
        if not np.isfinite(means).all():
            raise EngineError("not_finite", "the encoder gave numbers that are not finite", hint="try another picture")
        return means * self._scaling_factor

    def predict(self, latents: Floats, timestep: float, guidance_scale: float) -> Floats:
        """Return the network's output for latents (1, …), guided where there are two rows: the unwanted, then the wanted."""
        self._latents[:, : latents.shape[1]] = latents
        self._timestep[0] = timestep
        self._unet.run()
        if len(self._prediction) == 1:
            return self._prediction.copy()
        unwanted, wanted = self._prediction[:1], self._prediction[1:]
        guided: Floats = unwanted + np.float32(guidance_scale) * (wanted - unwanted)
        return guided

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Return the picture of latents (1, …), (height, width, 3). Raises `EngineError` where it is no picture."""
        np.divide(latents, self._scaling_factor, out=self._undecoded)
        self._decoder.run()
        if not np.isfinite(self._image).all():
            raise EngineError("not_finite", "the decoder gave numbers that are not finite", hint="try another seed")
        return to_bytes(self._image[0].transpose(1, 2, 0))

    def wipe(self) -> None:
        """Overwrite every array with zeros."""
        for run in self.runs:
            for array in run.arrays:
                array.fill(0)


def unet_channels(description: ModelDescription) -> int:
    """Return how many channels the denoising network reads: an inpainting model's also a mask and what is not painted anew."""
    channels = description.latents.channels
    return 2 * channels + 1 if description.family == INPAINTING else channels


def to_bytes(picture: Floats) -> NDArray[np.uint8]:
    """Return values in [-1, 1] as [0, 255]: clipped, then rounded to the nearest."""
    pixels: NDArray[np.uint8] = np.rint(np.clip(picture * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)
    return pixels
