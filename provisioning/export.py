"""From a diffusers folder to a bundle that can be signed: four ONNX graphs, a tokenizer, and what there is to say of them.

The steps, numbered alike in the code:

 1. The destination does not exist, and there is room for it.
 2. The source is a model of a family that the engine drives, in safetensors (`sources.py`), with a licence, and what there is
    to say of it makes a description.
 3. The graphs, one component in memory at a time, in a folder beside the destination that nobody reads.
 4. The tokenizer, `LICENSE`, `model.json` and `mlbom.cdx.json`.
 5. The folder gets its name. Whatever fails before leaves nothing behind.

The graphs are the bare networks. Scaling the latents is the engine's, by `model.json`, so that a preview decoder or a model
converted elsewhere fits in; so is the choice of a latent out of the encoder's moments:

    text_encoder   ids (batch, tokens) int64                       → context (batch, tokens, width), after the final norm
    unet           latents, timestep (1,), context                 → prediction, as `schedule.prediction_type` says
    vae_decoder    latents / scaling_factor                        → image (batch, 3, height · 8, width · 8) in [-1, 1]
    vae_encoder    image                                           → moments (batch, 2 · channels, …): means, log variances

The `latents` of an inpainting model's unet are 2 · channels + 1: latents, mask, latents of the picture without what is masked.

Any multiple of eight pixels is drawn: the UNet is traced at a size at which it hands the sizes of its way down to its way up.

    export(Path("stable-diffusion-v1-5"), Path("sd15"), licence=Path("LICENSE.md"), source_text="https://…, revision …")
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from appliance.errors import BadRequest, VerificationRefused
from appliance.trust.description import FORMAT, PLACE, ModelDescription
from provisioning import bom, preview
from provisioning.onnx_graphs import LARGEST_INLINE, Port, write_graph
from provisioning.sources import Source, versions

Report = Callable[[str, int, int], None]    # what is being done, how many parts are done, how many there are

TOKENIZER: Final = "tokenizer/tokenizer.json"
GRAPHS: Final = {part: f"{part}/model.onnx" for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder")}
LICENCE: Final = "LICENSE"
LARGEST_LICENCE: Final = 1 << 20            # bytes
ROOM: Final = 64 << 20                      # bytes to be left free on the disk
PARTS: Final = 6

# What `about` may say in place of what follows from the source, in `model.json`'s own terms.
_ABOUT: Final = frozenset({"name", "licence", "notes", "vocabulary", "defaults", "sizes"})


def export(
    source: Path,
    out: Path,
    *,
    licence: Path,
    source_text: str,
    name: str | None = None,
    about: Path | None = None,
    report: Report = lambda _what, _done, _of: None,
    largest_inline: int = LARGEST_INLINE,
) -> None:
    """Write the bundle of the diffusers model at `source` to the new folder `out`, unsigned.

    `about` is a JSON object of the fields in `_ABOUT`; `source_text` says where the model came from; graphs with more than
    `largest_inline` bytes of weights keep them in a file beside them. Raises `BadRequest`.
    """
    # 1. The destination.
    if os.path.lexists(out):
        raise BadRequest("out_exists", f"{out.name}: exists, and a bundle is never written over", hint="choose another name")
    # 2. The source.
    licence_bytes = _licence(licence)
    said = _about(about)
    if not source_text.strip():
        raise BadRequest("source_text", "the source is not named",
                         hint="--source takes an address, a name, a revision: whatever finds it again")
    origin = Source.at(source)
    known_as = name or str(said.get("name") or source.resolve().name)
    latents = _latents(origin)
    _description(origin, said, latents, source_text, known_as)
    try:
        free = shutil.disk_usage(out.parent).free
        # Weights of 16 bits that are bfloat16 take twice their room as float32.
        needed = 2 * origin.weight_bytes + ROOM
        if free < needed:
            raise BadRequest("disk_full", f"{needed >> 20:,} MiB may be needed for the bundle, and {free >> 20:,} MiB are free",
                             hint="make room, or write to another disk")
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as workshop:
            unfinished = Path(workshop) / "bundle"
            unfinished.mkdir()
            # 3. The graphs.
            latents["preview"] = _write_graphs(origin, unfinished, report, largest_inline)
            # 4. The rest.
            report("description", PARTS - 1, PARTS)
            description = _description(origin, said, latents, source_text, known_as)
            _write(unfinished / TOKENIZER, origin.tokenizer_json)
            _write(unfinished / LICENCE, licence_bytes)
            _write(unfinished / PLACE, description.to_json())
            _write(unfinished / bom.NAME, bom.bill_of_materials(description, _digests(unfinished), versions()))
            # 5. The name.
            unfinished.rename(out)
    except OSError as error:
        raise BadRequest("out_unwritable", f"{out.name}: cannot be written ({(error.strerror or 'unknown').lower()})",
                         hint="nothing was left behind") from None
    report("done", PARTS, PARTS)


class _TextEncoder(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: torch.Tensor) -> Any:
        return self.network(input_ids=ids, return_dict=False)[0]


class _UNet(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> Any:
        return self.network(latents, timestep, encoder_hidden_states=context, return_dict=False)[0]


class _Decoder(torch.nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        # The two parts and not the whole: the encoder's weights have no business in this graph.
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents: torch.Tensor) -> Any:
        return self.decoder(self.post_quant_conv(latents) if self.post_quant_conv is not None else latents)


class _Encoder(torch.nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, image: torch.Tensor) -> Any:
        moments = self.encoder(image)
        return self.quant_conv(moments) if self.quant_conv is not None else moments


def _write_graphs(origin: Source, out: Path, report: Report, largest_inline: int) -> preview.Matrix:
    """Write the four graphs and return the map that previews are made with."""
    for path in GRAPHS.values():
        (out / path).parent.mkdir()
    channels, down, width = int(origin.vae["latent_channels"]), origin.downscale, origin.text.hidden_size

    report("text encoder", 0, PARTS)
    ids = torch.full((2, origin.text.max_length), origin.text.end_id)
    write_graph(
        _TextEncoder(origin.load_text_encoder()), (Port("ids", ("batch", "tokens"), ids),),
        Port("context", ("batch", "tokens", width)), out / GRAPHS["text_encoder"], largest_inline=largest_inline,
    )
    report("denoising network", 1, PARTS)
    deepest = 2 ** (len(origin.unet["block_out_channels"]) - 1)
    read = int(origin.unet["in_channels"])
    latents = torch.zeros(2, read, 2 * deepest + 1, 3 * deepest + 1)     # odd: see the module's last paragraph
    write_graph(
        _UNet(origin.load_unet()),
        (
            Port("latents", ("batch", read, "height", "width"), latents),
            Port("timestep", (1,), torch.zeros(1)),
            Port("context", ("batch", "tokens", width), torch.zeros(2, origin.text.max_length, width)),
        ),
        Port("prediction", ("batch", channels, "height", "width")), out / GRAPHS["unet"], largest_inline=largest_inline,
    )
    report("picture decoder", 2, PARTS)
    vae = origin.load_vae()
    write_graph(
        _Decoder(vae), (Port("latents", ("batch", channels, "height", "width"), torch.zeros(2, channels, 4, 5)),),
        Port("image", ("batch", 3, "picture_height", "picture_width")), out / GRAPHS["vae_decoder"],
        largest_inline=largest_inline,
    )
    report("picture encoder", 3, PARTS)
    write_graph(
        _Encoder(vae),
        (Port("image", ("batch", 3, "picture_height", "picture_width"), torch.zeros(2, 3, 4 * down, 5 * down)),),
        Port("moments", ("batch", 2 * channels, "height", "width")), out / GRAPHS["vae_encoder"], largest_inline=largest_inline,
    )
    report("preview", 4, PARTS)
    return preview.fit(vae, down, float(origin.vae["scaling_factor"]))


def _latents(origin: Source) -> dict[str, Any]:
    """Return what `model.json` says of the latents before any network was loaded: all but the preview's real map."""
    channels = int(origin.vae["latent_channels"])
    return {"channels": channels, "downscale": origin.downscale, "scaling_factor": float(origin.vae["scaling_factor"]),
            "preview": ((0.0, 0.0, 0.0),) * (channels + 1)}


def _description(
    origin: Source, said: Mapping[str, Any], latents: Mapping[str, Any], source_text: str, name: str
) -> ModelDescription:
    side = int(origin.unet["sample_size"]) * origin.downscale
    document = {
        "format": FORMAT,
        "family": origin.family,
        "components": {"tokenizer": TOKENIZER, **GRAPHS},
        "text": vars(origin.text),
        "latents": latents,
        "schedule": vars(origin.schedule),
        # Attention at the finest level takes memory with the square of the area: half as much again is what a machine that
        # holds the model can be expected to have.
        "sizes": {"native": [side, side], "multiple": origin.downscale, "smallest": min(side, 8 * origin.downscale),
                  "largest": 2 * side, "largest_area": side * side * 3 // 2, "largest_batch": 8},
        "defaults": {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 7.5, "negative_prompt": ""},
        "variant": "fp32",
        "licence": "LicenseRef-LICENSE",
        "source": source_text,
        "notes": "",
        "vocabulary": None,
        **said,
        "name": name,
    }
    try:
        return ModelDescription.parse(json.dumps(document, allow_nan=False).encode())
    except (VerificationRefused, ValueError, TypeError) as error:
        raise BadRequest("description", f"the model cannot be described: {error}",
                         hint="the field comes from the source's configuration or from the description given") from None


def _about(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest("about", f"{path.name}: cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(said, dict) or not said.keys() <= _ABOUT:
        raise BadRequest("about", f"{path.name}: not a JSON object of known fields", hint=", ".join(sorted(_ABOUT)))
    return said


def _licence(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if content.decode("utf-8").strip() and len(content) <= LARGEST_LICENCE:
            return content
        fact = f"empty or larger than {LARGEST_LICENCE} bytes"
    except (OSError, UnicodeDecodeError) as error:
        fact = f"cannot be read as text ({type(error).__name__})"
    raise BadRequest("licence", f"{path.name}: {fact}", hint="give the file with the text of the model's licence")


def _digests(bundle: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.relative_to(bundle).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
