"""Samplers: from noise to latents, one model output at a time, in numpy.

This room calls no model and draws no noise: it is handed both. Latents are float32, coefficients Python floats computed in
float64, so one platform's float32 library functions have no say. Where latents are held is up to the sampler, in one of two
ways that differ by a factor √(σ²+1): as the model sees them (DDIM, DPM++ 2M), or with the signal at full size (Euler).

Rules, in order:

1. Each sampler agrees, step by step, with the diffusers class and options that its docstring names; golden arrays hold it to
   that (docs/sampler-parity.md).
2. A step is a pure function of its arguments; DPM++ 2M alone remembers the step before, and only for the step right after.
3. The model's output is read as the schedule says: the noise ε, the velocity v (Salimans and Ho, arXiv:2202.00512) or x0.

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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from appliance.engine.schedules import ddim_timesteps, dpm_steps, euler_steps, signal_levels
from appliance.errors import BadRequest
from appliance.request import SamplerName, SigmaSpacing
from appliance.trust.description import NoiseSchedule, PredictionType

Latents = NDArray[np.float32]           # (images, channels, height, width)
StepNoise = Callable[[int], Latents]    # the unit Gaussian noise of a step: NoiseStream.step


class Sampler(Protocol):
    """One generation, step by step; make a new one for each."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Return the timesteps at which the model is asked, falling; fractions where the schedule has them."""

    def initial(self, noise: Latents) -> Latents:
        """Return the latents to begin with, from unit Gaussian noise."""

    def scale_input(self, latents: Latents, i: int) -> Latents:
        """Return what the model is shown in step `i`."""

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:
        """Return the latents after step `i` and the x0 that the model saw in it, for a preview.

        `output` is the model's, after guidance; `noise` is called by ancestral samplers only.
        """


def make_sampler(name: SamplerName, schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Sampler:
    """Return a sampler for one generation.

    Raises `BadRequest` where this model cannot be sampled so: more steps than its schedule has room for, DDIM with Karras
    sigmas, DDIM from an ε prediction at no signal.
    """
    if name == "ddim":
        if spacing != "model":
            raise BadRequest("spacing", "ddim knows no karras spacing", hint="choose the model's spacing, or euler or dpmpp_2m")
        return _ddim(schedule, steps)
    if name == "dpmpp_2m":
        chosen = dpm_steps(schedule, steps, spacing)
        return DpmSolverPlusPlus2M(schedule.prediction_type, chosen.timesteps, _levels(chosen.sigmas))
    chosen = euler_steps(schedule, steps, spacing)
    # The latents of a leading schedule begin below the noisiest training timestep: some signal is to be expected in them.
    largest = chosen.sigmas[0]
    scale = math.sqrt(largest**2 + 1) if schedule.timestep_spacing == "leading" else largest
    kind = Euler if name == "euler" else EulerAncestral
    return kind(schedule.prediction_type, chosen.timesteps, chosen.sigmas, scale)


@dataclass(frozen=True)
class Level:
    """How much of the latents, as the model sees them, is signal and how much noise: √ᾱ and √(1-ᾱ)."""

    signal: float
    noise: float


def _levels(sigmas: tuple[float, ...]) -> tuple[Level, ...]:
    return tuple(Level(1 / math.sqrt(s * s + 1), s / math.sqrt(s * s + 1)) for s in sigmas)


def _denoised(prediction: PredictionType, latents: Latents, output: Latents, at: Level) -> Latents:
    """Return x0 from latents as the model sees them and what it said of them."""
    if prediction == "epsilon":
        clean: Latents = latents - output * at.noise
        return clean / at.signal
    if prediction == "v_prediction":
        return latents * at.signal - output * at.noise
    return output


@dataclass(frozen=True)
class Ddim:
    """DDIM with η = 0 (Song, Meng and Ermon, arXiv:2010.02502, equation 12).

    Agrees with diffusers' DDIMScheduler(clip_sample=False, thresholding=False) and step(eta=0).
    """

    prediction: PredictionType
    timesteps: tuple[float, ...]
    levels: tuple[tuple[Level, Level], ...]     # of each step: where it begins and where it ends

    def initial(self, noise: Latents) -> Latents:
        """Return the noise itself."""
        return noise

    def scale_input(self, latents: Latents, i: int) -> Latents:     # noqa: ARG002 - the protocol's; nothing to scale here
        """Return the latents themselves."""
        return latents

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:     # noqa: ARG002
        """Go to the next level along the direction that the model's x0 leaves as noise."""
        now, after = self.levels[i]
        denoised = _denoised(self.prediction, latents, output, now)
        noisy: Latents = latents - denoised * now.signal
        return denoised * after.signal + noisy / now.noise * after.noise, denoised


def _ddim(schedule: NoiseSchedule, steps: int) -> Ddim:
    timesteps = ddim_timesteps(schedule, steps)
    signal = signal_levels(schedule).astype(np.float64)
    end = 1.0 if schedule.set_alpha_to_one else float(signal[0])
    stride = schedule.num_train_timesteps // steps
    pairs = [(float(signal[t]), float(signal[t - stride]) if t >= stride else end) for t in timesteps]
    if schedule.prediction_type == "epsilon" and pairs[0][0] == 0:
        raise BadRequest(
            "sampler", "ddim cannot begin where this model's latents hold no signal", hint="choose euler or dpmpp_2m"
        )
    levels = [(Level(math.sqrt(a), math.sqrt(1 - a)), Level(math.sqrt(b), math.sqrt(1 - b))) for a, b in pairs]
    return Ddim(schedule.prediction_type, tuple(map(float, timesteps)), tuple(levels))


@dataclass(frozen=True)
class Euler:
    """Euler's method on the probability-flow ODE (Karras et al., arXiv:2206.00364, algorithm 2 with no churn).

    Agrees with diffusers' EulerDiscreteScheduler(timestep_type="discrete", interpolation_type="linear",
    final_sigmas_type="zero"), use_karras_sigmas as asked, and step(s_churn=0).
    """

    prediction: PredictionType
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]       # one more than timesteps; the last is zero
    initial_scale: float

    def initial(self, noise: Latents) -> Latents:
        """Return the noise at its size in the first step, beside a signal at full size."""
        return noise * self.initial_scale

    def scale_input(self, latents: Latents, i: int) -> Latents:
        """Return the latents at unit variance."""
        return latents / math.sqrt(self.sigmas[i] ** 2 + 1)

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:     # noqa: ARG002
        """Go down to the next sigma along the ODE's slope."""
        denoised = self._denoised(latents, output, i)
        return self._descend(latents, denoised, i, self.sigmas[i + 1]), denoised

    def _denoised(self, latents: Latents, output: Latents, i: int) -> Latents:
        [level] = _levels((self.sigmas[i],))
        return _denoised(self.prediction, self.scale_input(latents, i), output, level)

    def _descend(self, latents: Latents, denoised: Latents, i: int, sigma: float) -> Latents:
        d = (latents - denoised) / self.sigmas[i]
        return latents + d * (sigma - self.sigmas[i])


class EulerAncestral(Euler):
    """Euler's method with fresh noise in every step: ancestral sampling of DDPM (arXiv:2006.11239) in terms of sigma.

    Agrees with diffusers' EulerAncestralDiscreteScheduler. That class knows neither Karras sigmas nor sample prediction:
    there this agrees with its step() over the sigmas of EulerDiscreteScheduler(use_karras_sigmas=True), and with the ε that
    amounts to the predicted x0.
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


class DpmSolverPlusPlus2M:
    """DPM-Solver++(2M), midpoint (Lu et al., arXiv:2211.01095, algorithm 2).

    Agrees with diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
    final_sigmas_type="zero", lower_order_final=True), use_karras_sigmas as asked. The first step, the last one, and one that
    does not follow the step before it are of first order, which is DDIM.
    """

    def __init__(self, prediction: PredictionType, timesteps: tuple[float, ...], levels: tuple[Level, ...]) -> None:
        self.prediction = prediction
        self.timesteps = timesteps
        self.levels = levels        # one more than timesteps; the last has no noise
        self._before: tuple[int, Latents] | None = None

    def initial(self, noise: Latents) -> Latents:
        """Return the noise itself."""
        return noise

    def scale_input(self, latents: Latents, i: int) -> Latents:     # noqa: ARG002
        """Return the latents themselves."""
        return latents

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:     # noqa: ARG002
        """Go to the next level, with x0 carried on from the step before as far as half a step ahead."""
        now, after = self.levels[i], self.levels[i + 1]
        denoised = _denoised(self.prediction, latents, output, now)
        ahead = denoised
        if self._before is not None and self._before[0] == i - 1 and after.noise:
            # λ = log(signal/noise); h is the step's length in it and r that of the step before, in steps of h.
            h = _log_snr(after) - _log_snr(now)
            r = (_log_snr(now) - _log_snr(self.levels[i - 1])) / h
            ahead = denoised + (denoised - self._before[1]) * (0.5 / r)
        self._before = (i, denoised)
        shrink = after.noise / now.noise
        # signal·(1 - e^-h) in the paper
        return latents * shrink + ahead * (after.signal - now.signal * shrink), denoised


def _log_snr(level: Level) -> float:
    return math.log(level.signal / level.noise)
