"""Examine a trained built-in model from beginning to end, and write what came out to a folder of the documentation.

    python -m provisioning.demo.examination WORKDIR MODEL DOCS

`WORKDIR` is the training's, `MODEL` the folder that it wrote, `DOCS` gets `sheet.jpg`, `seeds.jpg`, `nearest.jpg` and
`evaluation.json`. The judge is trained first, where `WORKDIR` does not hold it yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from provisioning.demo import classifier, evaluation, evaluation_prompts, knowledge, pictures, sheets, vocabulary
from provisioning.demo.checkpoint import Checkpoint, Report
from provisioning.demo.drawings import Drawings, fetch
from provisioning.demo.vocabulary import Subject

_SEEDS_SHOWN = 6


def examine(workdir: Path, model: Path, docs: Path, report: Report) -> dict[str, Any]:
    """Judge `model/pipeline` by the fixed prompts; return the figures that `evaluation.json` holds."""
    subjects = vocabulary.subjects()
    prompts = evaluation_prompts.read()
    training, facts = np.load(workdir / "images.npy", mmap_mode="r"), pictures.read_facts(workdir)
    judge, accuracy = judge_of(subjects, fetch(subjects, workdir / "drawings"), workdir, report)
    named = classifier.name(judge, training).argmax(1)
    accuracy["training pictures of the model"] = round(float((named == np.array([fact.subject for fact in facts])).mean()), 4)
    pipeline = load(model / "pipeline")
    asked = [(prompt.prompt, seed) for prompt in prompts for seed in prompt.seeds]
    made = evaluation.draw(pipeline, asked, knowledge.BEST, lambda done, total: report("pictures", done, total, 0.0))
    answers = evaluation.mark(prompts, made, classifier.name(judge, made), subjects)
    result = evaluation.hand_in(
        answers, made, training=training, facts=facts, subjects=subjects, judge=accuracy, folder=docs
    )
    words = knowledge.seed_prompts(subjects, prompts)
    shown = evaluation.draw(
        pipeline, [(prompt, seed) for prompt in words for seed in range(_SEEDS_SHOWN)], knowledge.BEST,
        lambda done, total: report("seeds", done, total, 0.0),
    )
    sheets.save(sheets.rows(shown.reshape(len(words), _SEEDS_SHOWN, *shown.shape[1:]), words), docs / "seeds.jpg")
    return result


def judge_of(
    subjects: Sequence[Subject], drawings: Drawings, workdir: Path, report: Report
) -> tuple[classifier.Classifier, dict[str, float]]:
    """Train the judge, or take it from `workdir`, and return it with its accuracy on what it never saw."""
    known = classifier.Gallery.of(
        [(number, drawings.path(subject, style)) for style in ("3d", "flat", "noto") for number, subject in enumerate(subjects)]
    )
    recipe = classifier.ClassifierRecipe()
    judge = classifier.train(known, len(subjects), recipe, Checkpoint(workdir / "judge.ckpt", every=60), report)
    strange = classifier.Gallery.of([(number, drawings.path(subject, "twemoji")) for number, subject in enumerate(subjects)])
    as_they_are = np.stack([np.arange(len(strange.subjects)), np.zeros(len(strange.subjects), np.int64)], -1)
    return judge, {
        "subjects": len(subjects),
        "chance": round(1 / len(subjects), 4),
        "paints held out": round(classifier.test(judge, known, np.argwhere(known.held_out()), seed=1), 4),
        "Twemoji, never seen": round(classifier.test(judge, strange, np.repeat(as_they_are, 3, 0), seed=2), 4),
    }


def load(folder: Path) -> Any:
    """Return the diffusers pipeline in single precision, silent."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tell(stage: str, done: int, total: int, loss: float) -> None:
    if done % 100 == 0 or done == total:
        sys.stderr.write(f"{stage} {done}/{total} {loss:.3f}\n")


if __name__ == "__main__":
    workdir, model, docs = (Path(argument) for argument in sys.argv[1:4])
    figures = examine(workdir, model, docs, _tell)
    sys.stdout.write(json.dumps({key: value for key, value in figures.items() if key != "answers"}, indent=1) + "\n")
