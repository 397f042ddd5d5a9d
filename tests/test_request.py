"""What may be asked for, and how everything else is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import BadRequest
from appliance.request import LARGEST_SEED, LONGEST_PROMPT, UNSPACED, GenerationRequest
from tests.bundles import DESCRIPTION

CANARY = "zanzibar-canary-prompt"


def parse(**fields: object) -> GenerationRequest:
    return GenerationRequest.parse({"prompt": "a red apple", **fields}, DESCRIPTION, fresh_seed=5)


def test_a_prompt_alone_takes_the_models_best_settings_and_the_fresh_seed() -> None:
    request = parse()
    best = DESCRIPTION.defaults
    assert (request.steps, request.sampler, request.guidance_scale) == (best.steps, best.sampler, best.guidance_scale)
    assert (request.width, request.height) == DESCRIPTION.sizes.native
    assert request.seed == 5
    assert request.count == 1


def test_the_strings_of_a_form_are_read_as_the_values_they_stand_for() -> None:
    request = parse(steps=" 12 ", guidance_scale="1,5", seed="0", sampler="euler", spacing="karras", count="")
    assert (request.steps, request.guidance_scale, request.seed) == (12, 1.5, 0)
    assert (request.sampler, request.spacing, request.count) == ("euler", "karras", 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""), ("prompt", "   \n\t "), ("prompt", "\u200b\u2060"), ("prompt", "a\x00b"), ("prompt", "a\x1bb"),
        ("prompt", "\ud800"), ("prompt", "x" * (LONGEST_PROMPT + 1)), ("prompt", "x" * 100_000), ("prompt", 7), ("prompt", None),
        ("negative_prompt", "a\x07"), ("negative_prompt", "x" * 100_000),
        ("steps", 0), ("steps", -1), ("steps", 10_000), ("steps", "NaN"), ("steps", float("nan")), ("steps", 2.5), ("steps", True),
        ("steps", "²"), ("steps", "٣"), ("steps", "1" * 5000), ("steps", "--3"),
        ("guidance_scale", "inf"), ("guidance_scale", float("inf")), ("guidance_scale", "nan"), ("guidance_scale", -0.1),
        ("guidance_scale", 1000), ("guidance_scale", "much"), ("guidance_scale", True), ("guidance_scale", []),
        ("seed", -1), ("seed", LARGEST_SEED + 1), ("seed", "ten"), ("seed", 1.0),
        ("count", 0), ("count", 10**6), ("sampler", "plms"), ("sampler", 3), ("spacing", "cosine"),
        ("width", 7), ("width", DESCRIPTION.sizes.native[0] + 1), ("height", 10**6), ("height", "tall"),
        ("checkpoint", "model.ckpt"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_sentence(field: str, value: object) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(**{field: value})
    assert refused.value.exit_code == 2
    assert str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(("width", "said"), [(65, "multiple of 8"), (56, "from 64 to 128"), (136, "from 64 to 128")])
def test_a_size_between_the_models_limits_must_be_a_multiple(width: int, said: str) -> None:
    wide = replace(DESCRIPTION, sizes=replace(DESCRIPTION.sizes, largest=128))
    with pytest.raises(BadRequest, match=said):
        GenerationRequest.parse({"prompt": "x", "width": width}, wide, fresh_seed=0)
    assert GenerationRequest.parse({"prompt": "x", "width": "64"}, wide, fresh_seed=0).width == 64


@pytest.mark.parametrize("sampler", UNSPACED)
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_a_sampler_that_goes_by_timesteps_refuses_spaced_sigmas(sampler: str, spacing: str) -> None:
    with pytest.raises(BadRequest, match=f"{sampler} knows no {spacing} spacing"):
        parse(sampler=sampler, spacing=spacing)


def test_lcm_in_more_steps_than_it_knows_is_refused() -> None:
    assert parse(sampler="lcm", steps=50).steps == 50
    with pytest.raises(BadRequest, match="at most 50 steps"):
        parse(sampler="lcm", steps=51)


def test_a_picture_of_more_pixels_than_the_model_draws_is_refused_even_where_each_side_is_allowed() -> None:
    sizes = replace(DESCRIPTION.sizes, largest_area=DESCRIPTION.sizes.native[0] * DESCRIPTION.sizes.native[1] // 2)
    with pytest.raises(BadRequest, match="pixels"):
        GenerationRequest.parse({"prompt": "x"}, replace(DESCRIPTION, sizes=sizes), fresh_seed=0)


@pytest.mark.parametrize("fields", [{}, {"steps": 10_000}, {"width": 3}, {"size": 1}, {"guidance_scale": "inf"}])
def test_no_refusal_and_no_repr_quotes_a_prompt(fields: dict[str, object]) -> None:
    prompt = {"prompt": CANARY, "negative_prompt": CANARY}
    try:
        said = repr(parse(**{**prompt, **fields}))
    except BadRequest as refused:
        said = f"{refused} {refused.hint} {refused!r}"
    assert said
    assert CANARY not in said


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "negative_prompt", "steps", "guidance_scale", "seed", "count", "width", "sampler", "odd"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.lists(st.integers(), max_size=2),
    )
)
def test_whatever_is_sent_is_parsed_or_refused_and_nothing_else(fields: dict[str, object]) -> None:
    try:
        request = GenerationRequest.parse(fields, DESCRIPTION, fresh_seed=1)
    except BadRequest:
        return
    assert request.prompt
    assert 1 <= request.steps <= 150
    assert 0 <= request.seed <= LARGEST_SEED
    assert request.width % DESCRIPTION.sizes.multiple == 0
