"""What all samplers share: how noisy latents are at a level, and what a model's output says of the picture in them.

This room holds numbers and no state. Coefficients are Python floats computed in float64; latents are float32.

>>> [level] = levels_of((1.0,))
>>> round(level.signal, 4), round(level.noise, 4), log_snr(level)
(0.7071, 0.7071, 0.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from appliance.trust.description import PredictionType

Latents = NDArray[np.float32]           # (images, channels, height, width)
StepNoise = Callable[[int], Latents]    # the unit Gaussian noise of an evaluation: NoiseStream.step


@dataclass(frozen=True)
class Level:
    """How much of the latents, as the model sees them, is signal and how much noise: √ᾱ and √(1-ᾱ)."""

    signal: float
    noise: float


CLEAN = Level(1.0, 0.0)


def levels_of(sigmas: tuple[float, ...]) -> tuple[Level, ...]:
    """Return the level of each noise-to-signal ratio σ."""
    return tuple(Level(1 / math.sqrt(s * s + 1), s / math.sqrt(s * s + 1)) for s in sigmas)


def level_at(signal: float) -> Level:
    """Return the level at ᾱ."""
    return Level(math.sqrt(signal), math.sqrt(1 - signal))


def log_snr(level: Level) -> float:
    """Return λ = log(signal/noise), the half logarithm of the signal-to-noise ratio."""
    return math.log(level.signal / level.noise)


def denoised_of(prediction: PredictionType, latents: Latents, output: Latents, at: Level) -> Latents:
    """Return x0 from latents as the model sees them and what it said of them."""
    if prediction == "epsilon":
        clean: Latents = latents - output * at.noise
        return clean / at.signal
    if prediction == "v_prediction":
        return latents * at.signal - output * at.noise
    return output


def mixed(clean: Latents, noise: Latents, at: Level) -> Latents:
    """Return clean latents with unit Gaussian noise in them, as the model sees them at a level."""
    return clean * at.signal + noise * at.noise
