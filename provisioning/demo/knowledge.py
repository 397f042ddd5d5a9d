"""What the built-in model says of itself: the words that mean something to it, its best settings, prompts to try.

`known.json` lies beside the model's folder and goes into its bundle's `model.json`, from where the page takes its examples
and notices a prompt that holds nothing the model knows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from provisioning.demo.evaluation_prompts import EvaluationPrompt
from provisioning.demo.pictures import SIZE
from provisioning.demo.vocabulary import FLAT_WORDS, GROUNDS, PAINTS, Subject, with_article


@dataclass(frozen=True)
class Settings:
    """How a picture is made."""

    sampler: str
    steps: int
    guidance: float


BEST: Final = Settings(sampler="ddim", steps=20, guidance=2.0)
NOTES: Final = (
    "A small sampler, trained from nothing on emoji drawings. It knows some 300 things, one at a time, and eleven colours for "
    "them, on a plain ground; everything else it reads past. Its pictures are close to its training pictures."
)
LICENCE: Final = "Apache-2.0 AND MIT AND Unicode-3.0"       # SPDX; the texts are in LICENSE.bundle
# In names, and yet no sign that a prompt names anything.
_SMALL_WORDS: Final = frozenset({"a", "an", "in", "of", "with", "on", "the", "art", "design", "long"})
# To try first: what a newcomer might ask for, and what shows colours, grounds, styles and filler words.
EXAMPLES: Final = (
    "a red apple", "a castle", "a penguin", "a photo of a beautiful sailboat", "a rocket on a dark blue background",
    "a blue elephant", "a sunflower", "a purple car on a yellow background", "a cute robot",
    "a pink frog on a black background", "a slice of watermelon, flat design", "my very nice teapot",
)


def about(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return the content of `known.json`, in the terms of a bundle's `model.json`."""
    said = [name for subject in subjects for name in subject.names]
    return {
        "licence": LICENCE,
        "notes": NOTES,
        "vocabulary": {
            "subjects": [subject.names[0] for subject in subjects],
            "words": sorted({word for phrase in [*said, *PAINTS, *GROUNDS, *FLAT_WORDS] for word in _words(phrase)}),
            "examples": list(EXAMPLES),
        },
        "defaults": {
            "sampler": BEST.sampler, "steps": BEST.steps, "guidance_scale": BEST.guidance, "negative_prompt": "",
        },
        # It was trained at one size, and at another it draws ornaments.
        "sizes": {
            "native": [SIZE, SIZE], "multiple": 64, "smallest": SIZE, "largest": SIZE, "largest_area": SIZE * SIZE,
            "largest_batch": 8,
        },
    }


def write(subjects: Sequence[Subject], path: Path) -> None:
    """Write `known.json`, which the export takes as what a model says of itself."""
    path.write_text(json.dumps(about(subjects), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def seed_prompts(subjects: Sequence[Subject], prompts: Sequence[EvaluationPrompt], count: int = 8) -> list[str]:
    """Draw subjects that the evaluation did not ask for, by a fixed seed, to show what a seed changes."""
    asked = {prompt.label for prompt in prompts}
    free = [subject for subject in subjects if subject.label not in asked]
    return [with_article(subject.names[0]) for subject in random.Random(5).sample(free, min(count, len(free)))]


def _words(phrase: str) -> set[str]:
    """Return the words of a phrase that mean something, a hyphenated one whole and in its parts."""
    whole = phrase.lower().split()
    parts = [part for word in whole for part in word.split("-")]
    return {word for word in [*whole, *parts] if len(word) > 1 and word not in _SMALL_WORDS}
