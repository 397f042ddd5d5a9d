"""The evaluation's judge: a small convolutional network that names the subject of a picture.

It is independent of the model that it judges: no text encoder, no latents, none of the training pictures, only the drawings
themselves, put on grounds, turned, repainted and blurred in its own way. It learns three drawings of each subject (Fluent
3D, Fluent flat, Noto) and is tested on what it never saw:

- paints that were held out: one (drawing, colour word) in five is never shown in training;
- the Twemoji drawing of each subject, another artist's: does it know the thing, or only these three pictures of it?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from provisioning.demo.checkpoint import Checkpoint, Report
from provisioning.demo.pictures import load_drawing, repaint
from provisioning.demo.vocabulary import GROUNDS, PAINTS

SIDE: Final = 64
_FULL: Final = SIDE * 7 // 8
_WORDS: Final = ("", *PAINTS)
_HELD_OUT: Final = 5        # one paint in so many is held out


@dataclass(frozen=True)
class ClassifierRecipe:
    """Everything that decides the result."""

    widths: tuple[int, ...] = (16, 48, 96, 160, 256)
    batch: int = 64
    steps: int = 3000
    learning_rate: float = 3e-3
    seed: int = 3


class Classifier(nn.Module):
    """Logits over subjects for pictures: (n, 3, 64, 64) in [-1, 1] to (n, subjects)."""

    def __init__(self, subjects: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in zip(widths, (2, 2, 2, 1, 2), strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, subjects)

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.features(pictures)
        logits: Tensor = self.head(functional.dropout(features.mean((2, 3)), 0.1, self.training))
        return logits


@dataclass(frozen=True)
class Gallery:
    """Drawings ready to be put on grounds: one row for each drawing, one column for each paint ('' first)."""

    drawings: NDArray[np.uint8]     # (drawings, paints, 64, 64, 4), premultiplied
    subjects: NDArray[np.int64]     # (drawings,)

    @classmethod
    def of(cls, paths: Sequence[tuple[int, Path]]) -> Gallery:
        """Load (subject, path) pairs; a drawing that a set does not have is left out."""
        rows, subjects = [], []
        for subject, path in paths:
            rgba = load_drawing(path)
            if rgba is None:
                continue
            small = _small(rgba)
            painted = [repaint(small, word) if word else small for word in _WORDS]
            rows.append(np.stack([_premultiplied(picture) for picture in painted]))
            subjects.append(subject)
        return cls(np.stack(rows), np.array(subjects))

    def held_out(self) -> NDArray[np.bool_]:
        """Return (drawings, paints): which are kept from training. The drawing as it is never is."""
        row, column = np.indices(self.drawings.shape[:2])
        kept: NDArray[np.bool_] = (column > 0) & ((row * 7 + column * 3) % _HELD_OUT == 0)
        return kept


def train(gallery: Gallery, subjects: int, recipe: ClassifierRecipe, checkpoint: Checkpoint, report: Report) -> Classifier:
    """Train from nothing, or from the checkpoint."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = Classifier(subjects, recipe.widths)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    step = checkpoint.restore(model=model, optimizer=optimizer, rng=rng)
    allowed = np.argwhere(~gallery.held_out())
    # As it is, a drawing counts as much as all its paints together.
    plain, painted = allowed[allowed[:, 1] == 0], allowed[allowed[:, 1] > 0]
    model.train()
    while step < recipe.steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 100) * max(0.01, 1 - step / recipe.steps)
        half = recipe.batch // 2
        chosen = np.concatenate([plain[rng.integers(0, len(plain), half)], painted[rng.integers(0, len(painted), half)]])
        pictures = scenes(gallery, chosen, rng)
        loss = functional.cross_entropy(model(pictures), torch.from_numpy(gallery.subjects[chosen[:, 0]]), label_smoothing=0.1)
        loss.backward()     # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        report("classifier", step, recipe.steps, float(loss.detach()))
        checkpoint.save_if_due(step, model=model, optimizer=optimizer, rng=rng)
    checkpoint.save(step, model=model, optimizer=optimizer, rng=rng)
    return model.eval()


def scenes(gallery: Gallery, chosen: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
    """Return (n, 3, 64, 64) in [-1, 1] for (drawing, paint) rows: turned, moved, scaled, mirrored, on a ground, blurred."""
    n = len(chosen)
    sprites = torch.from_numpy(gallery.drawings[chosen[:, 0], chosen[:, 1]]).permute(0, 3, 1, 2).float() / 255
    angle, scale = rng.uniform(-0.14, 0.14, n), rng.uniform(0.72, 1.04, n)
    mirror = rng.choice((-1.0, 1.0), n)
    # Where an output pixel is taken from: the inverse of turning and scaling.
    across, down = np.cos(angle) / scale, np.sin(angle) / scale
    room = np.clip(1 - 0.875 * scale, 0, 1)
    theta = np.stack([
        np.stack([across * mirror, -down * mirror, rng.uniform(-1, 1, n) * room], -1),
        np.stack([down, across, rng.uniform(-1, 1, n) * room], -1),
    ], 1)
    places = functional.affine_grid(torch.from_numpy(theta).float(), [n, 4, SIDE, SIDE], align_corners=False)
    sprites = functional.grid_sample(sprites, places, align_corners=False)
    grounds = torch.from_numpy(np.stack([_ground(rng) for _ in range(n)])).float()[:, :, None, None]
    pictures = sprites[:, :3] + grounds * (1 - sprites[:, 3:])
    blurred = functional.interpolate(functional.avg_pool2d(pictures, 2), size=SIDE, mode="bilinear", align_corners=False)
    # What a small autoencoder and a few denoising steps do to a picture: less edge, a little speckle, another contrast.
    mix = torch.from_numpy(rng.uniform(0, 1, (n, 1, 1, 1)) ** 2).float()
    pictures = pictures + mix * (blurred - pictures)
    contrast = torch.from_numpy(rng.uniform(0.85, 1.15, (n, 1, 1, 1))).float()
    speckle = torch.from_numpy(rng.standard_normal((n, 3, SIDE, SIDE)).astype(np.float32) * 0.02)
    return ((pictures - 0.5) * contrast + 0.5 + speckle).clamp(0, 1) * 2 - 1


def test(model: Classifier, gallery: Gallery, chosen: NDArray[np.int64], *, seed: int) -> float:
    """Return the share of (drawing, paint) rows, each in one new scene, that are named right."""
    rng = np.random.default_rng(seed)
    right = 0
    for part in np.array_split(chosen, max(1, len(chosen) // 128)):
        with torch.inference_mode():
            named = model(scenes(gallery, part, rng)).argmax(1).numpy()
        right += int((named == gallery.subjects[part[:, 0]]).sum())
    return right / len(chosen)


def name(model: Classifier, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (n, subjects) probabilities for (n, height, width, 3) uint8 pictures of any size."""
    answers = []
    for part in np.array_split(pictures, max(1, len(pictures) // 64)):
        x = torch.from_numpy(np.array(part)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            answers.append(model(functional.interpolate(x, size=(SIDE, SIDE), mode="area")).softmax(1).numpy())
    return np.concatenate(answers)


def _small(rgba: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the drawing in the middle of a clear square of 64 pixels, its longest side 56."""
    image = Image.fromarray(np.round(rgba * 255).astype(np.uint8), "RGBA")
    factor = _FULL / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    small = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    square = np.zeros((SIDE, SIDE, 4), np.float32)
    y, x = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    square[y : y + size[1], x : x + size[0]] = np.asarray(small, np.float32) / 255
    return square


def _premultiplied(rgba: NDArray[np.float32]) -> NDArray[np.uint8]:
    alpha = rgba[..., 3:]
    whole = np.round(np.clip(np.concatenate([rgba[..., :3] * alpha, alpha], -1), 0, 1) * 255)
    pixels: NDArray[np.uint8] = whole.astype(np.uint8)
    return pixels


def _ground(rng: np.random.Generator) -> NDArray[np.float64]:
    draw = rng.random()
    if draw < 0.35:
        return np.ones(3)
    if draw < 0.6:
        return rng.uniform(0.7, 1, 3)
    if draw < 0.9:
        near = np.array(list(GROUNDS.values())[rng.integers(len(GROUNDS))]) + rng.uniform(-20, 20, 3)
        return np.clip(near / 255, 0, 1)
    return rng.random(3)
