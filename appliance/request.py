"""A request for pictures, parsed: the one way in which a form, a command line or a program reaches the engine.

`GenerationRequest.parse` is the validator; whoever holds a `GenerationRequest` need not check it again. Unknown fields,
wrong types and values beyond the model's limits raise `BadRequest` with a sentence that says what to do, and nothing
else happens: no file, no job, no changed state.

The prompt is content. It is left out of `repr`, and no message here quotes it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar, get_args

from appliance.errors import BadRequest
from appliance.trust.description import ModelDescription

SamplerName = Literal["ddim", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"]
SAMPLERS: Final[tuple[SamplerName, ...]] = get_args(SamplerName)
SigmaSpacing = Literal["model", "karras", "exponential"]
SPACINGS: Final[tuple[SigmaSpacing, ...]] = get_args(SigmaSpacing)
UNSPACED: Final[tuple[SamplerName, ...]] = ("ddim", "lcm")      # they go by timesteps, and know no spacing of sigmas

LONGEST_PROMPT: Final = 4_000       # characters
MOST_STEPS: Final = 150
MOST_LCM_STEPS: Final = 50          # latent consistency models are distilled at so many timesteps and know no others
MOST_GUIDANCE: Final = 30.0
LARGEST_SEED: Final = 2**63 - 1     # what a signed 64-bit field of a script or a database can carry
FIELDS: Final = frozenset(
    {"prompt", "negative_prompt", "steps", "sampler", "spacing", "guidance_scale", "seed", "count", "width", "height"}
)


Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class GenerationRequest:
    """What to draw and how; `seed` is the first picture's, the next ones count up from it."""

    prompt: str = field(repr=False)
    negative_prompt: str = field(repr=False)
    steps: int
    sampler: SamplerName
    spacing: SigmaSpacing
    guidance_scale: float
    seed: int
    count: int
    width: int      # pixels
    height: int     # pixels

    @classmethod
    def parse(
        cls, untrusted: Mapping[str, object], description: ModelDescription, *, fresh_seed: int
    ) -> GenerationRequest:
        """Return the request that `untrusted` describes, for this model.

        Values are JSON values or the strings of a form; an absent or empty field takes the model's default, an absent
        seed takes `fresh_seed`. Raises `BadRequest`.
        """
        unknown = sorted(set(untrusted) - FIELDS)
        if unknown:
            raise BadRequest(
                "unknown_field", f"there is no field {unknown[0][:40]!r}", hint=f"the fields are {', '.join(sorted(FIELDS))}"
            )
        best, sizes = description.defaults, description.sizes
        prompt = _prompt(untrusted.get("prompt"), "prompt")
        if not prompt:
            raise BadRequest("prompt_empty", "the prompt is empty", hint="write what should appear, for example: a red apple")
        negative = _prompt(untrusted.get("negative_prompt"), "negative prompt")
        steps = _integer(untrusted, "steps", best.steps, 1, MOST_STEPS)
        sampler = _choice(untrusted, "sampler", best.sampler, SAMPLERS)
        spacing = _choice(untrusted, "spacing", "model", SPACINGS)
        if sampler in UNSPACED and spacing != "model":
            raise no_such_spacing(sampler, spacing)
        if sampler == "lcm" and steps > MOST_LCM_STEPS:
            raise too_many_lcm_steps()
        guidance = _number(untrusted, "guidance_scale", best.guidance_scale, 0.0, MOST_GUIDANCE)
        count = _integer(untrusted, "count", 1, 1, sizes.largest_batch)
        seed = _integer(untrusted, "seed", fresh_seed, 0, LARGEST_SEED - count + 1)
        width = _side(untrusted, "width", sizes.native[0], description)
        height = _side(untrusted, "height", sizes.native[1], description)
        if width * height > sizes.largest_area:
            raise BadRequest(
                "size",
                f"{width} by {height} is more than this model draws, which is {sizes.largest_area} pixels in all",
                hint=f"try {sizes.native[0]} by {sizes.native[1]}",
            )
        return cls(
            prompt=prompt,
            negative_prompt=negative or best.negative_prompt,
            steps=steps,
            sampler=sampler,
            spacing=spacing,
            guidance_scale=guidance,
            seed=seed,
            count=count,
            width=width,
            height=height,
        )


def no_such_spacing(sampler: SamplerName, spacing: SigmaSpacing) -> BadRequest:
    """Return the refusal of a spacing that the sampler does not know."""
    return BadRequest(
        "spacing", f"{sampler} knows no {spacing} spacing", hint="choose the model's spacing, or euler or dpmpp_2m"
    )


def too_many_lcm_steps() -> BadRequest:
    """Return the refusal of more steps than a latent consistency model knows."""
    return BadRequest("steps", f"lcm takes at most {MOST_LCM_STEPS} steps", hint="4 to 8 are what it was made for")


def _prompt(value: object, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRequest("prompt_type", f"the {name} must be text")
    if len(value) > LONGEST_PROMPT:
        raise BadRequest(
            "prompt_long",
            f"the {name} has {len(value):,} characters, and at most {LONGEST_PROMPT:,} are read",
            hint="shorten it: only the first few hundred words can change a picture",
        )
    text = value.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ").strip()
    # Cc: control, Cs: lone surrogates (bytes that were no UTF-8), Co/Cn: private and unassigned.
    if any(unicodedata.category(c) in ("Cc", "Cs") and c != "\n" for c in text):
        raise BadRequest(
            "prompt_characters", f"the {name} holds control characters or is not valid UTF-8", hint="type it anew as plain text"
        )
    return text if any(c.isprintable() and not c.isspace() for c in text) else ""


def _given(untrusted: Mapping[str, object], key: str) -> object | None:
    value = untrusted.get(key)
    return None if isinstance(value, str) and not value.strip() else value


def _integer(untrusted: Mapping[str, object], key: str, default: int, low: int, high: int) -> int:
    value = _given(untrusted, key)
    if value is None:
        return default
    # isascii before isdigit: Python reads "²" as a digit and "١" as a number, and no form means them.
    if isinstance(value, str) and (digits := value.strip()).isascii() and digits.removeprefix("-").isdigit() and len(digits) < 20:
        value = int(digits)
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(key, f"{_spoken(key)} must be a whole number from {low} to {high}")
    return value


def _number(untrusted: Mapping[str, object], key: str, default: float, low: float, high: float) -> float:
    value = _given(untrusted, key)
    if value is None:
        return default
    if isinstance(value, str):
        try:
            value = float(value.strip().replace(",", "."))
        except ValueError:
            value = math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:   # NaN compares false
        raise BadRequest(key, f"{_spoken(key)} must be a number from {low:g} to {high:g}")
    return float(value)


def _choice(untrusted: Mapping[str, object], key: str, default: str, choices: tuple[Name, ...]) -> Name:
    value = _given(untrusted, key)
    for choice in choices:
        if choice == (default if value is None else value):
            return choice
    raise BadRequest(key, f"there is no {_spoken(key)} of that name", hint=f"choose one of {', '.join(choices)}")


def _side(untrusted: Mapping[str, object], key: str, default: int, description: ModelDescription) -> int:
    sizes = description.sizes
    if sizes.smallest == sizes.largest and _given(untrusted, key) not in (None, default, str(default)):
        raise BadRequest(key, f"{_spoken(key)} must be {default}: this model draws one size only", hint="leave the size out")
    side = _integer(untrusted, key, default, sizes.smallest, sizes.largest)
    if side % sizes.multiple:
        near = max(sizes.smallest, side // sizes.multiple * sizes.multiple)
        raise BadRequest(key, f"{_spoken(key)} must be a multiple of {sizes.multiple}", hint=f"try {near}")
    return side


def _spoken(key: str) -> str:
    return key.replace("_", " ")
