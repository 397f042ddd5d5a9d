"""A Stable Diffusion 1.x model in diffusers' folder layout, as a source of weights and facts.

    model_index.json  tokenizer/  text_encoder/  unet/  vae/  scheduler/

Nothing is fetched and no code of the source's is run. What is refused, in order:

1. What is no such folder: a single file, a missing component, another family; pickled weights, since reading them runs them.
2. Structures that this engine does not drive: another number of latent channels (inpainting), embeddings besides text and
   time (SDXL, LCM, image prompts), linear projections (SD 2).
3. Schedules that it does not sample (`schedule_of`).
4. Weights that are missing: diffusers and transformers would put random ones in their place, with a warning.

    source = Source.at(Path("stable-diffusion-v1-5"))
    unet = source.load_unet()       # a torch module, float32
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from appliance.errors import BadRequest
from appliance.trust.description import INPAINTING, NoiseSchedule, TextEncoding

COMPONENTS: Final = {
    "text_encoder": ("CLIPTextModel", "model"),
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
}
PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
LARGEST_JSON: Final = 8 << 20       # bytes

# What a scheduler's configuration must say, where it says anything, for the engine's samplers to be right.
_HONOURED: Final[Mapping[str, tuple[object, ...]]] = {
    "trained_betas": (None,), "thresholding": (False,), "clip_sample": (False,), "timestep_type": ("discrete",),
    "use_flow_sigmas": (False, None), "use_beta_sigmas": (False, None), "use_exponential_sigmas": (False, None),
    "use_lu_lambdas": (False, None), "use_dynamic_shifting": (False,), "flow_shift": (1.0, None), "sigma_min": (None,),
    "sigma_max": (None,), "final_sigmas_type": ("zero",), "interpolation_type": ("linear",),
    "lambda_min_clipped": (-float("inf"),),
}
_SCHEDULERS: Final = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
# LMS cannot be made without scipy. What it knows of a schedule it has from the same place as Euler, defaults included.
_READ_AS: Final = {"LMSDiscreteScheduler": "EulerDiscreteScheduler"}
_OTHER_FAMILIES: Final = {
    "StableDiffusionXLPipeline": "SDXL", "LatentConsistencyModelPipeline": "LCM", "StableDiffusion3Pipeline": "SD 3",
    "FluxPipeline": "Flux",
}
_INPAINTING_PIPELINE: Final = "StableDiffusionInpaintPipeline"
_PIPELINES: Final = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", _INPAINTING_PIPELINE)


@dataclass(frozen=True)
class Source:
    """One model folder whose configuration was read and found usable; weights are loaded one component at a time."""

    folder: Path
    family: str                         # one of description.FAMILIES
    unet: Mapping[str, Any]             # the component's config.json
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    schedule: NoiseSchedule
    text: TextEncoding
    tokenizer_json: bytes
    weight_bytes: int                   # of the three components, on disk

    @classmethod
    def at(cls, folder: Path) -> Source:
        """Return the source at `folder`. Raises `BadRequest`."""
        index = _index(folder)
        for component, (expected, _) in COMPONENTS.items():
            found = index.get(component)
            if not isinstance(found, list) or found[-1:] != [expected]:
                _refuse("family", f"model_index.json: {component} is not a {expected}", hint=_ONLY_SD1)
        configs = {component: _json(folder / component / "config.json") for component in COMPONENTS}
        weight_bytes = sum(_weights(folder / component, stem)[1] for component, (_, stem) in COMPONENTS.items())
        family = INPAINTING if index["_class_name"] == _INPAINTING_PIPELINE else "sd1"
        _check_structure(family, configs["unet"], configs["vae"], configs["text_encoder"])
        tokenizer, tokenizer_json = _tokenizer(folder / "tokenizer")
        text = TextEncoding(
            max_length=configs["text_encoder"]["max_position_embeddings"], hidden_size=configs["text_encoder"]["hidden_size"],
            start_id=tokenizer.bos_token_id, end_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        )
        schedule = schedule_of(_json(folder / "scheduler" / "scheduler_config.json"))
        return cls(
            folder=folder, family=family, unet=configs["unet"], vae=configs["vae"], text_encoder=configs["text_encoder"],
            schedule=schedule, text=text, tokenizer_json=tokenizer_json, weight_bytes=weight_bytes,
        )

    @property
    def downscale(self) -> int:
        """Return how many pixels a latent is wide."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    def load_text_encoder(self) -> Any:
        """Return the `CLIPTextModel`. Raises `BadRequest`."""
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            return self._load(CLIPTextModel, "text_encoder", dtype=torch.float32)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()

    def load_unet(self) -> Any:
        """Return the `UNet2DConditionModel`. Raises `BadRequest`."""
        return self._load(UNet2DConditionModel, "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False)

    def load_vae(self) -> Any:
        """Return the `AutoencoderKL`. Raises `BadRequest`."""
        return self._load(AutoencoderKL, "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)

    def _load(self, kind: Any, component: str, **options: Any) -> Any:
        folder = self.folder / component
        variant, _ = _weights(folder, COMPONENTS[component][1])
        try:
            network, found = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, variant=variant, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            _refuse("component_unreadable", f"{component}: cannot be loaded ({type(error).__name__})",
                    hint="the file is damaged or does not belong to its config.json: get the folder again")
        if found["missing_keys"] or found.get("mismatched_keys"):
            missing = sorted(found["missing_keys"]) or ["one of another shape"]
            _refuse("component_incomplete", f"{component}: {len(missing)} weights are missing, such as {missing[0]}",
                    hint="the file is damaged or does not belong to its config.json: get the folder again")
        return network.eval().requires_grad_(False)


def schedule_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """Return what a diffusers scheduler configuration says of the noise that the model was trained on.

    What it leaves out is filled in with the defaults of the class that it names. Raises `BadRequest` for everything that the
    engine's samplers would not honour.
    """
    kind = config.get("_class_name")
    if kind not in _SCHEDULERS:
        _refuse("scheduler", f"scheduler: {str(kind)[:60]} is not a scheduler of an SD 1.x model",
                hint=f"this engine reads the settings of {', '.join(_SCHEDULERS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # diffusers 0.42 warns of its own use of numpy 2
            full = dict(getattr(diffusers, _READ_AS.get(kind, kind)).from_config(dict(config)).config)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        _refuse("scheduler", f"scheduler: its configuration is not valid ({type(error).__name__})")
    for key, honoured in _HONOURED.items():
        if key in full and full[key] not in honoured:
            _refuse("scheduler", f"scheduler: {key} is {str(full[key])[:40]}, which this engine does not honour",
                    hint="set it to its default in scheduler_config.json if the pictures stay right without it")
    return NoiseSchedule(
        num_train_timesteps=full["num_train_timesteps"],
        beta_start=full["beta_start"],
        beta_end=full["beta_end"],
        beta_schedule=full["beta_schedule"],
        prediction_type=full["prediction_type"],
        timestep_spacing=full["timestep_spacing"],
        steps_offset=full.get("steps_offset", 0),
        # Only DDIM and PNDM know it; DDIM made from any other scheduler's configuration takes its own default.
        set_alpha_to_one=full.get("set_alpha_to_one", True),
        rescale_zero_snr=full.get("rescale_betas_zero_snr", False),
    )


_ONLY_SD1: Final = "this version exports models of the Stable Diffusion 1.x family"


def _refuse(reason: str, fact: str, *, hint: str | None = None) -> NoReturn:
    raise BadRequest(reason, fact, hint=hint)


def _index(folder: Path) -> Mapping[str, Any]:
    if folder.is_file():
        if folder.suffix in PICKLES:
            _refuse_pickle(folder.name)
        _refuse("source", "the source is a single file, and a folder in diffusers' layout is expected",
                hint="diffusers' convert_original_stable_diffusion_to_diffusers.py makes one from it")
    if not (folder / "model_index.json").is_file():
        _refuse("source", "the source is not a folder with a model_index.json in it", hint="give a model in diffusers' layout")
    index = _json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if kind in _OTHER_FAMILIES:
        _refuse("family", f"model_index.json: a model of the family {_OTHER_FAMILIES[kind]}", hint=_ONLY_SD1)
    if kind not in _PIPELINES:
        _refuse("family", f"model_index.json: {kind[:60]} is not a Stable Diffusion pipeline", hint=_ONLY_SD1)
    return index


def _json(path: Path) -> dict[str, Any]:
    place = f"{path.parent.name}/{path.name}" if path.name != "model_index.json" else path.name
    try:
        if path.stat().st_size > LARGEST_JSON:
            _refuse("config", f"{place}: larger than {LARGEST_JSON} bytes")
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        _refuse("component_missing", f"{place}: missing", hint="the copy of the model is incomplete: get the folder again")
    except (OSError, ValueError, RecursionError) as error:
        _refuse("config", f"{place}: cannot be read as JSON ({type(error).__name__})")
    if not isinstance(document, dict):
        _refuse("config", f"{place}: not a JSON object")
    return document


def _weights(folder: Path, stem: str) -> tuple[str | None, int]:
    """Return the variant of the weights that the folder has (None for the plain one), and their bytes on disk."""
    for variant in (None, "fp16"):
        infix = f".{variant}" if variant else ""
        whole = folder / f"{stem}{infix}.safetensors"
        parts = sorted(folder.glob(f"{stem}{infix}-*-of-*.safetensors") if variant is None
                       else folder.glob(f"{stem}*{variant}*-of-*.safetensors"))
        files = [whole] if whole.is_file() else parts
        if files:
            return variant, sum(file.stat().st_size for file in files)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES) if folder.is_dir() else []
    if pickled:
        _refuse_pickle(f"{folder.name}/{pickled[0]}")
    _refuse("component_missing", f"{folder.name}/{stem}.safetensors: missing",
            hint="the copy of the model is incomplete: get the folder again")


def _refuse_pickle(place: str) -> NoReturn:
    _refuse(
        "pickle", f"{place}: pickled weights, and reading a pickle runs whatever program is in it",
        hint="get the model as .safetensors, or convert it on a machine that holds nothing and is thrown away afterwards",
    )


def _check_structure(
    family: str, unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any]
) -> None:
    channels = vae.get("latent_channels")
    if type(channels) is not int or unet.get("out_channels") != channels:
        _refuse("family", f"unet: {unet.get('out_channels')} channels out, where the latents have {channels}", hint=_ONLY_SD1)
    # An inpainting model also reads a mask and the latents of the picture around it.
    expected = 2 * channels + 1 if family == INPAINTING else channels
    if unet.get("in_channels") != expected:
        _refuse("family", f"unet: {unet.get('in_channels')} channels in, where a model of this kind reads {expected}; "
                f"model_index.json says what kind it is, and models with 9 channels are of {_INPAINTING_PIPELINE}",
                hint=_ONLY_SD1)
    for key in ("class_embed_type", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "time_cond_proj_dim",
                "num_class_embeds"):
        if unet.get(key) is not None:
            _refuse("family", f"unet: {key} is set, which SD 1.x models have not (SDXL, LCM and image prompts do)",
                    hint=_ONLY_SD1)
    if unet.get("use_linear_projection"):
        _refuse("family", "unet: use_linear_projection is set, as in SD 2 and SDXL", hint=_ONLY_SD1)
    if vae.get("shift_factor") or vae.get("latents_mean") or vae.get("latents_std"):
        _refuse("family", "vae: its latents are shifted, which those of SD 1.x are not", hint=_ONLY_SD1)
    if unet.get("cross_attention_dim") != text_encoder.get("hidden_size"):
        _refuse("config", f"unet attends to {unet.get('cross_attention_dim')} numbers a token and text_encoder gives "
                f"{text_encoder.get('hidden_size')}: they do not belong together")


def _tokenizer(folder: Path) -> tuple[Any, bytes]:
    if not folder.is_dir():
        _refuse("component_missing", "tokenizer: missing", hint="the copy of the model is incomplete: get the folder again")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        _refuse("component_unreadable", f"tokenizer: cannot be loaded ({type(error).__name__})")
    ready = folder / "tokenizer.json"
    # Older folders have vocabulary and merges alone; transformers puts CLIP's own machinery around them.
    content = ready.read_bytes() if ready.is_file() else tokenizer.backend_tokenizer.to_str().encode()
    return tokenizer, content


def versions() -> dict[str, str]:
    """Return the versions of the libraries that read a source, for the bill of materials."""
    return {"diffusers": diffusers.__version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
