"""The built-in model's examination: the fixed prompts, drawn once each seed, named by the judge, measured by pixels.

    pictures   one for each prompt and seed, by the diffusers pipeline at the model's own best settings
    names      is the judge's first answer the prompt's subject?
    colours    are the subject and the ground of the colours that were asked for? (`scoring`)
    seeds      how far are the two pictures of a prompt apart?
    memory     which training picture is nearest to each picture?

All pictures are shown; none is chosen, none is drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from provisioning.demo import scoring, sheets
from provisioning.demo.captions import Facts
from provisioning.demo.evaluation_prompts import EvaluationPrompt
from provisioning.demo.knowledge import BEST, Settings
from provisioning.demo.vocabulary import Subject

_TOGETHER: Final = 16       # pictures drawn at once
_NEAREST_SHOWN: Final = 12


@dataclass(frozen=True)
class Answer:
    """One picture's marks; a colour or ground is '' where none was asked for."""

    prompt: str
    kind: str
    seed: int
    subject: str
    named: str
    certainty: float
    in_first_five: bool
    colour: str
    colour_seen: str
    ground: str
    ground_seen: str


def draw(
    pipeline: Any, prompts: Sequence[tuple[str, int]], settings: Settings, report: Callable[[int, int], None]
) -> NDArray[np.uint8]:
    """Draw (prompt, seed) pairs with a diffusers pipeline: (n, height, width, 3)."""
    import torch

    pictures = []
    for start in range(0, len(prompts), _TOGETHER):
        part = prompts[start : start + _TOGETHER]
        noise = torch.cat([
            torch.randn(
                (1, pipeline.unet.config.in_channels, pipeline.unet.config.sample_size, pipeline.unet.config.sample_size),
                generator=torch.Generator().manual_seed(seed),
            )
            for _, seed in part
        ])
        pictures.append(pipeline(
            [prompt for prompt, _ in part], num_inference_steps=settings.steps, guidance_scale=settings.guidance, latents=noise,
            output_type="np",
        ).images)
        report(start + len(part), len(prompts))
    return np.round(np.concatenate(pictures) * 255).astype(np.uint8)


def mark(
    prompts: Sequence[EvaluationPrompt],
    pictures: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    subjects: Sequence[Subject],
) -> list[Answer]:
    """Return one answer a picture; pictures and probabilities come prompt by prompt, seed by seed."""
    labels = [subject.label for subject in subjects]
    answers = []
    asked = [(prompt, seed) for prompt in prompts for seed in prompt.seeds]
    for (prompt, seed), picture, p in zip(asked, pictures, probabilities, strict=True):
        order = p.argsort()[::-1]
        answers.append(Answer(
            prompt=prompt.prompt, kind=prompt.kind, seed=seed, subject=prompt.label, named=labels[order[0]],
            certainty=round(float(p[order[0]]), 3), in_first_five=labels.index(prompt.label) in order[:5],
            colour=prompt.colour, colour_seen=scoring.subject_word(picture) if prompt.colour else "",
            ground=prompt.ground, ground_seen=scoring.ground_word(picture) if prompt.ground else "",
        ))
    return answers


def figures(answers: Sequence[Answer], pictures: NDArray[np.uint8], seeds: int, subjects: int) -> dict[str, Any]:
    """Return the marks of the whole examination, in shares of 1."""
    def share(kind: str | None) -> float:
        return _share([a.named == a.subject for a in answers if kind in (None, a.kind)])

    pairs = [pictures[i : i + seeds] for i in range(0, len(pictures), seeds)]
    colours = [a.colour == a.colour_seen for a in answers if a.colour]
    grounds = [a.ground == a.ground_seen for a in answers if a.ground]
    between = [scoring.difference(a, b) for a, b, *_ in pairs]
    # The scale to read that by: the same seed, another prompt.
    others = [scoring.difference(one[0], other[0]) for one, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)]
    shapes = [scoring.overlap(a, b) for a, b, *_ in pairs]
    return {
        "prompts": len(pairs),
        "pictures": len(pictures),
        "subjects asked for": len({a.subject for a in answers}),
        "chance": round(1 / subjects, 4),
        "named right": share(None),
        "named right, by kind": {kind: share(kind) for kind in dict.fromkeys(a.kind for a in answers)},
        "in the first five": _share([a.in_first_five for a in answers]),
        "colour words right": _share(colours + grounds),
        "subject colours right": _share(colours),
        "ground colours right": _share(grounds),
        "seeds: mean difference of pixels, of 255": round(float(np.mean(between)), 1),
        "seeds: smallest difference": round(float(np.min(between)), 1),
        "prompts: mean difference of pixels, of 255": round(float(np.mean(others)), 1),
        "seeds: mean overlap of shapes": round(float(np.mean(shapes)), 3),
    }


def hand_in(
    answers: Sequence[Answer],
    pictures: NDArray[np.uint8],
    *,
    training: NDArray[np.uint8],
    facts: Sequence[Facts],
    subjects: Sequence[Subject],
    judge: dict[str, float],
    folder: Path,
) -> dict[str, Any]:
    """Write the contact sheets and `evaluation.json` to `folder` and return the figures."""
    seeds = len({answer.seed for answer in answers})
    folder.mkdir(parents=True, exist_ok=True)
    nearest = []
    thumbnails = scoring.thumbnail(training)
    # Evenly through the prompts, first seeds: not the best ones, nor the worst.
    for number in range(0, len(pictures), len(pictures) // _NEAREST_SHOWN)[:_NEAREST_SHOWN]:
        found, distance = scoring.nearest(pictures[number], thumbnails)
        shows = subjects[facts[found].subject].label
        nearest.append((pictures[number], training[found], answers[number].prompt, shows, distance))
    right = [answer.named == answer.subject for answer in answers]
    sheets.save(sheets.contact(pictures, right, [answer.prompt for answer in answers], seeds), folder / "sheet.jpg")
    sheets.save(sheets.pairs(nearest), folder / "nearest.jpg")
    result: dict[str, Any] = {
        "settings": asdict(BEST),
        "judge": judge,
        **figures(answers, pictures, seeds, len(subjects)),
        "nearest training pictures": [
            {"prompt": prompt, "nearest shows": label, "rms distance, of 255": round(distance, 1)}
            for _, _, prompt, label, distance in nearest
        ],
        "answers": [asdict(answer) for answer in answers],
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / max(1, len(right)), 4)
