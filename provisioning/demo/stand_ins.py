"""Three drawings made here, for a training that only has to show that every stage works: no network, no node.

Their subjects are few and their shapes plain, so that a loss falls within a minute; nothing else is claimed of the model
that learns them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw

from provisioning.demo.vocabulary import Subject

_SIDE: Final = 256
SUBJECTS: Final = tuple(Subject(name, (name,)) for name in ("disc", "box", "cross"))
_SHAPES: Final[dict[str, Callable[[ImageDraw.ImageDraw, str], None]]] = {
    "disc": lambda pen, ink: pen.ellipse((16, 16, 240, 240), fill=ink),
    "box": lambda pen, ink: pen.rectangle((24, 24, 232, 232), fill=ink),
    "cross": lambda pen, ink: pen.line([(128, 16), (128, 240), (128, 128), (16, 128), (240, 128)], fill=ink, width=60),
}


def draw(folder: Path) -> Callable[[Subject, bool], Path]:
    """Draw them into `folder`; return which file is a subject's drawing, by subject and style."""
    folder.mkdir(parents=True, exist_ok=True)
    inks = ("#d03030", "#3070d8", "#f0c030")
    for (name, shape), ink in zip(_SHAPES.items(), inks, strict=True):
        for style, outline in (("3d", "#202020"), ("flat", ink)):
            picture = Image.new("RGBA", (_SIDE, _SIDE))
            shape(ImageDraw.Draw(picture), outline)
            inner = Image.new("RGBA", (_SIDE, _SIDE))
            shape(ImageDraw.Draw(inner), ink)
            picture.alpha_composite(inner.resize((_SIDE - 32, _SIDE - 32)), (16, 16))
            picture.save(folder / f"{name}-{style}.png")
    return lambda subject, flat: folder / f"{subject.label}-{'flat' if flat else '3d'}.png"
