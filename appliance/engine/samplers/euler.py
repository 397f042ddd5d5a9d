"""Samplers of Karras et al. (arXiv:2206.00364) over latents whose signal is at full size: Euler, Euler ancestral, Heun.

They differ in how they go down from one sigma to the next; the latents are picture + σ·noise throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

from appliance.engine.samplers.levels import Latents, StepNoise, denoised_of, levels_of
from appliance.engine.schedules import euler_steps
from appliance.request import SigmaSpacing
from appliance.trust.description import NoiseSchedule, PredictionType


@dataclass
class Euler:
    """Euler's method on the probability-flow ODE (Karras et al., arXiv:2206.00364, algorithm 2 with no churn).

    Agrees with diffusers' EulerDiscreteScheduler(timestep_type="discrete", interpolation_type="linear",
    final_sigmas_type="zero"), use_karras_sigmas or use_exponential_sigmas as asked, and step(s_churn=0).
    """

    order: ClassVar[int] = 1
    prediction: PredictionType
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]       # one more than timesteps; the last is zero
    initial_scale: float

    @classmethod
    def over(cls, schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Self:
        """Return the sampler of a schedule. Raises `BadRequest`."""
        chosen = euler_steps(schedule, steps, spacing)
        # The latents of a leading schedule begin below the noisiest training timestep: some signal is to be expected in them.
        largest = chosen.sigmas[0]
        scale = math.sqrt(largest**2 + 1) if schedule.timestep_spacing == "leading" else largest
        return cls(schedule.prediction_type, cls._asked(chosen.timesteps), cls._met(chosen.sigmas), scale)

    @classmethod
    def _asked(cls, timesteps: tuple[float, ...]) -> tuple[float, ...]:
        return timesteps

    @classmethod
    def _met(cls, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        return sigmas

    def initial(self, noise: Latents) -> Latents:
        """Return the noise at its size in the first step, beside a signal at full size."""
        return noise * self.initial_scale

    def noised(self, clean: Latents, noise: Latents, i: int) -> Latents:
        """Return the picture's latents as they would be before evaluation `i`."""
        return clean + noise * self.sigmas[i]

    def scale_input(self, latents: Latents, i: int) -> Latents:
        """Return the latents at unit variance."""
        return latents / math.sqrt(self.sigmas[i] ** 2 + 1)

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:     # noqa: ARG002
        """Go down to the next sigma along the ODE's slope."""
        denoised = self._denoised(latents, output, i)
        return self._descend(latents, denoised, i, self.sigmas[i + 1]), denoised

    def _denoised(self, latents: Latents, output: Latents, i: int) -> Latents:
        [level] = levels_of((self.sigmas[i],))
        return denoised_of(self.prediction, self.scale_input(latents, i), output, level)

    def _descend(self, latents: Latents, denoised: Latents, i: int, sigma: float) -> Latents:
        d = (latents - denoised) / self.sigmas[i]
        return latents + d * (sigma - self.sigmas[i])


class EulerAncestral(Euler):
    """Euler's method with fresh noise in every step: ancestral sampling of DDPM (arXiv:2006.11239) in terms of sigma.

    Agrees with diffusers' EulerAncestralDiscreteScheduler. That class knows neither Karras nor exponential sigmas nor sample
    prediction: there this agrees with its step() over the sigmas of EulerDiscreteScheduler, and with the ε that amounts to the
    predicted x0.
    """

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:
        """Go down further than the next sigma, and up to it with noise; the last step, to zero, draws none."""
        denoised = self._denoised(latents, output, i)
        sigma, after = self.sigmas[i], self.sigmas[i + 1]
        # σ_down² + σ_up² = σ_after²; written so, no difference of near-equal squares is left.
        down = after * after / sigma
        up = after * math.sqrt((sigma - after) * (sigma + after)) / sigma
        latents = self._descend(latents, denoised, i, down)
        return (latents + noise(i) * up if up else latents), denoised


@dataclass(frozen=True)
class _Descent:
    """The first half of a Heun step: where it began, and the slope there."""

    i: int
    latents: Latents = field(repr=False)
    slope: Latents = field(repr=False)


@dataclass
class Heun(Euler):
    """Heun's method on the probability-flow ODE (Karras et al., arXiv:2206.00364, algorithm 1).

    The model is asked twice a step: even evaluations go down along the slope as Euler does, odd ones begin the same step
    again with the mean of the slopes at its two ends. The last step, to zero, is Euler's. So `timesteps` has 2·steps - 1
    entries, and so have `sigmas`, less the zero: the second of a step is the first of the next.

    Agrees with diffusers' HeunDiscreteScheduler(clip_sample=False), use_karras_sigmas or use_exponential_sigmas as asked.
    That class knows no schedule rescaled to zero terminal SNR; this takes its sigmas there from Euler, as everywhere.
    """

    order: ClassVar[int] = 2
    _begun: _Descent | None = field(default=None, init=False, repr=False)

    @classmethod
    def _asked(cls, timesteps: tuple[float, ...]) -> tuple[float, ...]:
        return (*timesteps[:1], *(timestep for timestep in timesteps[1:] for _ in range(2)))

    @classmethod
    def _met(cls, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        return (*cls._asked(sigmas[:-1]), sigmas[-1])

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:     # noqa: ARG002
        """Go down to the next sigma, or go there again with the slope of both ends.

        Raises `ValueError` for the second half of a step whose first half was not taken right before.
        """
        denoised = self._denoised(latents, output, i)
        slope = (latents - denoised) / self.sigmas[i]
        begun, self._begun = self._begun, None
        if i % 2 == 0:
            self._begun = _Descent(i, latents, slope)
            return latents + slope * (self.sigmas[i + 1] - self.sigmas[i]), denoised
        if begun is None or begun.i != i - 1:
            raise ValueError(f"evaluation {i} is the second half of a step, and its first half was not taken")
        # Half of each slope over the whole step.
        half = (self.sigmas[i] - self.sigmas[i - 1]) * 0.5
        return begun.latents + begun.slope * half + slope * half, denoised
