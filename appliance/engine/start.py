"""A picture to start from: what is painted over or into, given beside a request.

This room takes arrays and never a file: whoever has a file decodes it elsewhere, since a decoder is the last thing to have in
the process that holds the model.

Rules, in order, each as diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline have it:

1. The picture has the size that the request asks for. Nothing is cropped or scaled here.
2. Of the request's steps the last `strength` part is taken, rounded down, and the picture's latents are given the noise of the
   first of them (SDEdit, Meng et al., arXiv:2108.01073). With strength 1 and a mask nothing is left of what is marked, and
   sampling begins at noise alone.
3. The latents are the mean of what the encoder says, not a draw from it: a picture means the same latents each time, and what
   the seed decides is decided by the sampler's noise alone.
4. A latent is painted anew where its pixel at the upper left is marked; the mask's values count from 128 on.

    start = StartPicture(pixels, strength=0.6)
    pipeline.generate(request, start=start, …)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from appliance.errors import BadRequest
from appliance.request import GenerationRequest

Floats = NDArray[np.float32]
MARKED: Final = 128


@dataclass(frozen=True)
class StartPicture:
    """A picture, how far to go from it, and which part of it is to be painted anew, all of it without a mask."""

    pixels: NDArray[np.uint8] = field(repr=False)                   # (height, width, 3), sRGB
    strength: float                                                 # above 0, up to 1
    mask: NDArray[np.uint8] | None = field(default=None, repr=False)    # (height, width); from `MARKED` on: paint here

    def check(self, request: GenerationRequest, downscale: int) -> None:
        """Raise `BadRequest` where this is no start for the request's pictures."""
        size = (request.height, request.width)
        _check_array("picture", self.pixels, (*size, 3))
        strength = self.strength
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:     # NaN compares false
            raise BadRequest("strength", "strength must be a number above 0, up to 1", hint="try 0.6")
        if not steps_taken(request.steps, strength):
            raise BadRequest(
                "strength", f"of {request.steps} steps, strength {strength:g} leaves none to take",
                hint=f"take {math.ceil(1 / strength)} steps, or a greater strength",
            )
        if self.mask is not None:
            _check_array("mask", self.mask, size)
            if not latent_mask(self.mask, downscale).any():
                raise BadRequest("mask", "the mask marks nothing", hint=f"mark at least {downscale} by {downscale} pixels")


def steps_taken(steps: int, strength: float) -> int:
    """Return how many of the steps are taken at this strength."""
    return min(int(steps * strength), steps)


def latent_mask(mask: NDArray[np.uint8], downscale: int) -> Floats:
    """Return a mask (height, width) as that of latents, (1, 1, height / downscale, width / downscale) of zeros and ones."""
    marked: Floats = (mask[::downscale, ::downscale] >= MARKED).astype(np.float32)
    return marked[np.newaxis, np.newaxis]


def as_encoded(pixels: NDArray[np.uint8], hidden: NDArray[np.uint8] | None = None) -> Floats:
    """Return pixels (height, width, 3) as the encoder reads them, (1, 3, height, width) in [-1, 1].

    What the mask `hidden` marks becomes zero, a middle grey: so inpainting models were trained to be shown what is missing.
    """
    floats: Floats = pixels.transpose(2, 0, 1)[np.newaxis].astype(np.float32) / np.float32(255) * 2 - 1
    if hidden is not None:
        floats *= hidden < MARKED
    return floats


def _check_array(name: str, array: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != shape:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise BadRequest(
            name, f"the {name} to start from is {found}, and this request needs uint8 {shape}",
            hint="ask for pictures of its size, or bring it to this one",
        )
