"""The built-in model from nothing: drawings, pictures, tokenizer, autoencoder, latents, diffusion, a finished folder.

Every stage leaves its result in the working folder, whole or not at all, and is not done again when it is there; within
the two long ones a checkpoint is written every three minutes. So the same call goes on after an interruption, and ends
with the weights of a training that was not interrupted. All draws come from fixed seeds.

    train(Path("work"), Path("model"), report=print)

leaves `model/pipeline` (a diffusers folder), `model/known.json` and `model/LICENSE`. With `smoke=True` every stage runs on
three plain shapes, in a minute or two: it shows that the machinery works and teaches the model nothing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

# What one unit of each stage takes on two cores, in seconds, for the time left: only their proportions matter.
_COSTS: Final = {
    "drawings": 15.0, "pictures": 60.0, "tokenizer": 10.0, "autoencoder": 1000.0, "latents": 90.0, "diffusion": 5000.0,
}


@dataclass(frozen=True)
class Progress:
    """Where a training is; `seconds_left` is None until there is something to measure it by."""

    stage: str
    done: int
    total: int
    loss: float
    seconds_left: float | None


@dataclass(frozen=True)
class Trained:
    """What came out, and how the losses fell: the mean of each long stage's first and last tenth."""

    pipeline: Path
    known: Path
    licence: Path
    losses: dict[str, tuple[float, float]]


class _Clock:
    """Turns the stages' reports into progress with time left, and remembers the losses."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._began = time.monotonic()
        self._at_start: float | None = None
        self.losses: dict[str, list[float]] = {}

    def __call__(self, stage: str, done: int, total: int, loss: float) -> None:
        self.losses.setdefault(stage, []).append(loss)
        stages = list(_COSTS)
        before = sum(_COSTS[name] for name in stages[: stages.index(stage)])
        share = (before + _COSTS[stage] * done / max(1, total)) / sum(_COSTS.values())
        if self._at_start is None:      # a training that goes on began where it was left
            self._at_start, self._began = share, time.monotonic()
        gained = share - self._at_start
        left = (time.monotonic() - self._began) * (1 - share) / gained if gained > 0.001 else None
        self._tell(Progress(stage, done, total, loss, left))

    def fall(self, stage: str) -> tuple[float, float]:
        """Return the mean loss of a stage's first tenth, as far as this call saw it, and of its last."""
        losses = self.losses[stage]
        tenth = max(1, len(losses) // 10)
        return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def train(workdir: Path, out: Path, *, smoke: bool = False, report: Callable[[Progress], None] = lambda _: None) -> Trained:
    """Train the built-in model, or go on training it, and write it to `out`.

    Where `out` holds a finished model it is returned as it is. Raises `BadRequest` where the drawings cannot be had, or
    where `workdir` holds a training of another recipe.
    """
    trained = Trained(out / "pipeline", out / "known.json", out / "LICENSE", {})
    if trained.pipeline.exists():       # its name is given last
        return replace(trained, losses=_losses(workdir))
    # Imported here: whoever only asks for help does not wait for torch.
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    from provisioning.demo import autoencoder, diffusion, evaluation_prompts, knowledge, pictures, tokenizer, vocabulary
    from provisioning.demo.checkpoint import Checkpoint

    clock = _Clock(report)
    workdir.mkdir(parents=True, exist_ok=True)
    subjects = _smoke_subjects() if smoke else vocabulary.subjects()
    facts_file, words, latents_file, vae_folder = (workdir / name for name in ("facts.json", "tokenizer", "latents.pt", "vae"))

    if not facts_file.exists():
        drawing = _drawings(workdir, smoke, clock)
        clock("pictures", 0, 1, 0.0)
        # facts.json is written last: where it is, the pictures are whole.
        pictures.make(subjects, drawing, evaluation_prompts.held_out(evaluation_prompts.read()), workdir)
        clock("pictures", 1, 1, 0.0)
    facts = pictures.read_facts(workdir)

    if not words.exists():
        tokenizer.learn(facts, subjects, _fresh(workdir / "tokenizer.new"))
        (workdir / "tokenizer.new").rename(words)
        clock("tokenizer", 1, 1, 0.0)
    reader: Any = CLIPTokenizer.from_pretrained(str(words))

    if not latents_file.exists():
        images = np.load(workdir / "images.npy")
        if not vae_folder.exists():
            vae = autoencoder.train(images, _autoencoder_recipe(smoke), Checkpoint(workdir / "autoencoder.ckpt"), clock)
            autoencoder.save(vae, _fresh(workdir / "vae.new"))
            (workdir / "vae.new").rename(vae_folder)
        vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).to(memory_format=torch.channels_last).eval()
        torch.save(autoencoder.encode(vae, images, clock), workdir / "latents.new")
        (workdir / "latents.new").rename(latents_file)

    unet, text = diffusion.train(
        torch.load(latents_file, weights_only=True), facts, reader, _diffusion_recipe(smoke),
        Checkpoint(workdir / "diffusion.ckpt"), clock,
    )
    out.mkdir(parents=True, exist_ok=True)
    knowledge.write(subjects, out / "known.json")
    shutil.copyfile(vocabulary.HERE / "LICENSE.bundle", out / "LICENSE")
    unfinished = _fresh(out / "pipeline.new")
    vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    diffusion.save_pipeline(vae, unet, text, reader, words, unfinished)
    # Of a stage that an earlier call finished, that call's figures stand.
    losses = _losses(workdir) | {stage: clock.fall(stage) for stage in ("autoencoder", "diffusion") if stage in clock.losses}
    (workdir / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    unfinished.rename(trained.pipeline)
    return replace(trained, losses=losses)


def _losses(workdir: Path) -> dict[str, tuple[float, float]]:
    file = workdir / "losses.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {stage: (first, last) for stage, (first, last) in found.items()}


def _drawings(workdir: Path, smoke: bool, clock: _Clock) -> Callable[[Any, bool], Path]:
    clock("drawings", 0, 1, 0.0)
    if smoke:
        from provisioning.demo import stand_ins

        drawing = stand_ins.draw(workdir / "drawings")
    else:
        from provisioning.demo import drawings, vocabulary

        drawing = drawings.fetch(vocabulary.subjects(), workdir / "drawings").training
    clock("drawings", 1, 1, 0.0)
    return drawing


def _smoke_subjects() -> Any:
    from provisioning.demo import stand_ins

    return stand_ins.SUBJECTS


def _autoencoder_recipe(smoke: bool) -> Any:
    from provisioning.demo.autoencoder import AutoencoderRecipe, Phase

    full = AutoencoderRecipe()
    return replace(full, phases=(Phase(64, 4, 60), Phase(192, 1, 2))) if smoke else full


def _diffusion_recipe(smoke: bool) -> Any:
    from provisioning.demo.diffusion import DiffusionRecipe

    full = DiffusionRecipe()
    small = replace(full, channels=(16, 16, 32, 32), text_width=64, text_layers=1, batch=8, steps=40, decay_steps=10)
    return small if smoke else full


def _fresh(folder: Path) -> Path:
    """Return the folder's path, with what an interrupted call left there removed."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
