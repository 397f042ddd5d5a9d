"""The built-in model's autoencoder: 192×192 pictures to 4×24×24 latents and back (Rombach et al., arXiv:2112.10752).

Trained on crops first, sixteen times the pictures a second, and on whole pictures at the end. Two choices are made for a
training of minutes: latents carry a fixed noise instead of a learned posterior, whose variance early in training shuts
channels down for good, and the loss is L1 on pixels and on their differences, since a perceptual network would have to be
downloaded. At the end mean and covariance of the latents are folded into the two 1×1 convolutions around them, so that
latents have mean 0 and unit variance under Stable Diffusion's own scaling factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from provisioning.demo.checkpoint import Checkpoint, Report
from provisioning.demo.pictures import SIZE

SCALING_FACTOR: Final = 0.18215     # Stable Diffusion 1.x
_NOISE: Final = 0.05                # of the latents' deviation: the UNet's latents are never exact either
_PULL: Final = 1e-4                 # weight of the latents' mean square


@dataclass(frozen=True)
class Phase:
    """So many steps on crops of one size, in pixels."""

    crop: int
    batch: int
    steps: int


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Everything that decides the result."""

    channels: tuple[int, ...] = (8, 16, 48, 96)
    groups: int = 4
    learning_rate: float = 1.5e-3
    phases: tuple[Phase, ...] = (Phase(64, 16, 2000), Phase(96, 8, 600), Phase(SIZE, 3, 500))
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_of(self, step: int) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


def train(pictures: NDArray[np.uint8], recipe: AutoencoderRecipe, checkpoint: Checkpoint, report: Report) -> Any:
    """Train from nothing, or from the checkpoint, and return the AutoencoderKL; `pictures` is (n, 192, 192, 3) uint8."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    vae = _build(recipe)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    step = checkpoint.restore(vae=vae, optimizer=optimizer, rng=rng)
    vae.train()
    total = recipe.steps
    while step < total:
        phase = recipe.phase_of(step)
        progress = step / total
        rate = recipe.learning_rate * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = to_tensor(_crops(pictures, phase, rng))
        latents = vae.encode(x).latent_dist.mean * SCALING_FACTOR
        noisy = latents + _NOISE * min(1.0, 4 * progress) * torch.randn_like(latents)
        y = vae.decode(noisy / SCALING_FACTOR).sample
        pixels = (y - x).abs().mean()
        loss = pixels + 0.5 * _edges(y - x) + _PULL * latents.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        report("autoencoder", step, total, float(pixels.detach()))
        checkpoint.save_if_due(step, vae=vae, optimizer=optimizer, rng=rng)
    fold(vae, pictures[np.sort(np.random.default_rng(9).permutation(len(pictures))[:192])])
    return vae.eval()


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """Return (n, 3, height, width) float32 in [-1, 1] of (n, height, width, 3) uint8."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def psnr(vae: Any, pictures: NDArray[np.uint8]) -> float:
    """Return the mean peak signal-to-noise ratio of pictures sent through the autoencoder, in dB."""
    ratios = []
    for part in np.array_split(pictures, max(1, len(pictures) // 4)):
        x = to_tensor(part)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        ratios += (-10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()).tolist()
    return float(np.mean(ratios))


@torch.no_grad()
def encode(vae: Any, pictures: NDArray[np.uint8], report: Report) -> Tensor:
    """Return the scaled latents of all pictures: (n, 4, 24, 24) float16."""
    parts = []
    for start in range(0, len(pictures), 16):
        parts.append((vae.encode(to_tensor(pictures[start : start + 16])).latent_dist.mean * SCALING_FACTOR).half())
        report("latents", min(start + 16, len(pictures)), len(pictures), 0.0)
    return torch.cat(parts)


@torch.no_grad()
def fold(vae: Any, pictures: NDArray[np.uint8]) -> list[float]:
    """Whiten the latents by the two 1×1 convolutions around them; return their variances before that, one an axis."""
    parts = np.array_split(pictures, max(1, len(pictures) // 8))
    means = torch.cat([vae.encode(to_tensor(part)).latent_dist.mean for part in parts])
    flat = means.permute(0, 2, 3, 1).reshape(-1, means.shape[1])
    mean, covariance = flat.mean(0), torch.cov(flat.T)
    # A floor under the variances, so that a channel that carries little is not blown up to a channel of noise.
    covariance = covariance + torch.eye(len(mean)) * 0.05 * covariance.diagonal().mean()
    variances, axes = torch.linalg.eigh(covariance)
    whiten = axes @ torch.diag(variances**-0.5) @ axes.T / SCALING_FACTOR
    n = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight[:n, :, 0, 0].clone(), into.bias[:n].clone()
    into.weight[:n, :, 0, 0], into.bias[:n] = whiten @ weight, whiten @ (bias - mean)
    into.weight[n:], into.bias[n:] = 0, -12         # log-variance of the posterior: as good as none
    back = out.weight[:, :, 0, 0].clone()
    out.weight[:, :, 0, 0], out.bias[:] = back @ torch.linalg.inv(whiten), out.bias + back @ mean
    return [float(v) for v in variances]


def _build(recipe: AutoencoderRecipe) -> Any:
    levels = len(recipe.channels)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=recipe.channels, layers_per_block=1,
        latent_channels=4, norm_num_groups=recipe.groups, sample_size=SIZE, scaling_factor=SCALING_FACTOR,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.mul_(0.2)                 # residual branches start small: the plain path learns first
        vae.quant_conv.weight[:4] *= 5 / SCALING_FACTOR / 3     # latents of about unit deviation from the start
    return vae.to(memory_format=torch.channels_last)


def _crops(pictures: NDArray[np.uint8], phase: Phase, rng: np.random.Generator) -> NDArray[np.uint8]:
    crops = []
    for number in rng.integers(0, len(pictures), phase.batch):
        picture = pictures[number]
        # Of two places mostly the busier one: half of every picture is a plain ground.
        places = [np.round(rng.random((2, 2)).mean(-1) * (SIZE - phase.crop) / 8).astype(int) * 8 for _ in range(2)]
        cut = [picture[y : y + phase.crop, x : x + phase.crop] for y, x in places]
        crop = max(cut, key=lambda c: float(c[::4, ::4].std())) if rng.random() < 0.75 else cut[0]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(crops)


def _edges(difference: Tensor) -> Tensor:
    across = difference[..., 1:] - difference[..., :-1]
    down = difference[..., 1:, :] - difference[..., :-1, :]
    return across.abs().mean() + down.abs().mean()


def save(vae: Any, folder: Path) -> None:
    """Write the autoencoder as a diffusers folder."""
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder)
