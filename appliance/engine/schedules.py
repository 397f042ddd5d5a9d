"""Noise schedules: at which timesteps a model is asked, and how noisy its latents are there.

This room holds plain numbers and draws nothing. Its input is the `NoiseSchedule` that the bundle was trained on.

The levels are written with DDPM's symbols (Ho et al., arXiv:2006.11239): at timestep t noisy latents are
x = √ᾱ·x0 + √(1-ᾱ)·ε. Their noise-to-signal ratio is σ = √((1-ᾱ)/ᾱ), the sigma of Karras et al. (arXiv:2206.00364).

Rules, in order:

1. Betas and their products are rounded to float32 where diffusers rounds them: models were trained on those numbers, and
   1-ᾱ at the first timesteps has few digits to lose. Everything later is float64.
2. Timesteps follow table 2 of Lin et al. (arXiv:2305.08891): leading, linspace, trailing. Each family of samplers has its own
   reading of it in diffusers, and so it has here.
3. Sigmas fall strictly and end in zero, timesteps are ones that the model knows; where a schedule is too short for so many
   steps, that is a `BadRequest`.

>>> schedule = NoiseSchedule(1000, 0.00085, 0.012, "scaled_linear", "epsilon", "leading", 1, False, False)
>>> euler_steps(schedule, 4, "model").timesteps
(751.0, 501.0, 251.0, 1.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from appliance.errors import BadRequest
from appliance.request import MOST_LCM_STEPS, SigmaSpacing, too_many_lcm_steps
from appliance.trust.description import NoiseSchedule

Float32s = NDArray[np.float32]
Floats = NDArray[np.float64]

KARRAS_RHO: Final = 7.0             # Karras et al., section 3
SMALLEST_SIGNAL: Final = 2.0**-24   # stands in for ᾱ = 0 where a sigma must be finite; diffusers' number


@dataclass(frozen=True)
class Steps:
    """When the model is asked, and the sigma there; `sigmas` has one entry more, the zero at which sampling ends."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


def signal_levels(schedule: NoiseSchedule) -> Float32s:
    """Return ᾱ for every training timestep, (num_train_timesteps,), falling from almost one.

    Linear and scaled linear betas are DDPM's and Latent Diffusion's (arXiv:2112.10752), `squaredcos_cap_v2` is the cosine
    schedule of Nichol and Dhariwal (arXiv:2102.09672), capped at 0.999.
    """
    betas = _betas(schedule)
    if schedule.rescale_zero_snr:
        betas = _rescaled_to_zero_snr(betas)
    return _products(np.float32(1) - betas)


def noise_ratios(signal: Float32s) -> Float32s:
    """Return σ = √((1-ᾱ)/ᾱ) for every ᾱ; where the last one is zero, `SMALLEST_SIGNAL` stands in for it."""
    if signal[-1] == 0:
        signal = np.append(signal[:-1], np.float32(SMALLEST_SIGNAL))
    ratios: Float32s = np.sqrt((np.float32(1) - signal) / signal)
    return ratios


def ddim_timesteps(schedule: NoiseSchedule, steps: int) -> tuple[int, ...]:
    """Return the timesteps as diffusers' DDIMScheduler spaces them: whole numbers, falling. Raises `BadRequest`."""
    spaced = np.round(_spaced(schedule, steps)).astype(np.int64)
    _check(steps, spaced, spaced, schedule)
    return tuple(spaced.tolist())


def euler_steps(schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Steps:
    """Return timesteps and sigmas as diffusers' EulerDiscreteScheduler spaces them; `linspace` gives fractions.

    Other spacings run between the first and the last sigma of the model's own. Raises `BadRequest`.
    """
    ratios = noise_ratios(signal_levels(schedule))
    timesteps: Floats = _spaced(schedule, steps).astype(np.float32).astype(np.float64)
    sigmas = np.interp(timesteps, np.arange(len(ratios)), ratios)
    if spacing != "model":
        sigmas = _between(float(sigmas[0]), float(sigmas[-1]), steps, spacing)
        timesteps = _timesteps_of(sigmas, ratios)
    return _steps(schedule, timesteps, sigmas)


def dpm_steps(schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Steps:
    """Return timesteps and sigmas as diffusers' DPMSolverMultistepScheduler spaces them: whole timesteps.

    It leaves out the last of one step more than asked, except in trailing spacing. Other spacings run over the whole range
    that the model was trained on, and their sigmas are asked for at whole timesteps near them. Raises `BadRequest`.
    """
    # diffusers rounds Karras timesteps for every schedule but the cosine one, whose timesteps it then cuts to integers.
    return _whole_steps(schedule, steps, spacing, rounded=spacing == "karras" and schedule.beta_schedule != "squaredcos_cap_v2")


def unipc_steps(schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Steps:
    """Return timesteps and sigmas as diffusers' UniPCMultistepScheduler spaces them: as `dpm_steps` but for a rounding."""
    return _whole_steps(schedule, steps, spacing, rounded=spacing == "karras")


def lcm_timesteps(schedule: NoiseSchedule, steps: int) -> tuple[int, ...]:
    """Return the timesteps as diffusers' LCMScheduler chooses them, whatever the model's spacing: whole numbers, falling.

    They are among the `MOST_LCM_STEPS` evenly spaced ones at which models are distilled (Luo et al., arXiv:2310.04378, section
    4.3). Raises `BadRequest`.
    """
    if steps > MOST_LCM_STEPS:
        raise too_many_lcm_steps()
    stride = schedule.num_train_timesteps // MOST_LCM_STEPS
    if not stride:
        raise _too_short(steps, schedule)
    distilled = np.arange(MOST_LCM_STEPS, 0, -1) * stride - 1
    chosen = distilled[np.floor(np.linspace(0, MOST_LCM_STEPS, steps, endpoint=False)).astype(np.int64)]
    return tuple(chosen.tolist())


def _whole_steps(schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing, *, rounded: bool) -> Steps:
    ratios = noise_ratios(signal_levels(schedule))
    if spacing != "model":
        sigmas = _between(float(ratios[-1]), float(ratios[0]), steps, spacing)
        timesteps = _timesteps_of(sigmas, ratios)
        timesteps = np.round(timesteps) if rounded else np.trunc(timesteps)
    else:
        trailing = schedule.timestep_spacing == "trailing"
        timesteps = np.round(_spaced(schedule, steps) if trailing else _spaced(schedule, steps + 1)[:-1])
        sigmas = np.interp(timesteps, np.arange(len(ratios)), ratios)
    return _steps(schedule, timesteps, sigmas)


def _betas(schedule: NoiseSchedule) -> Float32s:
    start, end, count = schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps
    if schedule.beta_schedule == "linear":
        return _even(start, end, count)
    if schedule.beta_schedule == "scaled_linear":
        roots = _even(math.sqrt(start), math.sqrt(end), count)
        return roots * roots
    cosine = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in pairwise(cosine)], np.float32)


def _even(start: float, end: float, count: int) -> Float32s:
    # A float32 step counted from the nearer end, each entry rounded once: what torch.linspace does. A rescaled schedule takes
    # differences of these at its noisy end, and there a last bit would be seen.
    first, last = float(np.float32(start)), float(np.float32(end))
    step = float((np.float32(end) - np.float32(start)) / np.float32(count - 1))
    i = np.arange(count, dtype=np.float64)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


def _products(alphas: Float32s) -> Float32s:
    # A running product in float64, each entry rounded once: what torch.cumprod does with float32 on a CPU.
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _rescaled_to_zero_snr(betas: Float32s) -> Float32s:
    """Return betas whose last ᾱ is zero and whose first is unchanged (Lin et al., arXiv:2305.08891, algorithm 1)."""
    roots = np.sqrt(_products(np.float32(1) - betas))
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    signal = roots * roots
    alphas: Float32s = np.concatenate([signal[:1], signal[1:] / signal[:-1]])
    return np.float32(1) - alphas


def _spaced(schedule: NoiseSchedule, steps: int) -> Floats:
    """Return `steps` falling timesteps, as fractions where the spacing has them."""
    count = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, count - 1, steps)[::-1]
    if schedule.timestep_spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * (count // steps) + schedule.steps_offset
    # Written as diffusers writes it, since halves round by the last bit; for 61, 103, 121 and 122 of 1000 it yields one
    # entry too many, a timestep of -1, which is cut off here.
    return np.round(np.arange(count, 0, -count / steps)[:steps]) - 1


def _between(largest: float, smallest: float, steps: int, spacing: SigmaSpacing) -> Floats:
    """Return `steps` sigmas from the largest to the smallest.

    Exponential ones are even in log σ; Karras ones are even in its seventh root (arXiv:2206.00364, equation 5), and so take
    shorter steps where there is little noise left.
    """
    if spacing == "exponential":
        return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))
    ramp = np.linspace(0, 1, steps)
    high, low = largest ** (1 / KARRAS_RHO), smallest ** (1 / KARRAS_RHO)
    sigmas: Floats = (high + ramp * (low - high)) ** KARRAS_RHO
    return sigmas


def _timesteps_of(sigmas: Floats, ratios: Float32s) -> Floats:
    """Return the fractional timestep of each sigma, linear in its logarithm between the training timesteps."""
    logs = np.log(ratios)
    found = []
    for log in np.log(sigmas):
        # The last one that is no larger: a rescaled schedule may dip at its very end, where a plain search goes astray.
        below = np.flatnonzero(logs <= log)
        low = min(int(below[-1]) if len(below) else 0, len(logs) - 2)
        part = np.clip((logs[low] - log) / (logs[low] - logs[low + 1]), 0, 1)
        found.append(low + float(part))
    return np.array(found)


def _steps(schedule: NoiseSchedule, timesteps: Floats, sigmas: Floats) -> Steps:
    rounded = np.append(sigmas, 0.0).astype(np.float32)
    _check(len(timesteps), timesteps, rounded, schedule)
    return Steps(tuple(timesteps.astype(np.float32).tolist()), tuple(rounded.tolist()))


def _check(
    steps: int, timesteps: NDArray[np.float64 | np.int64], falling: NDArray[np.float32 | np.int64], schedule: NoiseSchedule
) -> None:
    known = timesteps[0] < schedule.num_train_timesteps and timesteps[-1] >= 0
    if not known or not np.all(np.diff(falling) < 0):
        raise _too_short(steps, schedule)


def _too_short(steps: int, schedule: NoiseSchedule) -> BadRequest:
    return BadRequest(
        "steps",
        f"this model cannot be sampled in {steps} steps, for it was trained with {schedule.num_train_timesteps} timesteps",
        hint="choose fewer steps",
    )
