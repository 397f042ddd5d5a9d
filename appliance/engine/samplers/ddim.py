"""DDIM: each step goes straight to the next level, with the noise that the model saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from appliance.engine.samplers.levels import CLEAN, Latents, Level, StepNoise, denoised_of, level_at, mixed
from appliance.engine.schedules import ddim_timesteps, signal_levels
from appliance.errors import BadRequest
from appliance.trust.description import NoiseSchedule, PredictionType


@dataclass(frozen=True)
class Ddim:
    """DDIM with η = 0 (Song, Meng and Ermon, arXiv:2010.02502, equation 12).

    Agrees with diffusers' DDIMScheduler(clip_sample=False, thresholding=False) and step(eta=0).
    """

    order: ClassVar[int] = 1
    prediction: PredictionType
    timesteps: tuple[float, ...]
    levels: tuple[tuple[Level, Level], ...]     # of each step: where it begins and where it ends

    @classmethod
    def over(cls, schedule: NoiseSchedule, steps: int) -> Ddim:
        """Return the sampler of a schedule. Raises `BadRequest`, also where an ε prediction would begin at no signal."""
        timesteps = ddim_timesteps(schedule, steps)
        signal = signal_levels(schedule)
        end = 1.0 if schedule.set_alpha_to_one else float(signal[0])
        stride = schedule.num_train_timesteps // steps
        pairs = [(float(signal[t]), float(signal[t - stride]) if t >= stride else end) for t in timesteps]
        if schedule.prediction_type == "epsilon" and pairs[0][0] == 0:
            raise BadRequest(
                "sampler", "ddim cannot begin where this model's latents hold no signal", hint="choose euler or dpmpp_2m"
            )
        levels = tuple((level_at(now), level_at(after)) for now, after in pairs)
        return cls(schedule.prediction_type, tuple(map(float, timesteps)), levels)

    def initial(self, noise: Latents) -> Latents:
        """Return the noise itself."""
        return noise

    def noised(self, clean: Latents, noise: Latents, i: int) -> Latents:
        """Return the picture's latents as they would be before evaluation `i`."""
        return mixed(clean, noise, self.levels[i][0] if i < len(self.levels) else CLEAN)

    def scale_input(self, latents: Latents, i: int) -> Latents:     # noqa: ARG002 - the protocol's; nothing to scale here
        """Return the latents themselves."""
        return latents

    def step(self, latents: Latents, output: Latents, i: int, noise: StepNoise) -> tuple[Latents, Latents]:     # noqa: ARG002
        """Go to the next level along the direction that the model's x0 leaves as noise."""
        now, after = self.levels[i]
        denoised = denoised_of(self.prediction, latents, output, now)
        noisy: Latents = latents - denoised * now.signal
        return denoised * after.signal + noisy / now.noise * after.noise, denoised
