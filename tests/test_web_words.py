"""What the pages say: offers in words, notices, sentences; and that the colours can be read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.engine.jobs import JobId, JobView
from appliance.request import GenerationRequest
from appliance.trust.description import Defaults, Sizes, Vocabulary
from appliance.web.care import notices
from appliance.web.offers import cares, form_of, seconds_in_short, seconds_in_words, shapes, translate
from appliance.web.words import sentence, status, title
from tests.browser.engine import MODEL, ONE_SIZE

VOCABULARY = Vocabulary(("apple", "traffic light"), ("red", "apple", "traffic", "light"), ())


# ── Notices ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [
        ("a red apple", []),
        ("", []),
        ("RED APPLES", []),
        ("a traffic light", []),
        ("a parliament of fools", ["unknown_words"]),
        ("the quarterly report", ["unknown_words"]),
        ("12345", ["unknown_words"]),
        ("ein Haus", ["unknown_words"]),
        ("an apple for jane.doe@mail.example.org", ["email"]),
        ("apple @home", []),
        ("apple 4111 1111 1111 1111", ["card"]),
        ("apple 4111-1111-1111-1111", ["card"]),
        ("apple 4111 1111 1111 1112", []),
        ("apple 0000 0000 0000 0000", []),
        ("apple 0151 2345678", ["telephone"]),
        ("apple +49 151 2345678", ["telephone"]),
        ("apple (030) 123456-78", ["telephone"]),
        ("apple 555-123-4567", ["telephone"]),
        ("apple (555) 123-4567", ["telephone"]),
        ("an apple from 1990", []),
        ("apples 1990 2000 2010", []),
        ("apple 1024 x 768", []),
        ("(apple:1.25) red:0.8", []),
        ("apple 10000000 stars", []),
    ],
)
def test_a_notice_is_for_what_it_says_and_for_nothing_else(prompt: str, kinds: list[str]) -> None:
    assert [notice.kind for notice in notices(prompt, VOCABULARY)] == kinds


def test_a_notice_never_repeats_the_words() -> None:
    for notice in notices("zebra@zebra.example 0151 2345678 4111 1111 1111 1111", VOCABULARY):
        assert "zebra" not in notice.text
        assert not re.search(r"\d", notice.text)


def test_a_prompt_of_the_longest_kind_is_looked_at_in_no_time() -> None:
    import time

    for nasty in ("a@" * 2_000, "0 " * 2_000, "(" * 4_000, "+" + "1-" * 2_000, "a." * 2_000, "1 " * 2_000):
        started = time.process_time()
        notices(nasty, VOCABULARY)
        assert time.process_time() - started < 0.5


# ── Offers ────────────────────────────────────────────────────────────────────


def test_care_is_half_and_twice_the_steps_at_which_the_model_is_best() -> None:
    assert [(care.id, care.steps) for care in cares(MODEL)] == [("draft", 10), ("standard", 20), ("fine", 40)]
    one_step = replace(MODEL, defaults=Defaults("euler", 1, 1.0, ""))
    assert [(care.id, care.steps) for care in cares(one_step)] == [("standard", 1), ("fine", 2)]
    most = replace(MODEL, defaults=Defaults("euler", 150, 1.0, ""))
    assert [care.id for care in cares(most)] == ["draft", "standard"]


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes((192, 192), 8, 128, 288, 192 * 192, 4),
        Sizes((512, 512), 64, 256, 1024, 768 * 768, 4),
        Sizes((512, 768), 8, 256, 1024, 512 * 768, 4),
        Sizes((64, 64), 8, 64, 64, 4096, 4),
        Sizes((200, 200), 8, 192, 208, 200 * 200, 1),
    ],
)
def test_every_shape_and_care_that_is_offered_can_be_asked_for(sizes: Sizes) -> None:
    model = replace(MODEL, sizes=sizes)
    offers = shapes(model)
    assert offers[0].id == "square"
    assert len({(shape.width, shape.height) for shape in offers}) == len(offers)
    for shape in offers:
        for care in cares(model):
            form = {"prompt": "x", "shape": shape.id, "care": care.id}
            request = GenerationRequest.parse(translate(form, model), model, fresh_seed=1)
            assert (request.width, request.height, request.steps) == (shape.width, shape.height, care.steps)


def test_a_model_of_one_size_has_one_shape() -> None:
    assert [shape.id for shape in shapes(ONE_SIZE)] == ["square"]


@pytest.mark.parametrize(
    "form",
    [
        {"prompt": "x"},
        {"prompt": "x", "care": "fine", "shape": "wide", "sampler": "euler", "spacing": "karras", "guidance_scale": "3.25"},
        {"prompt": "x", "steps": "7", "width": "128", "height": "200", "count": "3", "negative_prompt": "y"},
    ],
)
def test_a_request_becomes_a_form_that_asks_for_the_same(form: dict[str, str]) -> None:
    request = GenerationRequest.parse(translate(form, MODEL), MODEL, fresh_seed=5)
    again = GenerationRequest.parse(translate(form_of(request, MODEL, seed=5), MODEL), MODEL, fresh_seed=6)
    assert again == request


def test_a_form_without_its_seed_gets_a_new_one() -> None:
    request = GenerationRequest.parse({"prompt": "x", "seed": 5}, MODEL, fresh_seed=6)
    again = GenerationRequest.parse(translate(form_of(request, MODEL, seed=None), MODEL), MODEL, fresh_seed=7)
    assert again.seed == 7


# ── Sentences ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("seconds", "words", "short"),
    [(0.2, "about a second", "about 1 s"), (6.2, "about 6 seconds", "about 6 s"), (89, "about 89 seconds", "about 89 s"),
     (90, "about 2 minutes", "about 2 min"), (600, "about 10 minutes", "about 10 min")],
)
def test_a_time_is_said_as_a_person_would(seconds: float, words: str, short: str) -> None:
    assert (seconds_in_words(seconds), seconds_in_short(seconds)) == (words, short)


def test_a_message_becomes_a_sentence() -> None:
    assert sentence("steps must be a number") == "Steps must be a number."
    assert sentence("") == ""


VIEW = JobView(JobId("x"), "running", 0, 14, 20, 1, 1, 6.0, None, None, None, (), 3, has_preview=True)


@pytest.mark.parametrize(
    ("view", "behind", "engine", "said"),
    [
        (VIEW, 0, True, "Developing, step 14 of 20, about 6 seconds left"),
        (VIEW, 2, True, "Developing, step 14 of 20, about 6 seconds left, then 2 more of yours"),
        (replace(VIEW, picture=2, count=4), 0, True, "Developing, picture 2 of 4, step 14 of 20, about 6 seconds left"),
        (replace(VIEW, state="waiting", place=0, seconds_left=None), 0, True, "Waiting. Yours is next"),
        (replace(VIEW, state="waiting", place=3), 0, True, "Waiting. 3 ahead of yours, about 6 seconds left"),
        (replace(VIEW, state="waiting", place=0), 0, False, "The engine is being started again. Yours is next."),
        (replace(VIEW, state="cancelled"), 0, True, "Cancelled. Nothing of it was kept."),
    ],
)
def test_the_line_under_the_picture_says_what_is_so(view: JobView, behind: int, engine: bool, said: str) -> None:
    assert status(view, behind=behind, engine_is_there=engine) == said


def test_the_title_shows_how_far_it_is() -> None:
    assert title(VIEW) == "70 % · Darkroom"
    assert title(replace(VIEW, picture=2, count=4)) == "42 % · Darkroom"
    assert title(None) == "Darkroom"


# ── Colours ───────────────────────────────────────────────────────────────────


def _themes() -> list[dict[str, str]]:
    sheet = (Path(__file__).parent.parent / "appliance" / "web" / "static" / "darkroom.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{([^}]*--room[^}]*)\}", sheet)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]


def _luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_from_every_surface_by_day_and_by_night() -> None:
    night, day = _themes()
    for theme in (night, day):
        for ink in ("paper", "grain", "warning"):
            for surface in ("room", "bench", "tray"):
                assert _contrast(theme[ink], theme[surface]) >= 4.5, (ink, surface)
        assert _contrast(theme["on-safelight"], theme["safelight"]) >= 4.5
        for surface in ("room", "bench"):       # what shows that a thing can be pressed: WCAG 1.4.11
            assert _contrast(theme["edge"], theme[surface]) >= 3
            assert _contrast(theme["safelight"], theme[surface]) >= 3
