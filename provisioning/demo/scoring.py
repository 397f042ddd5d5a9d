"""What a picture shows, read from its pixels: the colour of its ground, the colour of its subject, how far two are apart.

The rules, written down before the model that they judge was trained to its end:

1. The *ground* is the median colour of a frame 5 pixels wide: no training picture has its subject there. Its word is the
   nearest of the twelve grounds in CIELAB (CIE 1976 colour difference).
2. The *subject* is every pixel farther than 20 units of colour difference from the ground. Each gets the colour word of
   `pictures.hue_word`, or none; the subject's word is the one that most of its pixels have.
3. Two pictures differ by the mean absolute difference of their pixels, of 255, and by how little the shapes of their
   subjects overlap: a seed that changed the tint behind a subject and nothing else would show in the first and not in
   the second.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from provisioning.demo.pictures import hue_word
from provisioning.demo.vocabulary import GROUNDS

_FRAME: Final = 5
_APART: Final = 20.0
# sRGB to CIE XYZ under D65 (IEC 61966-2-1), divided by the white point.
_TO_XYZ: Final = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE: Final = np.array([0.95047, 1.0, 1.08883])

Picture = NDArray[np.uint8]


def to_lab(rgb: NDArray[np.uint8] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return CIELAB of sRGB in 0…255, (…, 3) to (…, 3)."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def ground_colour(picture: Picture) -> NDArray[np.float64]:
    """Return the median sRGB of the picture's frame, in 0…255."""
    inside = np.zeros(picture.shape[:2], bool)
    inside[_FRAME:-_FRAME, _FRAME:-_FRAME] = True
    median: NDArray[np.float64] = np.median(picture[~inside], axis=0)
    return median


def ground_word(picture: Picture) -> str:
    """Return the ground that the frame's colour is nearest to."""
    words = list(GROUNDS)
    known = to_lab(np.array([GROUNDS[word] for word in words], np.float64))
    return words[int(np.square(known - to_lab(ground_colour(picture))).sum(-1).argmin())]


def subject_mask(picture: Picture) -> NDArray[np.bool_]:
    """Return which pixels are not ground: (height, width)."""
    away: NDArray[np.bool_] = np.linalg.norm(to_lab(picture) - to_lab(ground_colour(picture)), axis=-1) > _APART
    return away


def subject_word(picture: Picture) -> str:
    """Return the colour word that most of the subject's pixels have, or '' where none has one."""
    words = hue_word((picture[subject_mask(picture)] / 255).astype(np.float32))
    found, counts = np.unique(words[words != "none"], return_counts=True)
    return str(found[counts.argmax()]) if len(found) else ""


def difference(one: Picture, other: Picture) -> float:
    """Return the mean absolute difference of two pictures' pixels, of 255."""
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


def overlap(one: Picture, other: Picture) -> float:
    """Return the overlap of the two subjects' shapes: intersection over union, 1 where they are the same."""
    a, b = subject_mask(one), subject_mask(other)
    return float((a & b).sum() / max(1, (a | b).sum()))


def nearest(picture: Picture, thumbnails: NDArray[np.float32]) -> tuple[int, float]:
    """Return which of many thumbnails is nearest to the picture's by root mean square, and that distance, of 255."""
    distances = np.sqrt(np.square(thumbnails - thumbnail(picture[None])).mean((1, 2, 3)))
    best = int(distances.argmin())
    return best, float(distances[best])


def thumbnail(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (n, 32, 32, 3) block means of (n, 192, 192, 3) pictures."""
    n, height, width, channels = pictures.shape
    blocks = pictures.reshape(n, 32, height // 32, 32, width // 32, channels)
    means: NDArray[np.float32] = blocks.mean((2, 4), dtype=np.float32)
    return means
