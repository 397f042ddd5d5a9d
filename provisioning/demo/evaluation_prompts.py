"""The evaluation's prompts, fixed before the training that they judge: 96 of them, chosen by a seed and not by taste.

A third names a subject and nothing else, a third wraps it in filler words (half of those in words that no training caption
has), a third asks for a colour and a ground that the training pictures of that subject never show. Run as a module it
writes `evaluation_prompts.json`; the training reads that file and leaves the pairs out.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from provisioning.demo.vocabulary import ADJECTIVES, ENDINGS, GROUNDS, HERE, OPENINGS, PAINTS, subjects, with_article

FILE: Final = HERE / "evaluation_prompts.json"
SEED: Final = 20261124
THIRD: Final = 32
SEEDS: Final = (11, 12)
# Filler that no training caption has.
NEW_OPENINGS: Final = ("could i have a sketch of", "an oil canvas showing", "grandma would like", "a snapshot of", "render me")
NEW_ADJECTIVES: Final = ("majestic", "elegant", "charming", "gorgeous", "mysterious", "adorable", "polished", "ordinary")
NEW_ENDINGS: Final = (
    "bokeh", "unreal engine", "in the style of an old master", "on a rainy monday", "cinematic", "hyperrealistic",
)
VIVID: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")


@dataclass(frozen=True)
class EvaluationPrompt:
    """One prompt and what its picture must show; colour and ground are '' where nothing was said of them."""

    prompt: str
    label: str
    kind: str
    colour: str
    ground: str
    seeds: tuple[int, ...]


def read(path: Path = FILE) -> tuple[EvaluationPrompt, ...]:
    """Return the fixed prompts."""
    return tuple(
        EvaluationPrompt(**{**entry, "seeds": tuple(entry["seeds"])}) for entry in json.loads(path.read_text(encoding="utf-8"))
    )


def held_out(prompts: tuple[EvaluationPrompt, ...]) -> frozenset[tuple[str, str, str]]:
    """Return the (label, kind, word) triples that no training picture may show."""
    colours = {(p.label, "colour", p.colour) for p in prompts if p.colour}
    grounds = {(p.label, "ground", p.ground) for p in prompts if p.ground}
    return frozenset(colours | grounds)


def choose() -> tuple[EvaluationPrompt, ...]:
    """Draw the prompts anew from the fixed seed: 96 subjects, each asked for once."""
    rng = random.Random(SEED)
    # A subject that is named for its colour cannot be asked for in another.
    free = [s for s in subjects() if not set(s.label.lower().split()) & (set(PAINTS) | {"rainbow", "heart"})]
    chosen = rng.sample(free, 3 * THIRD)
    prompts = []
    for subject in chosen[:THIRD]:
        prompts.append(EvaluationPrompt(with_article(subject.names[0]), subject.label, "plain", "", "", SEEDS))
    for number, subject in enumerate(chosen[THIRD : 2 * THIRD]):
        if number % 2:
            opening, adjective, ending = rng.choice(OPENINGS[:13]), rng.choice(ADJECTIVES), rng.choice(ENDINGS)
        else:
            opening, adjective, ending = rng.choice(NEW_OPENINGS), rng.choice(NEW_ADJECTIVES), rng.choice(NEW_ENDINGS)
        prompts.append(EvaluationPrompt(
            f"{opening} {with_article(subject.names[0], adjective)}, {ending}", subject.label, "filler", "", "", SEEDS
        ))
    for subject in chosen[2 * THIRD :]:
        colour = rng.choice(VIVID)
        ground = rng.choice([word for word in GROUNDS if colour not in word.split()])
        name = subject.names[0]
        prompts.append(EvaluationPrompt(
            f"{with_article(name, colour)} on {'an' if ground[0] in 'aeiou' else 'a'} {ground} background", subject.label,
            "colour and ground", colour, ground, SEEDS,
        ))
    return tuple(prompts)


def write(path: Path = FILE) -> None:
    """Write the prompts that `choose` draws."""
    path.write_text(json.dumps([asdict(p) for p in choose()], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
