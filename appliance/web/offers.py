"""What the page offers in place of numbers: care (Draft, Standard, Fine), shape (Square, Tall, Wide), and times in words.

Everything follows from the model's own description. A choice that the model cannot draw is not offered, and where one
choice is left there is nothing to choose. `translate` turns the words of a form into the numbers of a request.

>>> seconds_in_words(6.2)
'about 6 seconds'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from appliance.errors import BadRequest
from appliance.request import FIELDS, MOST_STEPS, GenerationRequest
from appliance.trust.description import ModelDescription, Sizes

FORM_FIELDS: Final = FIELDS | {"care", "shape"}
_STANDARD: Final = "standard"
_RATIO: Final = 1.5     # of a tall picture's sides, as of a print from 35 mm film


Offer = TypeVar("Offer")


@dataclass(frozen=True)
class Care:
    """How much work goes into a picture."""

    id: str
    name: str
    steps: int


@dataclass(frozen=True)
class Shape:
    """A picture's outline, in pixels."""

    id: str
    name: str
    width: int
    height: int


def cares(description: ModelDescription) -> tuple[Care, ...]:
    """Return the offers around the steps at which this model is at its best, without two that are the same."""
    best = description.defaults.steps
    offers = (
        Care("draft", "Draft", max(1, round(best / 2))),
        Care(_STANDARD, "Standard", best),
        Care("fine", "Fine", min(MOST_STEPS, best * 2)),
    )
    return tuple(care for care in offers if care.id == _STANDARD or care.steps != best)


def shapes(description: ModelDescription) -> tuple[Shape, ...]:
    """Return the outlines that this model can draw, each with about as many pixels as its native one."""
    sizes = description.sizes
    area = min(sizes.native[0] * sizes.native[1], sizes.largest_area)
    side = _fit(math.sqrt(area), sizes)
    short, long = _fit(math.sqrt(area / _RATIO), sizes), _fit(math.sqrt(area * _RATIO), sizes)
    offers = [Shape("square", "Square", side, side)]
    if short < side < long and short * long <= sizes.largest_area:
        offers += [Shape("tall", "Tall", short, long), Shape("wide", "Wide", long, short)]
    return tuple(offers)


def translate(form: Mapping[str, str], description: ModelDescription) -> dict[str, object]:
    """Return the fields of a request: words become numbers where no number was given. Raises `BadRequest`."""
    unknown = sorted(set(form) - FORM_FIELDS)
    if unknown:
        raise BadRequest("unknown_field", "the form holds a field that this page does not have", hint="reload the page")
    fields: dict[str, object] = {name: value for name, value in form.items() if name in FIELDS}
    if (wanted := form.get("care", "")) and not form.get("steps", "").strip():
        fields["steps"] = _chosen("care", wanted, {care.id: care for care in cares(description)}).steps
    if (wanted := form.get("shape", "")) and not (form.get("width", "").strip() or form.get("height", "").strip()):
        shape = _chosen("shape", wanted, {shape.id: shape for shape in shapes(description)})
        fields["width"], fields["height"] = shape.width, shape.height
    return fields


def form_of(request: GenerationRequest, description: ModelDescription, *, seed: int | None) -> dict[str, str]:
    """Return the form that asks for this again; without `seed` the next picture gets a new one."""
    best = description.defaults
    form = {
        "prompt": request.prompt,
        "negative_prompt": "" if request.negative_prompt == best.negative_prompt else request.negative_prompt,
        "sampler": request.sampler,
        "spacing": request.spacing,
        "guidance_scale": "" if request.guidance_scale == best.guidance_scale else f"{request.guidance_scale:g}",
        "seed": "" if seed is None else str(seed),
        "count": str(request.count),
    }
    care = next((care for care in cares(description) if care.steps == request.steps), None)
    form |= {"care": care.id} if care is not None else {"care": _STANDARD, "steps": str(request.steps)}
    size = (request.width, request.height)
    shape = next((shape for shape in shapes(description) if (shape.width, shape.height) == size), None)
    form |= {"shape": shape.id} if shape is not None else {"width": str(request.width), "height": str(request.height)}
    return form


def seconds_in_words(seconds: float) -> str:
    """Return a time as a person would say it."""
    if seconds < 1.5:
        return "about a second"
    if seconds < 90:
        return f"about {round(seconds)} seconds"
    return f"about {round(seconds / 60)} minutes"


def seconds_in_short(seconds: float) -> str:
    """Return a time as it fits under a button's name."""
    return f"about {max(1, round(seconds))} s" if seconds < 90 else f"about {round(seconds / 60)} min"


def _fit(side: float, sizes: Sizes) -> int:
    # A side that comes out a hair below a multiple by rounding is that multiple.
    return max(sizes.smallest, min(sizes.largest, int((side + 1e-6) // sizes.multiple) * sizes.multiple))


def _chosen(field: str, wanted: str, offers: Mapping[str, Offer]) -> Offer:
    if wanted not in offers:
        raise BadRequest(field, f"there is no {field} of that name", hint=f"choose one of {', '.join(offers)}")
    return offers[wanted]
