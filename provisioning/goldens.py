"""Golden arrays for the appliance's samplers, made with diffusers' schedulers.

The appliance has no torch, so its tests read what diffusers did instead: from recorded noise and recorded model outputs, the
latents and x0 after every step. `python -m provisioning.goldens FOLDER` writes into FOLDER

    schedules.json      each noise schedule's numbers, under the names of `model.json`
    made_with.json      versions of what made them
    inputs.npz          initial noise, the model's output in each evaluation, the noise drawn in each step
    SAMPLER.npz         `SCHEDULE/PREDICTION/SPACING/TIMESTEP_SPACING/STEPS/…`: timesteps, latents, denoised

Everything follows from fixed seeds, and a second run with the same versions writes the same bytes. Values that are not finite
are refused: nothing could be compared with them.

Three things diffusers does not have itself. EulerAncestralDiscreteScheduler knows neither Karras nor exponential sigmas: it is
given those of EulerDiscreteScheduler. It knows no sample prediction: it is given the ε that amounts to the same x0.
HeunDiscreteScheduler knows no rescaled schedule: of that there is no golden.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

SHAPE: Final = (1, 4, 4, 4)
MOST_STEPS: Final = 20
SEED: Final = 20_261_124

_STABLE_DIFFUSION: Final = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "set_alpha_to_one": False, "rescale_zero_snr": False,
}
SCHEDULES: Final[dict[str, dict[str, Any]]] = {
    "stable_diffusion": _STABLE_DIFFUSION,
    "linear": {**_STABLE_DIFFUSION, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
               "steps_offset": 0, "set_alpha_to_one": True},
    "cosine": {**_STABLE_DIFFUSION, "beta_schedule": "squaredcos_cap_v2", "steps_offset": 0},
    "zero_snr": {**_STABLE_DIFFUSION, "rescale_zero_snr": True},
}
PREDICTIONS: Final = ("epsilon", "v_prediction", "sample")
SAMPLERS: Final = ("ddim", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm")
UNSPACED: Final = ("ddim", "lcm")
MULTISTEP: Final = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")        # they tell of x0 in `model_outputs`

# In how many steps, by timestep spacing. Exponential sigmas run between the ends of the model's own or over its whole range, so
# that little of the spacing is left in them.
_COUNTS: Final = {"leading": (1, 2, 5, 20), "linspace": (1, 2, 5), "trailing": (1, 2, 5)}
_FEWER: Final = {"leading": (1, 5, 20), "linspace": (5,), "trailing": (5,)}


@dataclass(frozen=True)
class Case:
    """One generation; `name` is its key in the archive."""

    sampler: str
    schedule: str
    prediction: str
    spacing: str            # model, karras or exponential
    timestep_spacing: str
    steps: int

    @property
    def name(self) -> str:
        """Return the case's key, without the sampler, which is the file's name."""
        return f"{self.schedule}/{self.prediction}/{self.spacing}/{self.timestep_spacing}/{self.steps}"


@dataclass(frozen=True)
class Inputs:
    """What both sides are given; `outputs` has one entry for each evaluation, `noise` one for each step."""

    initial: torch.Tensor
    outputs: torch.Tensor
    noise: torch.Tensor


def cases(sampler: str) -> Iterator[Case]:
    """Yield every case of a sampler: all of Stable Diffusion's schedule, and of the other schedules what differs there."""
    for spacing in ("model",) if sampler in UNSPACED else ("model", "karras", "exponential"):
        for prediction in PREDICTIONS:
            for timestep_spacing, counts in (_FEWER if spacing == "exponential" else _COUNTS).items():
                for steps in counts:
                    yield Case(sampler, "stable_diffusion", prediction, spacing, timestep_spacing, steps)
            for schedule in ("linear", "cosine"):
                yield Case(sampler, schedule, prediction, spacing, "leading", 5)
        # At no signal an ε prediction says nothing of x0; models on a rescaled schedule predict v.
        if sampler != "heun":
            yield Case(sampler, "zero_snr", "v_prediction", spacing, "trailing", 5)


def make_inputs() -> Inputs:
    """Return the recorded inputs: unit Gaussian, from one seed."""
    generator = torch.Generator().manual_seed(SEED)
    initial = torch.randn(SHAPE, generator=generator)
    # Heun's method asks twice in all steps but the last.
    outputs = torch.cat([torch.randn((count, *SHAPE), generator=generator) for count in (MOST_STEPS, MOST_STEPS - 1)])
    drawn = torch.Generator().manual_seed(SEED + 1)
    # Drawn one by one, as the ancestral scheduler will draw them from a generator of the same seed.
    return Inputs(initial, outputs, torch.stack([torch.randn(SHAPE, generator=drawn) for _ in range(MOST_STEPS)]))


def run_case(case: Case, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    """Return timesteps (n,), latents (n + 1, …) from the initial ones on, and denoised (n, …) of a case of n evaluations."""
    scheduler = make_scheduler(case.sampler, case.schedule, case.prediction, case.spacing, case.timestep_spacing)
    set_steps(scheduler, case.steps, schedule=case.schedule, spacing=case.spacing)
    generator = torch.Generator().manual_seed(SEED + 1)
    latents = inputs.initial * scheduler.init_noise_sigma
    trail, previews = [latents], []
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, timestep)
        output: torch.Tensor = inputs.outputs[i]
        extra: dict[str, Any] = {}
        if case.sampler in ("euler_a", "lcm"):
            extra["generator"] = generator
        if case.sampler == "dpmpp_2m_sde":
            extra["variance_noise"] = inputs.noise[i]
        if case.sampler == "euler_a" and case.prediction == "sample":
            output = (latents - output) / scheduler.sigmas[i]
        done = scheduler.step(output, timestep, latents, **extra)
        latents = done.prev_sample
        trail.append(latents)
        previews.append(_preview(case.sampler, scheduler, done))
    arrays = {
        "timesteps": scheduler.timesteps.numpy().astype(np.float32),
        "latents": torch.stack(trail).numpy(),
        "denoised": torch.stack(previews).numpy(),
    }
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"diffusers gave values that are not finite for {case.sampler} {case.name}")
    return arrays


def _preview(sampler: str, scheduler: Any, done: Any) -> torch.Tensor:
    if sampler in MULTISTEP:
        return scheduler.model_outputs[-1]      # type: ignore[no-any-return]
    return done.denoised if sampler == "lcm" else done.pred_original_sample     # type: ignore[no-any-return]


def make_scheduler(sampler: str, schedule: str, prediction: str, spacing: str, timestep_spacing: str) -> Any:
    """Return the diffusers scheduler that the sampler's docstring names, with the options named there."""
    numbers = SCHEDULES[schedule]
    options = {key: numbers[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset")}
    options |= {
        "timestep_spacing": timestep_spacing, "prediction_type": prediction,
        "rescale_betas_zero_snr": numbers["rescale_zero_snr"],
    }
    spaced = {"use_karras_sigmas": spacing == "karras", "use_exponential_sigmas": spacing == "exponential"}
    if sampler == "ddim":
        return DDIMScheduler(**options, set_alpha_to_one=numbers["set_alpha_to_one"], clip_sample=False)
    if sampler == "lcm":
        return LCMScheduler(**options, set_alpha_to_one=numbers["set_alpha_to_one"], clip_sample=False)
    if sampler == "euler_a":
        return EulerAncestralDiscreteScheduler(**{**options, "prediction_type": prediction.replace("sample", "epsilon")})
    if sampler == "heun":
        del options["rescale_betas_zero_snr"]
    kind, own = {
        "euler": (EulerDiscreteScheduler, {}),
        "heun": (HeunDiscreteScheduler, {}),
        "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
        "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint"}),
        "unipc": (UniPCMultistepScheduler, {"solver_type": "bh2"}),
    }[sampler]
    return kind(**options, **spaced, **own)


def set_steps(scheduler: Any, steps: int, *, schedule: str, spacing: str) -> None:
    """Set the number of steps; an ancestral scheduler takes its spaced sigmas from the plain Euler one."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        # Spaced sigmas may share a whole timestep, and a scheduler that looks its place up by timestep would skip one.
        scheduler.set_begin_index(0)
    if spacing != "model" and isinstance(scheduler, EulerAncestralDiscreteScheduler):
        config = scheduler.config
        plain = make_scheduler("euler", schedule, config.prediction_type, spacing, config.timestep_spacing)
        plain.set_timesteps(steps)
        scheduler.sigmas, scheduler.timesteps = plain.sigmas, plain.timesteps


def write(folder: Path) -> None:
    """Write every golden file into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schedules.json").write_text(json.dumps(SCHEDULES, indent=1) + "\n", encoding="utf-8")
    versions = {"diffusers": diffusers.__version__, "numpy": np.__version__, "torch": torch.__version__}
    (folder / "made_with.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")
    inputs = make_inputs()
    np.savez_compressed(
        folder / "inputs.npz", initial=inputs.initial.numpy(), outputs=inputs.outputs.numpy(), noise=inputs.noise.numpy()
    )
    for sampler in SAMPLERS:
        arrays = {
            f"{case.name}/{key}": array for case in cases(sampler) for key, array in run_case(case, inputs).items()
        }
        np.savez_compressed(folder / f"{sampler}.npz", allow_pickle=False, **arrays)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m provisioning.goldens", description="write the samplers' golden arrays")
    parser.add_argument("folder", type=Path, help="tests/vectors/samplers")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
