"""The words of the built-in model: its subjects, colours, grounds, styles, and what it has learned to read past.

Everything that a caption, an evaluation prompt or the page's list of known words is made of comes from here, so that the
model cannot be asked in one place for what it was not taught in the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent

# Grounds, sRGB. A ground is a flat colour behind the subject.
GROUNDS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 48, 49), "orange": (245, 145, 40), "yellow": (252, 214, 60), "green": (67, 170, 80),
    "blue": (52, 112, 222), "light blue": (150, 208, 245), "purple": (132, 76, 190), "pink": (248, 160, 196),
    "brown": (128, 84, 52), "black": (16, 16, 18), "gray": (142, 142, 146), "dark blue": (24, 36, 92),
}
# Paints: hue in degrees, least saturation, factor on the brightness. The three without a hue are made from lightness alone.
PAINTS: Final[dict[str, tuple[float, float, float] | None]] = {
    "red": (0, 0.75, 0.95), "orange": (28, 0.8, 1.0), "yellow": (50, 0.75, 1.05), "green": (125, 0.6, 0.85),
    "blue": (218, 0.7, 1.0), "purple": (275, 0.6, 0.95), "pink": (335, 0.45, 1.15), "brown": (24, 0.6, 0.62),
    "black": None, "white": None, "gray": None,
}
FLAT_WORDS: Final = ("flat", "flat icon", "flat design", "vector art", "flat drawing")

# Words around a subject that say nothing about the picture. A model that has never read them loses the subject.
OPENINGS: Final = (
    "a photo of", "a picture of", "an image of", "a drawing of", "a painting of", "a portrait of", "an illustration of",
    "a render of", "a close-up of", "please draw", "show me", "draw me", "i want to see", "can you make", "make", "there is",
    "here is", "this is", "my", "the", "one", "one single", "photo of", "picture of", "a nice view of",
)
ADJECTIVES: Final = (
    "beautiful", "nice", "pretty", "cute", "lovely", "great", "amazing", "wonderful", "perfect", "simple", "funny", "happy",
    "little", "small", "big", "large", "huge", "tiny", "old", "new", "young", "shiny", "glossy", "bright", "colorful",
    "very nice", "really cute", "so beautiful", "detailed", "famous", "magic", "strange", "fresh", "fantastic", "classic",
)
ENDINGS: Final = (
    "3d", "3d render", "glossy", "digital art", "high quality", "highly detailed", "4k", "8k", "masterpiece", "best quality",
    "in the middle", "in the center", "alone", "please", "isolated", "studio lighting", "soft light", "trending", "sharp focus",
    "very detailed", "cartoon", "emoji", "icon", "for my friend", "at home", "in summer", "looking good", "award winning",
)
# Plural in form, or without an article.
NO_ARTICLE: Final = frozenset({
    "grapes", "cherries", "pancakes", "french fries", "fries", "popcorn", "sushi", "bacon", "cheese", "garlic", "corn",
    "broccoli",
    "fire", "fireworks", "glasses", "sunglasses", "jeans", "pants", "socks", "headphones", "scissors", "soda", "wine", "beer",
    "coffee", "tea", "milk", "books", "money", "lightning", "santa claus", "santa", "rain", "bubble tea", "cake", "ice cream",
    "earth", "saturn", "soccer", "basketball", "tennis", "boba",
})


@dataclass(frozen=True)
class Subject:
    """One thing that the model can draw; `label` is its picture's name, `names` what a caption may call it."""

    label: str
    names: tuple[str, ...]


def subjects() -> tuple[Subject, ...]:
    """Return every subject, in the order of the file."""
    found = []
    for line in (HERE / "subjects.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            label, _, names = line.partition("=")
            found.append(Subject(label.strip(), tuple(name.strip() for name in names.split(";"))))
    return tuple(found)


def with_article(name: str, adjective: str = "") -> str:
    """Return the name with an adjective and its indefinite article, where it takes one."""
    words = f"{adjective} {name}".strip()
    if name in NO_ARTICLE:
        return words
    vowel = words[0] in "aeiou" and not words.startswith(("uni", "one", "eu", "ufo", "use"))
    return f"{'an' if vowel else 'a'} {words}"
