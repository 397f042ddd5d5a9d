"""Gaussian noise: one seed, one picture, wherever and beside whatever it is drawn.

Every image has its own counter-based generator, Philox 4×64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011). Its 128-bit key is the image's seed in the low half and the number of the draw in the high half, so a draw is
a pure function of seed, draw and shape: it depends neither on the image's place in a batch nor on what was drawn before.

Rules, in order:

1. Draw 0 is the initial noise; draw i + 1 is what an ancestral sampler adds in step i.
2. Values are drawn in float64 and rounded to float32, so that a last-bit difference in a processor's `log` is rounded away.
3. Nothing is read from the operating system, and no generator is shared.

>>> NoiseStream(seeds=(7, 8), shape=(4, 8, 8)).initial().shape
(2, 4, 8, 8)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def initial_noise(seed: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return unit Gaussian noise (channels, height, width) for the image of this seed."""
    return _draw(seed, 0, shape)


@dataclass(frozen=True)
class NoiseStream:
    """The noise of a batch of images, one seed each; `shape` is (channels, height, width)."""

    seeds: tuple[int, ...]
    shape: tuple[int, int, int]

    def initial(self) -> NDArray[np.float32]:
        """Return the initial noise, (images, channels, height, width)."""
        return np.stack([_draw(seed, 0, self.shape) for seed in self.seeds])

    def step(self, index: int) -> NDArray[np.float32]:
        """Return the noise that an ancestral sampler adds in step `index`, (images, channels, height, width)."""
        return np.stack([_draw(seed, index + 1, self.shape) for seed in self.seeds])


def _draw(seed: int, draw: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.Philox(key=seed | draw << 64))
    return generator.standard_normal(shape).astype(np.float32)
