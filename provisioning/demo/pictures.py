"""The training pictures: every subject in two drawings, in several sizes and places, repainted, on grounds of many colours.

A seed can only matter where one caption has several pictures. So a caption says nothing about the side that a subject
looks to, its size, its place and, where it names no ground, the pale tint behind it: those are what a seed decides.

Leaves `images.npy` (uint8, pictures × 192 × 192 × 3) and `facts.json` (one entry a picture, in the same order).
"""

from __future__ import annotations

import colorsys
import json
import random
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from provisioning.demo.captions import Facts
from provisioning.demo.vocabulary import GROUNDS, PAINTS, Subject

SIZE: Final = 192
_FULL: Final = SIZE * 7 // 8        # the longest side of a subject at size 1
_SMALLEST: Final = 0.8
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)      # Rec. 601
# Mirrored, these would be wrong: writing, dials, notes, and what is held in one hand.
_NO_MIRROR: Final = frozenset({
    "pool 8 ball", "stop sign", "alarm clock", "watch", "calendar", "musical note", "game die", "globe showing Americas",
    "1st place medal", "floppy disk", "credit card", "Tokyo tower",
})
Floats = NDArray[np.float32]


def load_drawing(path: Path) -> Floats | None:
    """Return the drawing cut to its opaque part, its longest side `_FULL` pixels: (height, width, 4) in 0…1, or None."""
    if not path.exists():
        return None
    image = Image.open(path).convert("RGBA")
    box = Image.fromarray((np.asarray(image)[..., 3] > 24).astype(np.uint8)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = _FULL / max(image.size)
    return _resized(image, scale)


def _resized(image: Image.Image, scale: float) -> Floats:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Premultiplied while it is resized: otherwise the colour behind clear pixels bleeds into the edge.
    small = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    pixels: Floats = np.asarray(small, np.float32) / np.float32(255)
    return pixels


def repaint(rgba: Floats, word: str) -> Floats:
    """Return the drawing in one colour, its shading kept; highlights and dark lines stay as they are."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    value = rgb.max(-1)
    saturation = np.where(value > 0, (value - rgb.min(-1)) / np.maximum(value, 1e-6), 0)
    light = rgb @ _LUMA
    kind = PAINTS[word]
    if kind is not None:
        hue, least, factor = kind
        s = np.maximum(saturation * 0.9, least) * np.clip(1.25 - 0.35 * light, 0.6, 1)
        v = np.clip((0.25 + 0.6 * light + 0.3 * value) * factor, 0, 1)
        # HSV to RGB for one hue: the colour of that hue, mixed with white by s and darkened by v.
        pure = np.array(colorsys.hsv_to_rgb((hue % 360) / 360, 1, 1), np.float32)
        new = v[..., None] * (1 - s[..., None] * (1 - pure))
        keep = _ramp(light, 0.9, 0.08) * (saturation < 0.15) + _ramp(-value, -0.2, 0.1)
    elif word == "black":
        new = np.repeat((0.38 * light)[..., None], 3, -1)
        keep = _ramp(light, 0.9, 0.08) * (saturation < 0.2)
    elif word == "white":
        new = np.repeat((0.68 + 0.32 * light)[..., None], 3, -1)
        keep = _ramp(-light, -0.22, 0.1)
    else:
        new = np.repeat((0.25 + 0.5 * light)[..., None], 3, -1)
        keep = _ramp(light, 0.93, 0.05) * (saturation < 0.15) + _ramp(-light, -0.15, 0.1)
    keep = np.clip(keep, 0, 1)[..., None]
    return np.concatenate([new * (1 - keep) + rgb * keep, alpha], -1).astype(np.float32)


def _ramp(x: NDArray[np.floating], start: float, width: float) -> NDArray[np.floating]:
    risen: NDArray[np.floating] = np.clip((x - start) / width, 0, 1)
    return risen


def hue_word(rgb: Floats) -> NDArray[np.str_]:
    """Return the colour word of each pixel, (…, 3) in 0…1 to (…) of words; 'none' where no word fits well."""
    value, low = rgb.max(-1), rgb.min(-1)
    chroma = value - low
    safe = np.maximum(chroma, 1e-6)
    r, g, b = np.moveaxis(rgb, -1, 0)
    hue = np.select([value == r, value == g], [((g - b) / safe) % 6, (b - r) / safe + 2], (r - g) / safe + 4) * 60
    saturation = chroma / np.maximum(value, 1e-6)
    words = np.full(value.shape, "none", dtype="<U8")
    vivid = (saturation > 0.3) & (value > 0.2)
    for word, low_hue, high_hue in (
        ("red", 342, 374), ("orange", 14, 41), ("yellow", 41, 68), ("green", 75, 170), ("blue", 190, 252), ("purple", 252, 300),
        ("pink", 300, 342),
    ):
        words[vivid & ((hue - low_hue) % 360 < high_hue - low_hue)] = word
    # Pink is a pale red, and brown a dark orange: the same hues at another saturation or brightness.
    words[(words == "red") & (value > 0.8) & (saturation < 0.5)] = "pink"
    words[np.isin(words, ["red", "orange"]) & (value < 0.66) & (saturation < 0.85) & (hue % 360 > 8)] = "brown"
    words[(saturation < 0.15) & (value > 0.85)] = "white"
    words[(saturation < 0.4) & (value < 0.3) | (value < 0.16)] = "black"
    words[(saturation < 0.15) & (value > 0.35) & (value < 0.8)] = "gray"
    return words


def natural_colour(rgba: Floats) -> str:
    """Return the word that covers most of the drawing, or '' where none covers half of it."""
    words, counts = np.unique(hue_word(rgba[..., :3][rgba[..., 3] > 0.5]), return_counts=True)
    best = counts.argmax()
    return str(words[best]) if words[best] != "none" and counts[best] > 0.5 * counts.sum() else ""


def compose(
    rgba: Floats, ground: tuple[float, float, float], *, scale: float, mirror: bool, place: tuple[float, float]
) -> NDArray[np.uint8]:
    """Return a (192, 192, 3) picture: the drawing at a size and place (0…1 of the room there is) on a flat ground in 0…255."""
    if scale < 1:
        rgba = _resized(Image.fromarray(np.round(rgba * 255).astype(np.uint8), "RGBA"), scale)
    if mirror:
        rgba = rgba[:, ::-1]
    height, width = rgba.shape[:2]
    picture = np.empty((SIZE, SIZE, 3), np.float32)
    picture[:] = np.array(ground, np.float32) / 255
    y, x = round((SIZE - height) * (0.25 + 0.5 * place[0])), round((SIZE - width) * (0.25 + 0.5 * place[1]))
    alpha = rgba[..., 3:]
    room = picture[y : y + height, x : x + width]
    room[:] = rgba[..., :3] * alpha + room * (1 - alpha)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def make(
    subjects: Collection[Subject],
    drawing: Callable[[Subject, bool], Path],
    held_out: Collection[tuple[str, str, str]],
    out: Path,
    *,
    seed: int = 7,
) -> int:
    """Write the pictures and their facts to `out`; return how many there are.

    `drawing(subject, flat)` is the path of a subject's drawing. `held_out` are triples (label, "colour" or "ground", word)
    that the evaluation asks for: no picture shows one.
    """
    rng = random.Random(seed)
    images: list[NDArray[np.uint8]] = []
    facts: list[Facts] = []
    for number, subject in enumerate(subjects):
        for flat in (False, True):
            rgba = load_drawing(drawing(subject, flat))
            if rgba is None:
                raise FileNotFoundError(f"no {'flat' if flat else '3D'} drawing of {subject.label}")
            own = natural_colour(rgba)
            for colour, ground in plan(subject, own, flat, held_out, rng):
                # One shade of a ground word is as good as another near it.
                tint = (
                    tuple(c + rng.uniform(-9, 9) for c in GROUNDS[ground]) if ground
                    else (255.0, 255.0, 255.0) if rng.random() < 0.4
                    else _pale(rng)
                )
                images.append(compose(
                    repaint(rgba, colour) if colour else rgba,
                    (tint[0], tint[1], tint[2]),
                    scale=rng.uniform(_SMALLEST, 1),
                    mirror=subject.label not in _NO_MIRROR and rng.random() < 0.5,
                    place=(rng.random(), rng.random()),
                ))
                facts.append(Facts(number, subject.names, flat, colour, ground, own))
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "images.npy", np.stack(images))
    (out / "facts.json").write_text(json.dumps([asdict(fact) for fact in facts]), encoding="utf-8")
    return len(images)


def read_facts(folder: Path) -> list[Facts]:
    """Return the facts of every picture in `folder`."""
    entries = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return [Facts(**{**entry, "names": tuple(entry["names"])}) for entry in entries]


def plan(
    subject: Subject, own: str, flat: bool, held_out: Collection[tuple[str, str, str]], rng: random.Random
) -> list[tuple[str, str]]:
    """Return (colour, ground) for each picture to make of one drawing: plain ones first, '' where it is left as it is."""
    taken = {word for label, kind, word in held_out if label == subject.label and kind == "colour"}
    away = {word for label, kind, word in held_out if label == subject.label and kind == "ground"}
    named_for_colour = subject.label.split()[0] in PAINTS and subject.label.split()[-1] in ("heart", "circle", "square")
    colours = [] if named_for_colour else [word for word in PAINTS if word != own and word not in taken]
    # A subject on a ground of its own colour cannot be seen.
    grounds = [word for word in GROUNDS if (not own or own not in word.split()) and word not in away]
    variants = [("", "")] * (2 if flat else 5)
    variants += [(word, "") for word in rng.sample(colours, min(len(colours), 1 if flat else 3))]
    variants += [("", word) for word in rng.sample(grounds, 2 if flat else 4)]
    for _ in range(0 if flat or not colours else 3):
        colour = rng.choice(colours)
        variants.append((colour, rng.choice([g for g in grounds if colour not in g.split()])))
    return variants


def _pale(rng: random.Random) -> tuple[float, float, float]:
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.06, 0.28), rng.uniform(0.86, 1.0))
    return r * 255, g * 255, b * 255
