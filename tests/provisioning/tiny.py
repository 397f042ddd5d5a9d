"""A Stable Diffusion 1.x model with random weights, small enough to make, export and run in seconds, in diffusers' layout.

`python -m tests.provisioning.tiny FOLDER` makes one with seed 0 and exports it to the bundle FOLDER: that is how
`tests/vectors/tiny/`, which the appliance's tests run without torch, was made.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from provisioning.export import export

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = (("r", "e"), ("re", "d</w>"), ("a", "p"), ("ap", "p"), ("l", "e</w>"), ("app", "le</w>"), ("b", "l"), ("u", "e</w>"),
          ("bl", "ue</w>"))


def tokenizer_files(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` of a CLIP tokenizer that knows three words and every letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in MERGES), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END, "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }))


def make(
    folder: Path, *, prediction: str = "epsilon", seed: int = 0, dtype: torch.dtype = torch.float16, inpainting: bool = False
) -> Path:
    """Write a model in diffusers' layout to the new `folder` and return it. Latents are (4, 8, 8), pictures 64 by 64."""
    torch.manual_seed(seed)
    tokenizer_files(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=9 if inpainting else 4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4,
    )
    vae = AutoencoderKL(
        sample_size=64, block_out_channels=(8, 8, 8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )
    # Untrained networks answer near zero; with a wider last layer what they say of a prompt shows in the picture.
    with torch.no_grad():
        unet.conv_out.weight.mul_(8)
        vae.decoder.conv_out.weight.mul_(8)
        # Fresh norms are all ones and zeros: alike they would be stored once, and exchanged they would not be missed.
        for network in (text_encoder, unet, vae):
            for weight in network.parameters():
                if weight.ndim == 1:
                    weight.add_(torch.randn_like(weight), alpha=0.1)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )
    for name, part in (("text_encoder", text_encoder), ("unet", unet), ("vae", vae)):
        part.to(dtype).save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline", "requires_safety_checker": False, "safety_checker": [None, None],
        "feature_extractor": [None, None], "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def reference(folder: Path, kind: str = "StableDiffusionPipeline") -> Any:
    """Return diffusers' own pipeline of that kind for the model at `folder`, in float32."""
    import diffusers  # slow, and nothing else here needs it

    parts = {
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False),
        "vae": AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    pipeline = getattr(diffusers, kind)(
        **parts, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(out: Path) -> None:
    """Make one and export it."""
    with tempfile.TemporaryDirectory() as folder:
        licence = Path(folder) / "LICENSE"
        licence.write_text("CC0 1.0: random numbers, free of any right.\n")
        about = Path(folder) / "about.json"
        about.write_text(json.dumps({
            "name": "Tiny", "licence": "CC0-1.0", "notes": "Random weights: its pictures mean nothing.",
            "defaults": {"sampler": "dpmpp_2m", "steps": 4, "guidance_scale": 5.0, "negative_prompt": ""},
            "vocabulary": {"subjects": ["apple"], "words": ["red", "blue", "apple"], "examples": ["a red apple"]},
        }))
        export(make(Path(folder) / "tiny"), out, licence=licence, source_text="random numbers, seed 0", about=about)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
