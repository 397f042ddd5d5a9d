"""Contact sheets: many pictures on one, so that a reader can judge what a figure says."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_SIDE: Final = 96           # of a picture on a sheet
_GAP: Final = 6
_TEXT: Final = 26           # height of two lines of words
_INK: Final = (40, 40, 40)
_WRONG: Final = (200, 30, 30)
_LARGEST: Final = 600_000   # bytes


def contact(
    pictures: NDArray[np.uint8], right: Sequence[bool], words: Sequence[str], seeds: int, across: int = 6
) -> Image.Image:
    """Return every picture, the seeds of a prompt side by side above it, a red line under what the judge named wrong."""
    groups = len(pictures) // seeds
    width, height = seeds * _SIDE + 2 * _GAP, _SIDE + _TEXT + 2 * _GAP
    sheet = Image.new("RGB", (across * width, -(-groups // across) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for group in range(groups):
        x, y = group % across * width + _GAP, group // across * height + _GAP
        for seed in range(seeds):
            number = group * seeds + seed
            sheet.paste(_thumbnail(pictures[number]), (x + seed * _SIDE, y))
            if not right[number]:
                pen.line((x + seed * _SIDE + 2, y + _SIDE + 1, x + (seed + 1) * _SIDE - 3, y + _SIDE + 1), fill=_WRONG, width=3)
        _write(pen, (x, y + _SIDE + 4), words[group * seeds], seeds * _SIDE)
    return sheet


def rows(pictures: NDArray[np.uint8], words: Sequence[str]) -> Image.Image:
    """Return one row a prompt with all its seeds: pictures are (prompts, seeds, height, width, 3)."""
    count, seeds = pictures.shape[:2]
    sheet = Image.new("RGB", (seeds * _SIDE + 2 * _GAP, count * (_SIDE + _TEXT)), "white")
    pen = ImageDraw.Draw(sheet)
    for row in range(count):
        for seed in range(seeds):
            sheet.paste(_thumbnail(pictures[row, seed]), (_GAP + seed * _SIDE, row * (_SIDE + _TEXT)))
        _write(pen, (_GAP, row * (_SIDE + _TEXT) + _SIDE + 4), words[row], seeds * _SIDE)
    return sheet


def pairs(shown: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8], str, str, float]], across: int = 4) -> Image.Image:
    """Return generated pictures, each beside the training picture that is nearest to it, with their distance."""
    width, height = 2 * _SIDE + 4 * _GAP, _SIDE + _TEXT + 2 * _GAP
    sheet = Image.new("RGB", (across * width, -(-len(shown) // across) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (made, known, prompt, label, distance) in enumerate(shown):
        x, y = number % across * width + _GAP, number // across * height + _GAP
        sheet.paste(_thumbnail(made), (x, y))
        sheet.paste(_thumbnail(known), (x + _SIDE + _GAP, y))
        _write(pen, (x, y + _SIDE + 4), f"{prompt} | nearest: {label}, {distance:.0f} of 255", 2 * _SIDE + _GAP)
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    """Write a JPEG that is as good as fits into 600 kB."""
    for quality in (88, 80, 70, 60, 50, 40):
        sheet.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= _LARGEST:
            return


def _thumbnail(picture: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], words: str, width: int) -> None:
    lines = textwrap.wrap(words, max(8, width // 6))[:2]
    pen.multiline_text(place, "\n".join(lines), fill=_INK, font=ImageFont.load_default(10), spacing=1)
