"""A picture's caption, made anew each time the picture is drawn: the facts in it are true, the words around them vary.

The facts are the subject's name, the colour it was painted in, the colour of the ground, and the flat style where it is
the flat drawing. Everything else (articles, openings, adjectives, endings, commas) is there to be read past.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from provisioning.demo.vocabulary import ADJECTIVES, ENDINGS, FLAT_WORDS, OPENINGS, PAINTS, with_article


@dataclass(frozen=True)
class Facts:
    """What is true of a training picture; an empty colour or ground was left as it is."""

    subject: int
    names: tuple[str, ...]
    flat: bool
    colour: str
    ground: str
    natural: str        # the subject's own colour, where one word covers most of it


def caption(facts: Facts, rng: random.Random) -> str:
    """Return one caption in lower case; every call draws other words for the same facts."""
    name = facts.names[0] if len(facts.names) == 1 or rng.random() < 0.65 else rng.choice(facts.names[1:])
    colour = facts.colour
    if not colour and facts.natural and facts.natural not in name and rng.random() < 0.12:
        colour = facts.natural
    if colour and " " in name and name.split()[0] in PAINTS:
        name = name.split(" ", 1)[1]        # a red apple that was painted blue is a blue apple
    words = _phrase(name, colour, rng)
    if rng.random() < 0.1:
        words = f"{_invented(rng)} {words}"
    if facts.ground:
        words += rng.choice(
            (" on a {g} background", " on a {g} background", ", {g} background", " on {g}", " in front of a {g} wall",
             " with a {g} background")
        ).format(g=facts.ground)
    elif rng.random() < 0.06:
        words += rng.choice((" on a plain background", ", plain background", " on a light background"))
    if facts.flat:
        style = rng.choice(FLAT_WORDS)
        words = f"{style} of {words}" if style != "flat" and rng.random() < 0.25 else f"{words}, {style}"
    elif rng.random() < 0.2:
        ending = rng.sample(ENDINGS, rng.choice((1, 1, 2)))
        if rng.random() < 0.3:
            ending.append(_invented(rng))
        words += ", " + ", ".join(ending)
    if rng.random() < 0.08:
        words += rng.choice((".", "!", " !", " ..."))
    return words.replace("a orange", "an orange")


def _phrase(name: str, colour: str, rng: random.Random) -> str:
    """Return the subject with its colour, bare, with an article, or among words to be read past."""
    adjective = colour
    if rng.random() < 0.22:
        adjective = f"{_invented(rng) if rng.random() < 0.25 else rng.choice(ADJECTIVES)} {colour}".strip()
    draw = rng.random()
    if draw < 0.45:
        return with_article(name, adjective)
    if draw < 0.65:
        return f"{adjective} {name}".strip()
    opening = rng.choice(OPENINGS)
    if opening in ("my", "the", "one", "one single"):
        return f"{opening} {adjective} {name}".replace("  ", " ")
    return f"{opening} {with_article(name, adjective)}"


def _invented(rng: random.Random) -> str:
    """Return a word or two that mean nothing, so that the model learns to read past what it has never read."""
    sounds = (
        "ma", "el", "ro", "ti", "ven", "gra", "son", "ly", "ous", "ing", "ed", "ar", "ne", "sho", "ble", "ic", "con", "tra",
    )
    return " ".join("".join(rng.sample(sounds, rng.choice((2, 3, 3)))) for _ in range(rng.choice((1, 1, 2))))
