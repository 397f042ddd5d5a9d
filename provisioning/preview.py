"""How latents look without a decoder: a linear map to RGB, fitted by least squares.

The pictures to fit on are made here and encoded with the model's own encoder: flat rectangles of every colour, which is what
a linear map of one latent can tell apart. No picture of anybody's is needed, and a fixed seed gives the same map each time.

>>> sample_pictures(2, 64).shape
(2, 3, 64, 64)
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

PICTURES: Final = 16
SIDE: Final = 32            # latents
RECTANGLES: Final = 40      # in a picture
SEED: Final = 1_839         # the year of the first photographs that were fixed


Matrix = tuple[tuple[float, float, float], ...]


def sample_pictures(count: int, side: int) -> NDArray[np.float32]:
    """Return pictures of rectangles of any colour, (count, 3, side, side) in [-1, 1]; white and black are frequent."""
    random = np.random.default_rng(SEED)
    pictures = np.empty((count, 3, side, side), np.float32)
    for picture in pictures:
        picture[:] = _colour(random)
        for _ in range(RECTANGLES):
            top, left = random.integers(0, side, 2)
            height, width = random.integers(side // 8, side // 2, 2)
            picture[:, top:top + height, left:left + width] = _colour(random)
    return pictures


def _colour(random: np.random.Generator) -> NDArray[np.float32]:
    # A map that is linear cannot be right everywhere: a tint shows most on white, and grounds are often white.
    plain = random.uniform()
    if plain < 0.25:
        return np.full((3, 1, 1), 1 if plain < 0.18 else -1, np.float32)
    return random.uniform(-1, 1, (3, 1, 1)).astype(np.float32)


def fit(vae: Any, downscale: int, scaling_factor: float) -> Matrix:
    """Return the matrix of `LatentSpace.preview` for a diffusers `AutoencoderKL`: a row a channel, and the constant."""
    pictures = sample_pictures(PICTURES, SIDE * downscale)
    with torch.no_grad():
        # One picture at a time: the encoder's activations are what takes memory.
        latents = np.concatenate([vae.encode(torch.from_numpy(p[np.newaxis])).latent_dist.mean.numpy() for p in pictures])
    latents = latents * scaling_factor
    count, channels, side, _ = latents.shape
    colours = pictures.reshape(count, 3, side, downscale, side, downscale).mean((3, 5))
    rows = latents.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
    targets = colours.transpose(0, 2, 3, 1).reshape(-1, 3).astype(np.float64)
    solution, *_ = np.linalg.lstsq(np.hstack([rows, np.ones((len(rows), 1))]), targets, rcond=None)
    # Six digits: what is beyond differs from one processor to the next, and model.json is signed.
    return tuple((round(float(r), 6), round(float(g), 6), round(float(b), 6)) for r, g, b in solution)
