"""The parser of model.json: what it writes it reads, and every bad value is one mutation from a good document."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import VerificationRefused
from appliance.trust.description import INPAINTING, LARGEST, ModelDescription
from tests.bundles import DESCRIPTION

GOOD: dict[str, Any] = json.loads(DESCRIPTION.to_json())
MISSING = object()


def changed(place: str, value: object) -> bytes:
    """Return the good document with one value in another place's stead, or without it."""
    document = copy.deepcopy(GOOD)
    *above, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner: Any = document
    for part in above:
        inner = inner[part]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(document).encode()


def refusal(content: bytes) -> VerificationRefused:
    with pytest.raises(VerificationRefused) as caught:
        ModelDescription.parse(content)
    assert caught.value.reason == "model_json"
    assert caught.value.hint
    assert str(caught.value).isprintable()
    return caught.value


def test_a_description_is_read_back_as_it_was_written() -> None:
    assert ModelDescription.parse(DESCRIPTION.to_json()) == DESCRIPTION
    assert ModelDescription.parse(DESCRIPTION.to_json()).to_json() == DESCRIPTION.to_json()


def test_a_model_trained_on_open_captions_has_no_vocabulary() -> None:
    assert ModelDescription.parse(changed("vocabulary", None)).vocabulary is None


def test_a_whole_number_is_as_good_as_a_fraction() -> None:
    assert ModelDescription.parse(changed("defaults.guidance_scale", 2)).defaults.guidance_scale == 2.0


BAD = [
    ("format", 2), ("format", 1.0), ("format", True), ("format", "1"),
    ("family", "sdxl"), ("family", ""), ("family", None),
    ("name", ""), ("name", "x" * 121),
    ("name", "a\x1bb"), ("name", "a\x9bb"), ("name", "a\ud800b"), ("name", 7), ("name", ["x"]),
    ("components", []), ("components", None), ("components", "unet"),
    ("components.unet", ""), ("components.unet", "/etc/passwd"), ("components.unet", "../x"), ("components.unet", "a/../b"),
    ("components.unet", "./x"), ("components.unet", "a//b"), ("components.unet", "a\\b"), ("components.unet", "."),
    ("components.unet", "a/"), ("components.unet", "a\0b"), ("components.unet", None), ("components.tokenizer", "../t"),
    ("components.vae_encoder", ""), ("components.vae_encoder", False), ("components.vae_encoder", "../x"),
    ("text.max_length", 7), ("text.max_length", 513), ("text.max_length", 77.0), ("text.max_length", True),
    ("text.hidden_size", 0), ("text.start_id", -1), ("text.end_id", 1_000_001), ("text.pad_id", None),
    ("latents.channels", 0), ("latents.channels", 65), ("latents.channels", 3), ("latents.downscale", 0),
    ("latents.scaling_factor", 0), ("latents.scaling_factor", float("inf")), ("latents.scaling_factor", float("nan")),
    ("latents.scaling_factor", "0.18"), ("latents.scaling_factor", 10**400),
    ("latents.preview", []), ("latents.preview", None), ("latents.preview.0", [1, 2]), ("latents.preview.0", [1, 2, "3"]),
    ("latents.preview.0", [1, 2, float("nan")]), ("latents.preview.4", 5),
    ("schedule.num_train_timesteps", 0), ("schedule.beta_start", -0.1), ("schedule.beta_end", 1.5),
    ("schedule.beta_schedule", "sigmoid"), ("schedule.prediction_type", "x0"), ("schedule.timestep_spacing", 1),
    ("schedule.steps_offset", -1), ("schedule.set_alpha_to_one", 1), ("schedule.rescale_zero_snr", "false"),
    ("sizes.native", [64]), ("sizes.native", [64, 64, 64]), ("sizes.native", [64, 64.0]), ("sizes.native.0", 7),
    ("sizes.multiple", 12), ("sizes.smallest", 0), ("sizes.largest", 8193), ("sizes.largest_area", 0),
    ("sizes.largest_batch", 0), ("sizes.largest_batch", 65),
    ("defaults.sampler", ""), ("defaults.steps", 0), ("defaults.steps", 151), ("defaults.guidance_scale", -1),
    ("defaults.guidance_scale", True), ("defaults.negative_prompt", None), ("defaults.negative_prompt", "x" * 2001),
    ("variant", ""), ("licence", ""), ("licence", None), ("source", "\0"), ("notes", 1),
    ("vocabulary", []), ("vocabulary", False), ("vocabulary.subjects", "apple"), ("vocabulary.words.0", ""),
    ("vocabulary.words.0", 1), ("vocabulary.examples", ["x"] * 101), ("vocabulary.examples.0", "x" * 201),
]


@pytest.mark.parametrize(("place", "value"), BAD, ids=lambda value: ascii(value)[:40])
def test_a_bad_value_is_refused_and_its_field_is_named(place: str, value: object) -> None:
    named = place.split(".")
    where = refusal(changed(place, value)).place
    assert where.startswith("model.json")
    # "latents.channels = 3" is found out by the length of latents.preview: the section is always right.
    assert named[0] in where


def test_a_model_that_paints_into_pictures_has_an_encoder() -> None:
    painting = replace(DESCRIPTION, family=INPAINTING)
    bare = replace(painting, components=replace(painting.components, vae_encoder=None))
    whole = replace(painting, components=replace(painting.components, vae_encoder="vae_encoder/model.onnx"))
    assert ModelDescription.parse(whole.to_json()) == whole
    assert "components.vae_encoder" in refusal(bare.to_json()).place


def places(value: object, above: str = "") -> list[str]:
    found = []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += [f"{above}{key}", *places(inner, f"{above}{key}.")]
    return found


@pytest.mark.parametrize("place", places(GOOD))
def test_every_key_is_needed(place: str) -> None:
    assert "missing" in str(refusal(changed(place, MISSING)))


@pytest.mark.parametrize("place", ["", *[f"{place}." for place in GOOD if isinstance(GOOD[place], dict)]])
def test_an_unknown_key_is_refused_in_every_section(place: str) -> None:
    assert "unknown key" in str(refusal(changed(f"{place}extra", 1)))


@pytest.mark.parametrize("find", [b'"name"', b'"unet"', b'"channels"', b'"examples"'])
def test_a_duplicate_key_is_refused_at_every_depth(find: bytes) -> None:
    good = DESCRIPTION.to_json()
    assert "duplicate" in str(refusal(good.replace(find, find + b": 1, " + find, 1)))


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"\xff", b"{" + b" " * LARGEST + b"}", b"[" * 100_000, b"\xef\xbb\xbf{}", b"1" * 5000],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_document_is_refused(content: bytes) -> None:
    refusal(content)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_arbitrary_bytes_raise_nothing_but_a_refusal(content: bytes) -> None:
    refusal(content)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(places(GOOD)), values)
def test_any_value_in_any_place_is_refused_or_makes_a_description_that_can_be_written(place: str, value: object) -> None:
    try:
        description = ModelDescription.parse(changed(place, value))
    except VerificationRefused:
        return
    assert ModelDescription.parse(description.to_json()) == description


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_document_raises_nothing_but_a_refusal(data: st.DataObject) -> None:
    content = bytearray(DESCRIPTION.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        description = ModelDescription.parse(bytes(content))
    except VerificationRefused:
        return
    assert cast(object, ModelDescription.parse(description.to_json())) == description
