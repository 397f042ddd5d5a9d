"""LCM: a model that was distilled to say x0 at once, asked a few times, with fresh noise in between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

from appliance.engine.samplers.levels import CLEAN, Latents, Level, StepNoise, denoised_of, level_at, mixed
from appliance.engine.schedules import lcm_timesteps, signal_levels
from appliance.errors import BadRequest
from appliance.trust.description import NoiseSchedule, PredictionType

SIGMA_DATA: Final = 0.5             # standard deviation of the data, as Karras et al. (arXiv:2206.00364) set it
TIMESTEP_SCALING: Final = 10.0      # of the distillation of latent consistency models


@dataclass(frozen=True)
class Lcm:
    """Multistep latent consistency sampling (Luo et al., arXiv:2310.04378, section 4).

    The consistency function is c_skip·x + c_out·x0 (Song et al., arXiv:2303.01469), which is x0 but for the first timesteps.

    Agrees with diffusers' LCMScheduler(original_inference_steps=50, timestep_scaling=10, clip_sample=False,
    thresholding=False), given the same noise. The last step draws none.
    """

    order: ClassVar[int] = 1
    prediction: PredictionType
    timesteps: tuple[float, ...]
    levels: tuple[Level, ...]       # one for each timestep

    @classmethod
    def over(cls, schedule: NoiseSchedule, steps: int) -> Lcm:
        """Return the sampler of a schedule. Raises `BadRequest`, also where an ε prediction would begin at no signal."""
        timesteps = lcm_timesteps(schedule, steps)
        signal = signal_levels(schedule)
        if schedule.prediction_type == "epsilon" and signal[timesteps[0]] == 0:
            raise BadRequest(
                "sampler", "lcm cannot begin where this model's latents hold no signal", hint="choose euler or dpmpp_2m"
            )
        return cls(
            schedule.prediction_type, tuple(map(float, timesteps)), tuple(level_at(float(signal[t])) for t in timesteps)
        )

    def initial(self, noise: Latents) -> Latents:
        """Return the noise itself."""
        return noise

    def noised(self, clean: Latents, noise: Latents, i: int) -> Latents:
        """Return the picture's latents as they would be before evaluation `i`."""
        return mixed(clean, noise, self.levels[i] if i < len(self.levels) else CLEAN)

    def scale_input(self, latents: Latents, i: int) -> Latents:     # noqa: ARG002
        """Return the latents themselves."""
        return latents

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:
        """Take the model's x0 for the picture, and put the next level's noise into it; the last step puts in none."""
        scaled = self.timesteps[i] * TIMESTEP_SCALING
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2)
        denoised = denoised_of(self.prediction, latents, output, self.levels[i]) * out + latents * skip
        if i == len(self.timesteps) - 1:
            return denoised, denoised
        return mixed(denoised, noise(i), self.levels[i + 1]), denoised
