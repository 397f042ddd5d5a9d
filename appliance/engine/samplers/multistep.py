"""Samplers that carry on what the step before found: DPM-Solver++(2M), its SDE, and UniPC.

They solve for x0 over λ = log(signal/noise), exactly where x0 stands still. A step that does not follow the step before it
begins anew with first order, which is DDIM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

from appliance.engine.samplers.levels import Latents, Level, StepNoise, denoised_of, levels_of, log_snr, mixed
from appliance.engine.schedules import Steps, dpm_steps, unipc_steps
from appliance.request import SigmaSpacing
from appliance.trust.description import NoiseSchedule, PredictionType


@dataclass(frozen=True)
class _Past:
    """What a step leaves for the next one."""

    i: int
    latents: Latents = field(repr=False)            # that the step went on from
    denoised: Latents = field(repr=False)
    earlier: Latents | None = field(repr=False)     # the x0 before `denoised`, where that step was of second order


class DpmSolverPlusPlus2M:
    """DPM-Solver++(2M), midpoint (Lu et al., arXiv:2211.01095, algorithm 2).

    Agrees with diffusers' DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
    final_sigmas_type="zero", lower_order_final=True), use_karras_sigmas or use_exponential_sigmas as asked. The first step and
    the last one are of first order.
    """

    order: ClassVar[int] = 1

    def __init__(self, prediction: PredictionType, chosen: Steps) -> None:
        self.prediction = prediction
        self.timesteps = chosen.timesteps
        self.levels = levels_of(chosen.sigmas)      # one more than timesteps; the last has no noise
        self._past: _Past | None = None

    @classmethod
    def over(cls, schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Self:
        """Return the sampler of a schedule. Raises `BadRequest`."""
        return cls(schedule.prediction_type, dpm_steps(schedule, steps, spacing))

    def initial(self, noise: Latents) -> Latents:
        """Return the noise itself."""
        return noise

    def noised(self, clean: Latents, noise: Latents, i: int) -> Latents:
        """Return the picture's latents as they would be before evaluation `i`."""
        return mixed(clean, noise, self.levels[i])

    def scale_input(self, latents: Latents, i: int) -> Latents:     # noqa: ARG002
        """Return the latents themselves."""
        return latents

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:
        """Go to the next level, with x0 carried on from the step before as far as half a step ahead."""
        denoised = denoised_of(self.prediction, latents, output, self.levels[i])
        past = self._past if self._past is not None and self._past.i == i - 1 else None
        if past is not None:
            latents = self._corrected(latents, denoised, past)
        # To no noise at all the step is endless in λ, and nothing is carried on over it.
        before = past.denoised if past is not None and self.levels[i + 1].noise else None
        self._past = _Past(i, latents, denoised, before)
        ahead = denoised if before is None else self._ahead(denoised, before, i)
        return self._advance(latents, ahead, i, noise), denoised

    def _corrected(self, latents: Latents, denoised: Latents, past: _Past) -> Latents:     # noqa: ARG002
        """Return the latents as they should have come out of the step before, now that x0 at its end is known."""
        return latents

    def _ahead(self, denoised: Latents, before: Latents, i: int) -> Latents:
        """Return x0 half a step ahead, on the line through this one and the one before."""
        lambdas = [log_snr(level) for level in self.levels[i - 1 : i + 2]]
        r = (lambdas[1] - lambdas[0]) / (lambdas[2] - lambdas[1])
        return denoised + (denoised - before) * (0.5 / r)

    def _advance(self, latents: Latents, denoised: Latents, i: int, noise: StepNoise) -> Latents:      # noqa: ARG002
        """Return the latents at the next level if x0 stood still on the way there."""
        now, after = self.levels[i], self.levels[i + 1]
        shrink = after.noise / now.noise
        return latents * shrink + denoised * _gain(now, after)


def _gain(now: Level, after: Level) -> float:
    """Return signal·(1 - e^-h) of a step, the weight of its x0; h is its length in λ."""
    return after.signal - now.signal * after.noise / now.noise


class DpmSolverPlusPlus2MSde(DpmSolverPlusPlus2M):
    """SDE-DPM-Solver++(2M), midpoint (Lu et al., arXiv:2211.01095, section 5 and appendix B): the same over the diffusion SDE.

    Agrees with diffusers' DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++") with the options above, given the same
    noise. The last step, to no noise, draws none.
    """

    def _advance(self, latents: Latents, denoised: Latents, i: int, noise: StepNoise) -> Latents:
        now, after = self.levels[i], self.levels[i + 1]
        if not after.noise:
            return denoised
        shrink = after.noise / now.noise
        decay = shrink * now.signal / after.signal      # e^-h
        fresh = (1 - decay) * (1 + decay)               # 1 - e^-2h
        kept: Latents = latents * (shrink * decay) + denoised * (after.signal * fresh)
        return kept + noise(i) * (after.noise * math.sqrt(fresh))


class UniPc(DpmSolverPlusPlus2M):
    """UniPC of order 2 with B₂(h) = e^h - 1, predicting x0 (Zhao et al., arXiv:2302.04867, algorithms 1 and 2).

    The model's answer at the end of a step first corrects that step (UniC), and then predicts the next one (UniP, which in
    second order is DPM-Solver++(2M)); the model is asked once a step all the same.

    Agrees with diffusers' UniPCMultistepScheduler(solver_order=2, solver_type="bh2", predict_x0=True, lower_order_final=True,
    final_sigmas_type="zero"), use_karras_sigmas or use_exponential_sigmas as asked.
    """

    @classmethod
    def over(cls, schedule: NoiseSchedule, steps: int, spacing: SigmaSpacing) -> Self:
        """Return the sampler of a schedule. Raises `BadRequest`."""
        return cls(schedule.prediction_type, unipc_steps(schedule, steps, spacing))

    def _corrected(self, latents: Latents, denoised: Latents, past: _Past) -> Latents:     # noqa: ARG002
        now, after = self.levels[past.i], self.levels[past.i + 1]
        h = log_snr(after) - log_snr(now)
        if past.earlier is None:
            # UniC-1: the trapezoidal rule.
            ahead: Latents = past.denoised + (denoised - past.denoised) * 0.5
        else:
            # UniC-2: the weights of the x0 before and after this step's beginning solve R·a = b, with rows of 1 and of r.
            r = (log_snr(self.levels[past.i - 1]) - log_snr(now)) / h
            grown = math.expm1(-h)
            first = grown / -h - 1
            moments = first / grown, 2 * (first / -h - 0.5) / grown
            back = (moments[0] - moments[1]) / (1 - r)
            forth = moments[0] - back
            ahead = past.denoised + (past.earlier - past.denoised) * (back / r) + (denoised - past.denoised) * forth
        shrink = after.noise / now.noise
        return past.latents * shrink + ahead * _gain(now, after)
