"""The appliance's samplers beside diffusers' own schedulers, for what the golden arrays are too small to hold.

Timesteps are compared for every number of steps, and whole trajectories with a model whose output depends on the latents, as
a real one's does, so that scaled inputs count too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from appliance.engine.sampling import make_sampler
from appliance.request import MOST_LCM_STEPS, MOST_STEPS, SAMPLERS, SPACINGS, UNSPACED, SamplerName, SigmaSpacing
from appliance.trust.description import NoiseSchedule
from provisioning import goldens

# diffusers 0.42.1 hands torch tensors to numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS: Final[tuple[tuple[SamplerName, SigmaSpacing], ...]] = tuple(
    (name, spacing) for name in SAMPLERS for spacing in (("model",) if name in UNSPACED else SPACINGS)
)
TOO_MANY_IN_DIFFUSERS: Final = (61, 103, 121, 122)      # trailing: docs/sampler-parity.md


def numbers(schedule: str, prediction: Any, timestep_spacing: Any) -> NoiseSchedule:
    return NoiseSchedule(**goldens.SCHEDULES[schedule], prediction_type=prediction, timestep_spacing=timestep_spacing)


@pytest.mark.parametrize(("name", "spacing"), KINDS)
@pytest.mark.parametrize("timestep_spacing", ["leading", "linspace", "trailing"])
def test_timesteps_agree_for_every_number_of_steps(name: SamplerName, spacing: SigmaSpacing, timestep_spacing: str) -> None:
    scheduler = goldens.make_scheduler(name, "stable_diffusion", "epsilon", spacing, timestep_spacing)
    schedule = numbers("stable_diffusion", "epsilon", timestep_spacing)
    for steps in range(1, (MOST_LCM_STEPS if name == "lcm" else MOST_STEPS) + 1):
        goldens.set_steps(scheduler, steps, schedule="stable_diffusion", spacing=spacing)
        sampler = make_sampler(name, schedule, steps, spacing)
        ours, theirs = sampler.timesteps, scheduler.timesteps.numpy()
        assert len(ours) == steps * sampler.order - (sampler.order - 1)
        if timestep_spacing == "trailing" and steps in TOO_MANY_IN_DIFFUSERS and name != "lcm":
            if spacing == "model":
                assert len(theirs) == len(ours) + sampler.order
                assert theirs[-1] == -1
                assert np.allclose(ours, theirs[: -sampler.order], rtol=0, atol=1e-3)
        else:
            assert np.allclose(ours, theirs, rtol=0, atol=1e-3), steps


@pytest.mark.parametrize(("name", "spacing"), KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 14, 15, 30, MOST_STEPS])
def test_trajectories_agree_where_the_model_answers_to_the_latents(
    name: SamplerName, spacing: SigmaSpacing, prediction: str, steps: int
) -> None:
    steps = min(steps, MOST_LCM_STEPS) if name == "lcm" else steps
    scheduler = goldens.make_scheduler(name, "stable_diffusion", prediction, spacing, "leading")
    goldens.set_steps(scheduler, steps, schedule="stable_diffusion", spacing=spacing)
    sampler = make_sampler(name, numbers("stable_diffusion", prediction, "leading"), steps, spacing)
    generator, drawn = (torch.Generator().manual_seed(7) for _ in range(2))
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    theirs, ours = noise * scheduler.init_noise_sigma, sampler.initial(noise.numpy())
    for i, timestep in enumerate(scheduler.timesteps):
        # Any smooth function of what the model is shown and when; the same torch code answers both sides.
        def model(shown: torch.Tensor, when: float) -> torch.Tensor:
            return torch.tanh(shown.roll(1, dims=-1) * (1 + when / 1000)) + 0.3 * shown

        extra = {"generator": generator} if name in ("euler_a", "dpmpp_2m_sde", "lcm") else {}
        shown = scheduler.scale_model_input(theirs, timestep)
        theirs = scheduler.step(model(shown, float(timestep)), timestep, theirs, **extra).prev_sample
        output = model(torch.from_numpy(sampler.scale_input(ours, i)), sampler.timesteps[i]).numpy()
        ours, _ = sampler.step(ours, output, i, lambda _: torch.randn((1, 4, 8, 8), generator=drawn).numpy())
        found = float(np.max(np.abs(ours - theirs.numpy())) / np.max(np.abs(theirs.numpy())))
        assert found <= 1e-4, (i, found)


def test_the_goldens_in_the_repository_are_what_diffusers_does(tmp_path: Path) -> None:
    stored = Path(__file__).resolve().parents[1] / "vectors" / "samplers"
    goldens.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in stored.iterdir())
    for path in sorted(stored.glob("*.npz")):
        with np.load(path, allow_pickle=False) as then, np.load(tmp_path / path.name, allow_pickle=False) as now:
            assert then.files == now.files
            for key in then.files:
                assert np.allclose(then[key], now[key], rtol=1e-5, atol=1e-5), (path.name, key)
