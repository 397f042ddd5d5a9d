"""Samplers, in numpy. (signatures; the body follows)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from appliance.request import SamplerName, SigmaSpacing
from appliance.trust.description import NoiseSchedule

Latents = NDArray[np.float32]           # (images, channels, height, width)
StepNoise = Callable[[int], Latents]    # the unit Gaussian noise of a step, for example NoiseStream.step


class Sampler(Protocol):
    """One generation, step by step; make a new one for each, since some remember the step before.

    x = sampler.initial(noise)
    for i, t in enumerate(sampler.timesteps):
        output = unet(sampler.scale_input(x, i), t)       # epsilon, v or x0, as the schedule says; guidance included
        x, denoised = sampler.step(x, output, i, stream.step)
    """

    @property
    def timesteps(self) -> tuple[float, ...]: ...
    def initial(self, noise: Latents) -> Latents: ...
    def scale_input(self, latents: Latents, i: int) -> Latents: ...
    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]: ...


def make_sampler(name: SamplerName, schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Sampler:
    """Raises BadRequest where this model cannot be sampled so (too many steps for a short schedule, ddim with karras)."""
    raise NotImplementedError
