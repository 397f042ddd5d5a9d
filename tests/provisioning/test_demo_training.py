"""The built-in model's training, tiny: the optimizer, what an interruption changes (nothing), and what comes out."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from appliance.errors import BadRequest
from provisioning.demo import captions, classifier, diffusion, examination, stand_ins, tokenizer
from provisioning.demo.checkpoint import Checkpoint
from provisioning.demo.diffusion import DiffusionRecipe
from provisioning.demo.muon import Muon, orthogonalize
from provisioning.demo.train import Progress, Trained, train

TINY = replace(
    DiffusionRecipe(), channels=(16, 16, 16, 16), text_width=32, text_layers=1, batch=4, steps=6, decay_steps=3, groups=8
)


class Interrupted(Exception):
    """Raised in the middle of a training by a test."""


def silent(_stage: str, _done: int, _total: int, _loss: float) -> None:
    """Report to nobody."""


@pytest.mark.parametrize("shape", [(24, 24), (16, 80), (80, 16), (3, 12, 40)])
def test_muon_directions_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, steps=5))
    assert values.max() < 1.35
    assert values.median() > 0.6


def test_muon_keeps_the_singular_vectors() -> None:
    u, _, v = torch.linalg.svd(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
    turned = orthogonalize(u @ torch.diag(torch.linspace(0.5, 2, 12)) @ v, steps=5)
    inner = u.mT @ turned @ v.mT
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 0.05


def test_muon_goes_downhill() -> None:
    torch.manual_seed(0)
    weight, target = torch.nn.Parameter(torch.randn(8, 16)), torch.randn(8, 16)
    optimizer = Muon([weight], lr=0.1)
    before = float((weight - target).square().mean().detach())
    for _ in range(60):
        loss = (weight - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert float((weight - target).square().mean().detach()) < 0.2 * before


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, list[captions.Facts], Any]:
    """Return latents of nothing in particular, facts and a tokenizer."""
    facts = [captions.Facts(n % 3, stand_ins.SUBJECTS[n % 3].names, n % 2 == 1, "", "", "") for n in range(12)]
    words = tokenizer.learn(facts, stand_ins.SUBJECTS, tmp_path_factory.mktemp("words") / "t")
    return torch.randn((12, 4, 24, 24), generator=torch.Generator().manual_seed(4)).half(), facts, words


def test_a_training_that_was_interrupted_ends_with_the_weights_of_one_that_was_not(
    small_data: tuple[torch.Tensor, list[captions.Facts], Any], tmp_path: Path
) -> None:
    latents, facts, words = small_data
    whole = diffusion.train(latents, facts, words, TINY, Checkpoint(tmp_path / "whole.ckpt"), silent)

    def stop_at_four(_stage: str, done: int, _total: int, _loss: float) -> None:
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):        # its last checkpoint is of step 3: step 4 is lost and done again
        diffusion.train(latents, facts, words, TINY, Checkpoint(tmp_path / "part.ckpt", every=0.0), stop_at_four)
    resumed = diffusion.train(latents, facts, words, TINY, Checkpoint(tmp_path / "part.ckpt"), silent)
    for one, other in zip(whole, resumed, strict=True):
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_a_checkpoint_of_another_recipe_is_refused_with_a_hint(
    small_data: tuple[torch.Tensor, list[captions.Facts], Any], tmp_path: Path
) -> None:
    latents, facts, words = small_data
    file = tmp_path / "c.ckpt"
    diffusion.train(latents, facts, words, replace(TINY, steps=1), Checkpoint(file, every=0.0), silent)
    with pytest.raises(BadRequest, match="not a checkpoint of this recipe") as refused:
        diffusion.train(latents, facts, words, replace(TINY, steps=1, text_width=64), Checkpoint(file), silent)
    assert "empty folder" in str(refused.value.hint)


def test_a_checkpoint_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    checkpoint, rng = Checkpoint(tmp_path / "c.ckpt"), np.random.default_rng(3)
    checkpoint.save(5, rng=rng)
    expected = rng.random()
    again = np.random.default_rng(99)
    assert Checkpoint(tmp_path / "c.ckpt").restore(rng=again) == 5
    assert again.random() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["c.ckpt"]


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    recipe = DiffusionRecipe()
    rates = [diffusion._rate(step, recipe) for step in range(recipe.steps)]
    plateau = rates[40 : recipe.steps - recipe.decay_steps]
    assert rates[0] < rates[20] < plateau[0]
    assert set(plateau) == {recipe.learning_rate}
    assert rates[-1] < 0.05 * recipe.learning_rate


def test_every_kind_of_picture_has_its_share_of_the_training() -> None:
    facts = [captions.Facts(0, ("disc",), False, colour, ground, "") for colour, ground in (("", ""), ("", ""), ("red", ""))]
    weights = diffusion._how_often(facts, DiffusionRecipe())
    assert weights[0] == weights[1]
    assert float((weights[0] + weights[1]) / weights[2]) == pytest.approx(0.46 / 0.16)


def test_the_judge_learns_and_never_sees_the_paints_that_it_is_tested_on(tmp_path: Path) -> None:
    drawing = stand_ins.draw(tmp_path / "d")
    gallery = classifier.Gallery.of([(n, drawing(subject, False)) for n, subject in enumerate(stand_ins.SUBJECTS)])
    held_out = gallery.held_out()
    assert held_out.any()
    assert not held_out[:, 0].any()
    seen: list[float] = []
    recipe = classifier.ClassifierRecipe(steps=300, batch=12)
    judge = classifier.train(
        gallery, 3, recipe, Checkpoint(tmp_path / "judge.ckpt"), lambda _stage, _done, _total, loss: seen.append(loss)
    )
    assert np.mean(seen[-10:]) < 0.7 * np.mean(seen[:10])
    assert classifier.test(judge, gallery, np.repeat(np.argwhere(held_out), 4, 0), seed=1) > 0.7


def test_the_whole_training_runs_tiny_goes_on_after_an_interruption_and_is_not_done_twice(tmp_path: Path) -> None:
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if progress.stage == "diffusion" and progress.done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(tmp_path / "work", tmp_path / "out", smoke=True, report=stop)
    assert not (tmp_path / "out").exists()
    stages: list[str] = []
    trained = train(tmp_path / "work", tmp_path / "out", smoke=True, report=lambda progress: stages.append(progress.stage))
    assert set(stages) == {"diffusion"}         # what was finished is not done again
    first, last = trained.losses["diffusion"]
    assert last < first
    assert seen[-1].seconds_left is not None
    assert trained.known.exists()
    assert "Copyright (c) Microsoft Corporation" in trained.licence.read_text(encoding="utf-8")
    pipeline = examination.load(trained.pipeline)
    pictures = pipeline(["a disc"], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert pictures.shape == (1, 192, 192, 3)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".new"]
    again: Trained = train(tmp_path / "work", tmp_path / "out", smoke=True)
    assert again == trained


def test_importing_the_entry_function_imports_no_torch() -> None:
    code = "import sys, provisioning.demo.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_random_draws_of_a_training_do_not_touch_the_shared_generator() -> None:
    state = random.getstate()
    captions.caption(captions.Facts(0, ("disc",), False, "", "", ""), random.Random(1))
    assert random.getstate() == state
