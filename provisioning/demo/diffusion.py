"""The text encoder and the UNet, trained together on cached latents to predict v (Salimans & Ho, arXiv:2202.00512).

Stable Diffusion 1.5's own noise schedule and layout, so that everything that runs one runs the other, only small. What
makes it learn in an hour: every picture of a batch has another caption; noisy timesteps come more often than clean ones,
because there the words decide the picture; one caption in ten is empty, for classifier-free guidance (arXiv:2207.12598);
Muon; and an average of the weights, which is what is kept.

The learning rate warms up, stays, and falls linearly at the end. Until it falls, a training does not know how long it
will be: it can be made longer or shorter by changing one number, and goes on from its checkpoint.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from provisioning.demo.captions import Facts, caption
from provisioning.demo.checkpoint import Checkpoint, Report
from provisioning.demo.muon import Muon
from provisioning.demo.tokenizer import LENGTH


@dataclass(frozen=True)
class DiffusionRecipe:
    """Everything that decides the result."""

    channels: tuple[int, ...] = (40, 96, 160, 224)
    attention: tuple[bool, ...] = (False, False, True, True)
    groups: int = 8
    text_width: int = 256
    text_layers: int = 2
    batch: int = 64
    learning_rate: float = 2e-3
    steps: int = 7000
    decay_steps: int = 520
    average: float = 0.995
    tilt: float = 0.4           # t = 1000 · q^tilt for uniform q: below 1, noisy steps come more often
    unconditional: float = 0.1
    # How often each kind of picture is drawn: plain, painted, on a ground, both; and the flat drawing's share of each.
    kinds: tuple[float, float, float, float] = (0.46, 0.16, 0.24, 0.14)
    flat: float = 0.15
    seed: int = 0


def train(
    latents: Tensor,
    facts: Sequence[Facts],
    tokenizer: Any,
    recipe: DiffusionRecipe,
    checkpoint: Checkpoint,
    report: Report,
    snapshot: Any = None,
) -> tuple[Any, Any]:
    """Train from nothing, or from the checkpoint; return the averaged UNet and text encoder.

    `latents` is (n, 4, height, width) float16, in the order of `facts`. `snapshot`, where given, is called with the two
    averaged models each time a checkpoint is written.
    """
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    unet, text = _build(recipe, tokenizer, latents.shape[-1])
    live = [*unet.parameters(), *text.parameters()]
    averages = [parameter.detach().clone() for parameter in live]
    muon, adam = _optimizers(recipe, unet, text)
    parts = {"unet": unet, "text": text, "averages": averages, "muon": muon, "adam": adam, "rng": rng}
    with torch.no_grad():
        step = checkpoint.restore(**parts)
    weights = _how_often(facts, recipe)
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    while step < recipe.steps:
        rate = _rate(step, recipe)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["times"]
        chosen = torch.multinomial(weights, recipe.batch)
        captions = ["" if rng.random() < recipe.unconditional else caption(facts[number], rng) for number in chosen.tolist()]
        ids = torch.tensor(tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True).input_ids)
        # Stratified timesteps: each batch covers them all.
        q = (torch.randperm(recipe.batch) + torch.rand(recipe.batch)) / recipe.batch
        t = (1000 * q**recipe.tilt).long().clamp(0, 999)
        signal, noise_level = (x[:, None, None, None] for x in (alphas[t].sqrt(), (1 - alphas[t]).sqrt()))
        clean = latents[chosen].float()
        noise = torch.randn_like(clean)
        noisy = (signal * clean + noise_level * noise).contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, t, text(ids).last_hidden_state, return_dict=False)[0]
        loss = (predicted - (signal * noise - noise_level * clean)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(live, 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            # A short memory at first: the start is not worth remembering.
            torch._foreach_lerp_(averages, live, 1 - min(recipe.average, (1 + step) / (10 + step)))
        step += 1
        report("diffusion", step, recipe.steps, float(loss.detach()))
        if checkpoint.save_if_due(step, **parts) and snapshot is not None:
            snapshot(*_averaged(recipe, tokenizer, latents.shape[-1], averages))
    return _averaged(recipe, tokenizer, latents.shape[-1], averages)


def save_pipeline(
    vae: Any, unet: Any, text: Any, tokenizer: Any, tokenizer_files: Path, folder: Path
) -> None:
    """Write a complete diffusers folder in half precision, file for file as Stable Diffusion 1.5's is laid out."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # transformers 5 leaves out the prefix that Stable Diffusion's text encoders have.
    weights = folder / "text_encoder" / "model.safetensors"
    state = {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    for file in tokenizer_files.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())


def _build(recipe: DiffusionRecipe, tokenizer: Any, side: int) -> tuple[Any, Any]:
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=4, out_channels=4, block_out_channels=recipe.channels, layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in recipe.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(recipe.attention)),
        cross_attention_dim=recipe.text_width, attention_head_dim=4, norm_num_groups=recipe.groups,
    )
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.text_width, intermediate_size=3 * recipe.text_width,
        num_hidden_layers=recipe.text_layers, num_attention_heads=4, max_position_embeddings=LENGTH,
        projection_dim=recipe.text_width, hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
                parameter.zero_()       # every block begins as the identity
        for name, parameter in text.named_parameters():
            if "token_embedding" in name:
                parameter.normal_(0, 0.3)
            elif "position_embedding" in name:
                parameter.normal_(0, 0.05)
    return unet.to(memory_format=torch.channels_last).train(), text.train()


def _optimizers(recipe: DiffusionRecipe, unet: Any, text: Any) -> tuple[Muon, torch.optim.AdamW]:
    matrices, others, tables = [], [], []
    for module in (unet, text):
        for name, parameter in module.named_parameters():
            if "token_embedding" in name or "position_embedding" in name:
                tables.append(parameter)
            elif parameter.ndim >= 2 and "conv_in" not in name and "conv_out" not in name:
                matrices.append(parameter)
            else:
                others.append(parameter)
    muon = Muon(matrices, recipe.learning_rate)
    muon.param_groups[0]["times"] = 1.0
    # A word is seen in few batches: its row moves faster than the rest.
    groups = [{"params": others, "times": 1.0}, {"params": tables, "times": 2.0}]
    return muon, torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)


def _rate(step: int, recipe: DiffusionRecipe) -> float:
    left = (recipe.steps - step) / max(1, recipe.decay_steps)
    return recipe.learning_rate * min(1.0, (step + 1) / 40) * max(0.01, min(1.0, left))


def _how_often(facts: Sequence[Facts], recipe: DiffusionRecipe) -> Tensor:
    """Return each picture's weight: the kinds' shares split among a subject's pictures of that kind."""
    kinds = [(fact.subject, fact.flat, bool(fact.colour) + 2 * bool(fact.ground)) for fact in facts]
    counts = Counter(kinds)
    return torch.tensor([
        recipe.kinds[kind] * (recipe.flat if flat else 1 - recipe.flat) / counts[subject, flat, kind]
        for subject, flat, kind in kinds
    ])


@torch.no_grad()
def _averaged(recipe: DiffusionRecipe, tokenizer: Any, side: int, averages: list[Tensor]) -> tuple[Any, Any]:
    state = torch.get_rng_state()       # building draws random weights: the training must not notice
    unet, text = _build(recipe, tokenizer, side)
    torch.set_rng_state(state)
    for parameter, average in zip([*unet.parameters(), *text.parameters()], averages, strict=True):
        parameter.copy_(average)
    return unet.to(memory_format=torch.contiguous_format).eval(), text.eval()
