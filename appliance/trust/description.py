"""What a bundle says of itself: `model.json`, parsed strictly.

This room holds no weights and trusts nothing: by the time `ModelDescription.parse` sees the bytes, their digest has been
compared with the signed manifest, and even then every field is checked, because a signature says who made a file and not
that the file makes sense. The provisioning side writes `model.json` through `to_json`, so that there is one schema.

Rules, in order:

1. Exact types; unknown, missing and duplicate keys are refused.
2. Every path is one of the bundle's own: relative, forward slashes, no `.` or `..` part.
3. Numbers are finite and within the limits named beside each field.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Literal, cast

from appliance.errors import VerificationRefused

PredictionType = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]

PLACE = "model.json"
FORMAT = 1
LARGEST = 1 << 20   # bytes of model.json
INPAINTING = "sd1_inpainting"     # its UNet also reads a mask and the latents of what the mask leaves
FAMILIES = ("sd1", INPAINTING)


@dataclass(frozen=True)
class TextEncoding:
    """How prompts become token ids: lengths in tokens, ids as in `tokenizer.json`."""

    max_length: int        # tokens in one chunk, start and end included: 77 for CLIP
    hidden_size: int       # width of the context that the UNet attends to
    start_id: int
    end_id: int
    pad_id: int


@dataclass(frozen=True)
class LatentSpace:
    """Latents are float32 (batch, channels, height / downscale, width / downscale)."""

    channels: int
    downscale: int
    scaling_factor: float
    # rgb = latents · preview[:channels] + preview[channels], in [-1, 1]: a linear fit for step-by-step previews.
    preview: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process that the model was trained on, under the names of DDPM (arXiv:2006.11239)."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: BetaSchedule
    prediction_type: PredictionType
    timestep_spacing: TimestepSpacing
    steps_offset: int
    set_alpha_to_one: bool
    rescale_zero_snr: bool


@dataclass(frozen=True)
class Sizes:
    """Which pictures a bundle may be asked for, in pixels; `shapes` are what the page offers, by name."""

    native: tuple[int, int]     # width, height
    multiple: int
    smallest: int
    largest: int
    largest_area: int           # width × height
    largest_batch: int


@dataclass(frozen=True)
class Defaults:
    """The settings at which this model is at its best."""

    sampler: str
    steps: int
    guidance_scale: float
    negative_prompt: str


@dataclass(frozen=True)
class Vocabulary:
    """What a small model knows; None in a description means that it was trained on open captions."""

    subjects: tuple[str, ...]
    words: tuple[str, ...]      # every word, lowercase, that means something to it: names, colours, styles
    examples: tuple[str, ...]   # prompts to try


@dataclass(frozen=True)
class Components:
    """Paths of the ONNX graphs and the tokenizer, relative to the bundle."""

    tokenizer: str
    text_encoder: str
    unet: str
    vae_decoder: str
    vae_encoder: str | None


@dataclass(frozen=True)
class ModelDescription:
    """One model, as it describes itself."""

    name: str
    family: str
    components: Components
    text: TextEncoding
    latents: LatentSpace
    schedule: NoiseSchedule
    sizes: Sizes
    defaults: Defaults
    variant: str                # id of the precision variant, e.g. "fp32"
    licence: str                # SPDX id, or "LicenseRef-…"; the text is the bundle's LICENSE
    source: str
    notes: str                  # what the model says of itself, shown on its page
    vocabulary: Vocabulary | None

    @classmethod
    def parse(cls, untrusted_bytes: bytes) -> ModelDescription:
        """Return the description, or raise `VerificationRefused` naming the field."""
        if len(untrusted_bytes) > LARGEST:
            raise _refused("", "too large", expected=f"at most {LARGEST} bytes", got=f"{len(untrusted_bytes)}")
        try:
            document = json.loads(untrusted_bytes.decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:   # not UTF-8, not JSON, a number of 5,000 digits
            raise _refused("", f"not valid JSON ({type(error).__name__})") from None
        top = _Object("", document)
        if top.integer("format", 1, 1_000_000) != FORMAT:
            raise _refused("format", "unknown version", expected=str(FORMAT))
        family = top.text("family", 32)
        if family not in FAMILIES:
            raise _refused("family", "unknown family", expected=" or ".join(FAMILIES), got=ascii(family))
        latents = _latents(top.member("latents"))
        components = _components(top.member("components"))
        if family == INPAINTING and components.vae_encoder is None:
            raise _refused("components.vae_encoder", "missing, and a model that paints into pictures must read them")
        description = cls(
            name=top.text("name", 120),
            family=family,
            components=components,
            text=_text(top.member("text")),
            latents=latents,
            schedule=_schedule(top.member("schedule")),
            sizes=_sizes(top.member("sizes"), latents.downscale),
            defaults=_defaults(top.member("defaults")),
            variant=top.text("variant", 64),
            licence=top.text("licence", 120),
            source=top.text("source", 4000),
            notes=top.text("notes", 4000, empty=True),
            vocabulary=_vocabulary(top.optional_member("vocabulary")),
        )
        top.end()
        return description

    def to_json(self) -> bytes:
        """Return the bytes of `model.json`: UTF-8, sorted keys, a final newline; `parse` reads them back equal."""
        document = {"format": FORMAT, **asdict(self)}
        return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _refused(field: str, fact: str, *, expected: str | None = None, got: str | None = None) -> VerificationRefused:
    return VerificationRefused(
        "model_json", f"{PLACE} {field}".rstrip(), fact, expected=expected, got=got,
        hint="the bundle was made by another version of darkroom-provision, or is damaged: export it again",
    )


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _refused(ascii(twice[:64]), "duplicate key")
    return dict(pairs)


class _Object:
    """One JSON object being taken apart; what was not asked for is refused by `end`."""

    def __init__(self, place: str, value: object) -> None:
        if not isinstance(value, dict):
            raise _refused(place, "not an object")
        self.place = place
        self.rest: dict[str, object] = dict(value)

    def _take(self, key: str) -> tuple[str, object]:
        place = f"{self.place}.{key}".lstrip(".")
        if key not in self.rest:
            raise _refused(place, "missing")
        return place, self.rest.pop(key)

    def member(self, key: str) -> _Object:
        return _Object(*self._take(key))

    def optional_member(self, key: str) -> _Object | None:
        place, value = self._take(key)
        return None if value is None else _Object(place, value)

    def integer(self, key: str, low: int, high: int) -> int:
        place, value = self._take(key)
        if type(value) is not int or not low <= value <= high:
            raise _refused(place, "out of range", expected=f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        place, value = self._take(key)
        return _number(place, value, low, high)

    def boolean(self, key: str) -> bool:
        place, value = self._take(key)
        if not isinstance(value, bool):
            raise _refused(place, "not true or false")
        return value

    def text(self, key: str, longest: int, *, empty: bool = False) -> str:
        place, value = self._take(key)
        return _text_value(place, value, longest, empty=empty)

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        place, value = self._take(key)
        if not isinstance(value, str) or value not in choices:
            raise _refused(place, "unknown value", expected=" or ".join(choices))
        return value

    def items(self, key: str, most: int) -> list[tuple[str, object]]:
        place, value = self._take(key)
        if not isinstance(value, list) or len(value) > most:
            raise _refused(place, "not a list", expected=f"at most {most} entries")
        return [(f"{place}[{i}]", entry) for i, entry in enumerate(value)]

    def texts(self, key: str, most: int, longest: int) -> tuple[str, ...]:
        return tuple(_text_value(place, value, longest) for place, value in self.items(key, most))

    def path(self, key: str) -> str:
        place, value = self._take(key)
        return _path(place, value)

    def end(self) -> None:
        if self.rest:
            raise _refused(self.place, "unknown key", got=ascii(sorted(self.rest)[0][:64]))


def _number(place: str, value: object, low: float, high: float) -> float:
    # bool is an int in Python, and a JSON 1 is as good as 1.0.
    # NaN compares false; asking whether an enormous int is finite would overflow.
    if type(value) not in (int, float) or not low <= cast(float, value) <= high:
        raise _refused(place, "out of range", expected=f"a number from {low} to {high}")
    return float(cast(float, value))


def _text_value(place: str, value: object, longest: int, *, empty: bool = False) -> str:
    if not isinstance(value, str) or len(value) > longest or not (value or empty):
        raise _refused(place, "not a text", expected=f"{0 if empty else 1} to {longest} characters")
    # Cc: control, Cs: half a surrogate pair, which JSON can say and UTF-8 cannot.
    if any(unicodedata.category(c) in ("Cc", "Cs") and c != "\n" for c in value):
        raise _refused(place, "holds control characters")
    return value


def _path(place: str, value: object) -> str:
    text = _text_value(place, value, 255)
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or str(path) != text or "\\" in text or "\0" in text or text == ".":
        raise _refused(place, "not a path inside the bundle", got=ascii(text))
    return text


def _components(o: _Object) -> Components:
    encoder = o.rest.get("vae_encoder", ...)
    if encoder is None:
        o.rest.pop("vae_encoder")
    parts = Components(
        tokenizer=o.path("tokenizer"),
        text_encoder=o.path("text_encoder"),
        unet=o.path("unet"),
        vae_decoder=o.path("vae_decoder"),
        vae_encoder=None if encoder is None else o.path("vae_encoder"),
    )
    o.end()
    return parts


def _text(o: _Object) -> TextEncoding:
    text = TextEncoding(
        max_length=o.integer("max_length", 8, 512),
        hidden_size=o.integer("hidden_size", 8, 8192),
        start_id=o.integer("start_id", 0, 1_000_000),
        end_id=o.integer("end_id", 0, 1_000_000),
        pad_id=o.integer("pad_id", 0, 1_000_000),
    )
    o.end()
    return text


def _latents(o: _Object) -> LatentSpace:
    channels = o.integer("channels", 1, 64)
    rows = []
    for place, row in o.items("preview", 65):
        if not isinstance(row, list) or len(row) != 3:
            raise _refused(place, "not three numbers")
        r, g, b = (_number(place, value, -1000, 1000) for value in row)
        rows.append((r, g, b))
    if len(rows) != channels + 1:
        raise _refused("latents.preview", "wrong length", expected=str(channels + 1), got=str(len(rows)))
    space = LatentSpace(
        channels=channels,
        downscale=o.integer("downscale", 1, 64),
        scaling_factor=o.number("scaling_factor", 1e-4, 1e4),
        preview=tuple(rows),
    )
    o.end()
    return space


def _schedule(o: _Object) -> NoiseSchedule:
    schedule = NoiseSchedule(
        num_train_timesteps=o.integer("num_train_timesteps", 10, 10_000),
        beta_start=o.number("beta_start", 1e-6, 0.999),
        beta_end=o.number("beta_end", 1e-6, 0.999),
        beta_schedule=cast(BetaSchedule, o.choice("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))),
        prediction_type=cast(PredictionType, o.choice("prediction_type", ("epsilon", "v_prediction", "sample"))),
        timestep_spacing=cast(TimestepSpacing, o.choice("timestep_spacing", ("leading", "linspace", "trailing"))),
        steps_offset=o.integer("steps_offset", 0, 1),
        set_alpha_to_one=o.boolean("set_alpha_to_one"),
        rescale_zero_snr=o.boolean("rescale_zero_snr"),
    )
    o.end()
    return schedule


def _sizes(o: _Object, downscale: int) -> Sizes:
    native = [_side(place, value) for place, value in o.items("native", 2)]
    if len(native) != 2:
        raise _refused("sizes.native", "not two numbers")
    sizes = Sizes(
        native=(native[0], native[1]),
        multiple=o.integer("multiple", 8, 512),
        smallest=o.integer("smallest", 8, 8192),
        largest=o.integer("largest", 8, 8192),
        largest_area=o.integer("largest_area", 64, 1 << 26),
        largest_batch=o.integer("largest_batch", 1, 64),
    )
    o.end()
    if sizes.multiple % downscale:
        raise _refused("sizes.multiple", "not a multiple of the latents' downscale", expected=f"k · {downscale}")
    return sizes


def _side(place: str, value: object) -> int:
    if type(value) is not int or not 8 <= value <= 8192:
        raise _refused(place, "out of range", expected="a whole number from 8 to 8192")
    return value


def _defaults(o: _Object) -> Defaults:
    defaults = Defaults(
        sampler=o.text("sampler", 64),
        steps=o.integer("steps", 1, 150),
        guidance_scale=o.number("guidance_scale", 0, 50),
        negative_prompt=o.text("negative_prompt", 2000, empty=True),
    )
    o.end()
    return defaults


def _vocabulary(o: _Object | None) -> Vocabulary | None:
    if o is None:
        return None
    vocabulary = Vocabulary(
        subjects=o.texts("subjects", 20_000, 120),
        words=o.texts("words", 50_000, 64),
        examples=o.texts("examples", 100, 200),
    )
    o.end()
    return vocabulary
