"""Samplers: from noise to latents, one model output at a time, in numpy.

This room calls no model and draws no noise: it is handed both. Latents are float32, coefficients Python floats computed in
float64, so one platform's float32 library functions have no say. Where latents are held is up to the sampler, in one of two
ways that differ by a factor √(σ²+1): as the model sees them (DDIM, LCM, DPM++ 2M and its kin), or with the signal at full size
(Euler and its kin).

Rules, in order:

1. Each sampler agrees, step by step, with the diffusers class and options that its docstring names; golden arrays hold it to
   that (docs/sampler-parity.md).
2. What is counted is evaluations, of which a step has one; Heun's has two, and its `timesteps` name both.
3. An evaluation is a pure function of its arguments; DPM++ 2M, its SDE, UniPC and Heun alone remember the evaluation before,
   and only for the one right after.
4. The model's output is read as the schedule says: the noise ε, the velocity v (Salimans and Ho, arXiv:2202.00512) or x0.

>>> import numpy as np
>>> from appliance.engine.noise import NoiseStream
>>> stream = NoiseStream(seeds=(7,), shape=(4, 8, 8))
>>> schedule = NoiseSchedule(1000, 0.00085, 0.012, "scaled_linear", "epsilon", "leading", 1, False, False)
>>> sampler = make_sampler("euler", schedule, 20, "karras")
>>> latents = sampler.initial(stream.initial())
>>> for i, timestep in enumerate(sampler.timesteps):
...     output = np.zeros_like(sampler.scale_input(latents, i))     # a UNet's answer at this timestep, guidance included
...     latents, denoised = sampler.step(latents, output, i, stream.step)
>>> latents.shape
(1, 4, 8, 8)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from appliance.engine.samplers.ddim import Ddim
from appliance.engine.samplers.euler import Euler, EulerAncestral, Heun
from appliance.engine.samplers.lcm import Lcm
from appliance.engine.samplers.levels import Latents, StepNoise
from appliance.engine.samplers.multistep import DpmSolverPlusPlus2M, DpmSolverPlusPlus2MSde, UniPc
from appliance.request import UNSPACED, SamplerName, SigmaSpacing, no_such_spacing
from appliance.trust.description import NoiseSchedule


class Sampler(Protocol):
    """One generation, evaluation by evaluation; make a new one for each."""

    @property
    def order(self) -> int:
        """Return how many evaluations a step has; the last step of a sampler of order 2 has one."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Return the timesteps at which the model is asked, none rising; fractions where the schedule has them."""

    def initial(self, noise: Latents) -> Latents:
        """Return the latents to begin with, from unit Gaussian noise."""

    def noised(self, clean: Latents, noise: Latents, i: int) -> Latents:
        """Return the latents of a picture with unit Gaussian noise in them, as they would be before evaluation `i`.

        `i` may be `len(timesteps)`, where there is no noise any more.
        """

    def scale_input(self, latents: Latents, i: int) -> Latents:
        """Return what the model is shown in evaluation `i`."""

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:
        """Return the latents after evaluation `i` and the x0 that the model saw in it, for a preview.

        `output` is the model's, after guidance; `noise` is called by Euler ancestral, DPM++ 2M SDE and LCM only, not at the
        end.
        """


def make_sampler(name: SamplerName, schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Sampler:
    """Return a sampler for one generation.

    Raises `BadRequest` where this model cannot be sampled so: more steps than its schedule has room for, DDIM or LCM with
    spaced sigmas, or from an ε prediction at no signal.
    """
    if name in UNSPACED and spacing != "model":
        raise no_such_spacing(name, spacing)
    if name == "ddim":
        return Ddim.over(schedule, steps)
    if name == "lcm":
        return Lcm.over(schedule, steps)
    return _BY_SIGMAS[name].over(schedule, steps, spacing)


_BY_SIGMAS: Final[Mapping[str, type[Euler | DpmSolverPlusPlus2M]]] = {
    "euler": Euler, "euler_a": EulerAncestral, "heun": Heun,
    "dpmpp_2m": DpmSolverPlusPlus2M, "dpmpp_2m_sde": DpmSolverPlusPlus2MSde, "unipc": UniPc,
}

__all__ = ["Latents", "Sampler", "StepNoise", "make_sampler"]
