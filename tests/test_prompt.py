"""A1111's prompt syntax: what weighs how much, what is refused, and that nothing of the text is lost."""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.engine.prompt import MOST_WEIGHT, WeightedText, parse_prompt
from appliance.errors import BadRequest

SYNTAX = st.text(st.sampled_from("ab \\()[]:|.0123456789+-<>"), max_size=60)
PIECES = st.lists(
    st.sampled_from(["(", ")", "[", "]", ":1.2)", ":", "|", "\\", "\\(", "a", " b, ", "BREAK", "<lora:x:1>", "AND", "é", ":.)"])
).map("".join)


def weights(prompt: str) -> list[tuple[str, Any]]:
    return [(part.text, pytest.approx(part.weight)) for part in parse_prompt(prompt)]


@pytest.mark.parametrize(("prompt", "expected"), [
    ("a red apple", [("a red apple", 1)]),
    ("a (red) apple", [("a ", 1), ("red", 1.1), (" apple", 1)]),
    ("((red))", [("red", 1.21)]),
    ("[red]", [("red", 1 / 1.1)]),
    ("[[red]]", [("red", 1 / 1.21)]),
    ("(red:1.5)", [("red", 1.5)]),
    ("(red: .5 )", [("red", 0.5)]),
    ("(red:+2)", [("red", 2)]),
    ("(red:0)", [("red", 0)]),
    ("(red:-1)", [("red", -1)]),
    ("((a:2) b:1.5)", [("a", 3), (" b", 1.5)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))", [
        # The example of A1111's own documentation, whose first bracket is never closed.
        ("a ", 1), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.1**4),
    ]),
    ("([red])", [("red", 1)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
    ("a\n(b)", [("a\n", 1), ("b", 1.1)]),
])     # fmt: skip
def test_weights_are_those_that_a1111_gives(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert weights(prompt) == expected


@pytest.mark.parametrize(("prompt", "text"), [
    (r"\(not heavy\)", "(not heavy)"),
    (r"\[plain\]", "[plain]"),
    (r"a\\b", r"a\b"),
    (r"a\b\:", "ab:"),
    ("a) b]", "a) b]"),
    ("a:1.5)", "a:1.5)"),
    ("AND", "AND"),
    ("a | b: c", "a | b: c"),
    ("breakfast at a Breakwater", "breakfast at a Breakwater"),
    ("1 < 2 > 1, a <3", "1 < 2 > 1, a <3"),
])     # fmt: skip
def test_what_is_no_syntax_is_plain_text(prompt: str, text: str) -> None:
    assert parse_prompt(prompt) == (WeightedText(text, 1.0),)


def test_an_unclosed_bracket_reaches_to_the_end() -> None:
    assert weights("a (b c") == [("a ", 1), ("b c", 1.1)]
    assert weights("a [b (c") == [("a ", 1), ("b ", 1 / 1.1), ("c", 1)]
    assert weights("(a:1.5") == [("a:1.5", 1.1)]


def test_a_colon_without_a_number_is_text_in_either_bracket() -> None:
    assert weights("(style: oil)") == [("style: oil", 1.1)]
    assert weights("[style: oil]") == [("style: oil", 1 / 1.1)]


@pytest.mark.parametrize("prompt", ["", "()", "[]", "(([]))", "(:1.2)", "\\"])
def test_a_prompt_without_text_has_no_stretches(prompt: str) -> None:
    assert parse_prompt(prompt) == ()


@pytest.mark.parametrize(("prompt", "named"), [
    ("a [cat:dog:0.5]", "prompt editing"),
    ("a [cat:dog:10] b", "prompt editing"),
    ("[dog:5]", "prompt editing"),
    ("[cat::.5]", "prompt editing"),
    ("[(cat:1.2):dog: 5 ]", "prompt editing"),
    ("([cat:dog:0.5])", "prompt editing"),
    ("[cat|dog]", "alternating"),
    ("a [cat|dog|] b", "alternating"),
    ("a cat BREAK a dog", "BREAK"),
    ("a cat\nBREAK\na dog", "BREAK"),
    ("a cat <lora:fluffy:0.8>", "<lora"),
    ("<hypernet:fluffy>", "<lora"),
])     # fmt: skip
def test_the_syntax_of_other_things_is_refused_with_what_to_do(prompt: str, named: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_prompt(prompt)
    assert refused.value.reason == "prompt_syntax"
    assert named in str(refused.value)
    assert refused.value.hint
    for word in ("cat", "dog", "fluffy"):
        assert word not in f"{refused.value} {refused.value.hint}"


def test_editing_and_alternation_are_text_where_the_brackets_are_escaped() -> None:
    assert weights(r"\[cat:dog:0.5\]") == [("[cat:dog:0.5]", 1)]
    assert weights(r"\[cat|dog\]") == [("[cat|dog]", 1)]


@pytest.mark.parametrize("prompt", [
    "(a:1.2.3)", "(a:.)", "(a:11)", "(a:-11)", "(a:" + "9" * 400 + ")", "((a:9):9)", "(" * 25 + "a",
    "(" * 400 + "a" + ":10)" * 400, "(" * 400 + "(a:0)" + ":10)" * 400,
])     # fmt: skip
def test_a_weight_that_is_no_number_or_absurd_is_refused(prompt: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_prompt(prompt)
    assert refused.value.reason == "prompt_weight"
    assert refused.value.hint


@settings(deadline=None)
@given(SYNTAX | PIECES | st.text())
def test_any_text_parses_or_is_a_bad_request(prompt: str) -> None:
    try:
        parts = parse_prompt(prompt)
    except BadRequest:
        return
    assert all(part.text and abs(part.weight) <= MOST_WEIGHT for part in parts)
    assert all(one.weight != two.weight for one, two in pairwise(parts))
    # Text comes out in order: what is left of it after the syntax is a subsequence of the prompt.
    rest = iter(prompt)
    assert all(character in rest for part in parts for character in part.text)


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\\()[]<"), max_size=80).filter(lambda text: "BREAK" not in text))
def test_text_without_brackets_is_kept_whole(text: str) -> None:
    assert "".join(part.text for part in parse_prompt(text)) == text


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \\()[]:|.0"), max_size=80))
def test_escaping_every_bracket_keeps_any_text_whole(text: str) -> None:
    escaped = "".join("\\" + c if c in "\\()[]" else c for c in text)
    assert "".join(part.text for part in parse_prompt(escaped)) == text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["red", "old", "apple"]), st.integers(1, 30)), min_size=1, max_size=5))
def test_explicit_weights_come_out_as_they_were_written(words: list[tuple[str, int]]) -> None:
    prompt = "".join(f"({word}:{tenths / 10})" for word, tenths in words)
    expected: list[tuple[str, float]] = []
    for word, tenths in words:
        joined = expected.pop()[0] if expected and expected[-1][1] == tenths / 10 else ""
        expected.append((joined + word, tenths / 10))
    assert [(part.text, part.weight) for part in parse_prompt(prompt)] == expected


@pytest.mark.parametrize("prompt", [
    "(a" * 2000, "[(a" * 1000 + ")]" * 1000, "(" * 2000 + "[" * 2000 + ")" * 2000 + "]" * 2000, "[" + ":" * 20_000,
    ":" * 20_000, ":" + " " * 20_000, "<a:" * 6000, ":" + "1" * 20_000, "\\" * 20_000, "(" + "|" * 20_000 + ")",
])     # fmt: skip
def test_hostile_prompts_take_no_time(prompt: str) -> None:
    started = time.process_time()
    with suppress(BadRequest):
        parse_prompt(prompt)
    assert time.process_time() - started < 1


def test_no_repr_shows_the_text() -> None:
    assert "canary" not in repr(parse_prompt("a (canary:1.3) sings"))
