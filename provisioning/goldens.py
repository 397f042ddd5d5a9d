"""Golden arrays for the appliance's samplers, made with diffusers' schedulers.

The appliance has no torch, so its tests read what diffusers did instead: from recorded noise and recorded model outputs, the
latents and x0 after every step. `python -m provisioning.goldens FOLDER` writes into FOLDER

    schedules.json      each noise schedule's numbers, under the names of `model.json`
    made_with.json      versions of what made them
    inputs.npz          initial noise, the model's output in each step, the noise drawn in each step
    SAMPLER.npz         `SCHEDULE/PREDICTION/SPACING/TIMESTEP_SPACING/STEPS/…`: timesteps, latents, denoised

Everything follows from fixed seeds, and a second run with the same versions writes the same bytes. Values that are not finite
are refused: nothing could be compared with them.

Two things diffusers does not have itself. EulerAncestralDiscreteScheduler knows no Karras sigmas: it is given those of
EulerDiscreteScheduler. It knows no sample prediction: it is given the ε that amounts to the same x0.
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
SAMPLERS: Final = ("ddim", "euler", "euler_a", "dpmpp_2m")


@dataclass(frozen=True)
class Case:
    """One generation; `name` is its key in the archive."""

    sampler: str
    schedule: str
    prediction: str
    spacing: str            # model or karras
    timestep_spacing: str
    steps: int

    @property
    def name(self) -> str:
        """Return the case's key, without the sampler, which is the file's name."""
        return f"{self.schedule}/{self.prediction}/{self.spacing}/{self.timestep_spacing}/{self.steps}"


@dataclass(frozen=True)
class Inputs:
    """What both sides are given; `outputs` and `noise` have one entry for each step."""

    initial: torch.Tensor
    outputs: torch.Tensor
    noise: torch.Tensor


def cases(sampler: str) -> Iterator[Case]:
    """Yield every case of a sampler: all of Stable Diffusion's schedule, and of the other schedules what differs there."""
    for spacing in ("model",) if sampler == "ddim" else ("model", "karras"):
        for prediction in PREDICTIONS:
            for timestep_spacing, counts in (("leading", (1, 2, 5, 20)), ("linspace", (1, 2, 5)), ("trailing", (1, 2, 5))):
                for steps in counts:
                    yield Case(sampler, "stable_diffusion", prediction, spacing, timestep_spacing, steps)
            for schedule in ("linear", "cosine"):
                yield Case(sampler, schedule, prediction, spacing, "leading", 5)
        # At no signal an ε prediction says nothing of x0; models on a rescaled schedule predict v.
        yield Case(sampler, "zero_snr", "v_prediction", spacing, "trailing", 5)


def make_inputs() -> Inputs:
    """Return the recorded inputs: unit Gaussian, from one seed."""
    generator = torch.Generator().manual_seed(SEED)
    initial = torch.randn(SHAPE, generator=generator)
    outputs = torch.randn((MOST_STEPS, *SHAPE), generator=generator)
    drawn = torch.Generator().manual_seed(SEED + 1)
    # Drawn one by one, as the ancestral scheduler will draw them from a generator of the same seed.
    return Inputs(initial, outputs, torch.stack([torch.randn(SHAPE, generator=drawn) for _ in range(MOST_STEPS)]))


def run_case(case: Case, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    """Return timesteps (steps,), latents (steps + 1, …) from the initial ones on, and denoised (steps, …) of a case."""
    scheduler = make_scheduler(case.sampler, case.schedule, case.prediction, case.spacing, case.timestep_spacing)
    set_steps(scheduler, case.steps, karras=case.spacing == "karras")
    generator = torch.Generator().manual_seed(SEED + 1)
    latents = inputs.initial * scheduler.init_noise_sigma
    trail, previews = [latents], []
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(latents, timestep)
        output, extra = inputs.outputs[i], {}
        if case.sampler == "euler_a":
            extra["generator"] = generator
            if case.prediction == "sample":
                output = (latents - output) / scheduler.sigmas[i]
        done = scheduler.step(output, timestep, latents, **extra)
        latents = done.prev_sample
        trail.append(latents)
        previews.append(scheduler.model_outputs[-1] if case.sampler == "dpmpp_2m" else done.pred_original_sample)
    arrays = {
        "timesteps": scheduler.timesteps.numpy().astype(np.float32),
        "latents": torch.stack(trail).numpy(),
        "denoised": torch.stack(previews).numpy(),
    }
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(f"diffusers gave values that are not finite for {case.sampler} {case.name}")
    return arrays


def make_scheduler(sampler: str, schedule: str, prediction: str, spacing: str, timestep_spacing: str) -> Any:
    """Return the diffusers scheduler that the sampler's docstring names, with the options named there."""
    numbers = SCHEDULES[schedule]
    options = {key: numbers[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "steps_offset")}
    options |= {
        "timestep_spacing": timestep_spacing, "prediction_type": prediction,
        "rescale_betas_zero_snr": numbers["rescale_zero_snr"],
    }
    if sampler == "ddim":
        return DDIMScheduler(**options, set_alpha_to_one=numbers["set_alpha_to_one"], clip_sample=False)
    if sampler == "euler_a":
        return EulerAncestralDiscreteScheduler(**{**options, "prediction_type": prediction.replace("sample", "epsilon")})
    if sampler == "euler":
        return EulerDiscreteScheduler(**options, use_karras_sigmas=spacing == "karras")
    return DPMSolverMultistepScheduler(
        **options, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", use_karras_sigmas=spacing == "karras"
    )


def set_steps(scheduler: Any, steps: int, *, karras: bool) -> None:
    """Set the number of steps; an ancestral scheduler takes its Karras sigmas from the plain Euler one."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        # Karras sigmas may share a rounded timestep, and a scheduler that looks its place up by timestep would skip one.
        scheduler.set_begin_index(0)
    if karras and isinstance(scheduler, EulerAncestralDiscreteScheduler):
        plain = EulerDiscreteScheduler.from_config(scheduler.config, use_karras_sigmas=True)
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
