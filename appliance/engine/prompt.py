"""Prompt weights, as the users of AUTOMATIC1111's web UI write them.

This room turns a prompt into stretches of text with a weight each. It loads nothing, knows no tokens, and raises nothing
but `BadRequest`, whose messages quote at most a number out of the prompt and never its words.

Rules, in order:

1. `(text)` weighs 1.1 times as much, `[text]` 1.1 times less, `(text:1.4)` exactly 1.4 times. Brackets nest and their
   weights multiply.
2. `\\(`, `\\)`, `\\[`, `\\]` and `\\\\` are the character itself; any other backslash vanishes.
3. A bracket that is never closed reaches to the end of the prompt; a closing one that was never opened is plain text, and
   so is a `:number)` without a bracket before it.
4. What has the syntax of another thing is refused and not drawn as if it were words: prompt editing `[from:to:when]`,
   alternation `[a|b]`, `BREAK`, and extra networks such as `<lora:name:1>`. `AND` is a word like any other.
5. A weight is at most `MOST_WEIGHT` either way, nested brackets included. Negative weights and zero are allowed.

>>> [(part.text, part.weight) for part in parse_prompt("a (red:1.5) apple")]
[('a ', 1.0), ('red', 1.5), (' apple', 1.0)]
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import BadRequest

EMPHASIS: Final = 1.1
MOST_WEIGHT: Final = 10.0

# In this order: an escape, a closing `:weight)`, a single bracket, separator or backslash, a run of anything else.
_TOKENS: Final = re.compile(r"\\[\\()\[\]]|:\s*([+-]?[.0-9]+)\s*\)|[\\()\[\]:|]|[^\\()\[\]:|]+")
_BREAK: Final = re.compile(r"\bBREAK\b")
_NETWORK: Final = re.compile(r"<\w+:[^<>]+>")
_MOMENT: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")


@dataclass(frozen=True)
class WeightedText:
    """A stretch of the prompt and how much it counts; 1 is neither more nor less."""

    text: str = field(repr=False)
    weight: float


def parse_prompt(prompt: str) -> tuple[WeightedText, ...]:
    """Return the prompt's stretches in order, neighbours of one weight joined; none where there is no text.

    Raises `BadRequest` for the syntax that rule 4 names and for weights beyond rule 5. Takes time linear in the prompt.
    """
    if _BREAK.search(prompt):
        raise _unknown_syntax("BREAK is not known here", "leave it out, or write it in lower case if the word is meant")
    if _NETWORK.search(prompt):
        raise _unknown_syntax(
            "extra networks such as <lora:…> or <hypernet:…> are not known here",
            "leave them out: a model with its LoRA merged in can be exported and signed instead",
        )
    tokens = list(_TOKENS.finditer(prompt))
    opening, closing = _pair_brackets(tokens)
    # Round and square brackets nest each by itself, so that "(a [b) c]" has the meaning it has in A1111.
    levels = {"(": [1.0], "[": [1.0]}
    parts: list[WeightedText] = []
    for index, token in enumerate(tokens):
        text = token.group()
        if index in opening:
            levels[text].append(levels[text][-1] * opening[index])
        elif index in closing:
            levels[closing[index]].pop()
        elif text := text[1:] if text.startswith("\\") else text:
            weight = levels["("][-1] * levels["["][-1]
            _check_weight(weight)
            if parts and parts[-1].weight == weight:
                text = parts.pop().text + text
            parts.append(WeightedText(text, weight))
    return tuple(parts)


@dataclass(eq=False)
class _Bracket:
    """An open bracket: where it stands, and what would make a square one mean something other than a weight."""

    index: int
    kind: str
    colons: list[int] = field(default_factory=list)     # where in the prompt a `:` stands directly inside it
    alternates: bool = False
    closed: bool = False


def _pair_brackets(tokens: list[re.Match[str]]) -> tuple[dict[int, float], dict[int, str]]:
    """Return the weight that each opening token sets, and for each token that closes a bracket, which kind it closes."""
    opening: dict[int, float] = {}
    closing: dict[int, str] = {}
    opened: list[_Bracket] = []
    of_kind: dict[str, list[_Bracket]] = {"(": [], "[": []}
    for index, token in enumerate(tokens):
        text, number = token.group(), token.group(1)
        while opened and opened[-1].closed:     # in "(a [b) c]" the round bracket closes under the square one
            opened.pop()
        if text in of_kind:
            opening[index] = EMPHASIS if text == "(" else 1 / EMPHASIS
            opened.append(_Bracket(index, text))
            of_kind[text].append(opened[-1])
        elif (text == ")" or number is not None) and of_kind["("]:
            bracket = of_kind["("].pop()
            bracket.closed = True
            if number is not None:
                opening[bracket.index] = _weight(number)
            closing[index] = "("
        elif text == "]" and of_kind["["]:
            bracket = of_kind["["].pop()
            bracket.closed = True
            _check_is_weight(bracket, token)
            closing[index] = "["
        elif text == ":" and opened:
            opened[-1].colons.append(token.end())
        elif text == "|" and opened:
            opened[-1].alternates = True
    return opening, closing


def _check_is_weight(bracket: _Bracket, end: re.Match[str]) -> None:
    """Raise `BadRequest` if a closed square bracket is prompt editing or alternation; a lone `[a:b]` is neither."""
    literal = "or write \\[ and \\] if the brackets themselves are meant"
    if bracket.alternates:
        raise _unknown_syntax("alternating words, as in [a|b], are not known here", f"choose one of them, {literal}")
    last = bracket.colons[-1] if bracket.colons else end.start()
    if len(bracket.colons) > 1 or _MOMENT.fullmatch(end.string, last, end.start()):
        raise _unknown_syntax("prompt editing, as in [from:to:when], is not known here", f"choose one prompt, {literal}")


def _weight(number: str) -> float:
    try:
        weight = float(number)
    except ValueError:      # such as "1.2.3"
        raise BadRequest(
            "prompt_weight", "a weight in the prompt is not a number", hint="write it like this: (apple:1.2)"
        ) from None
    _check_weight(weight)
    return weight


def _check_weight(weight: float) -> None:
    if not abs(weight) <= MOST_WEIGHT:      # also true of NaN, which zero times infinity is
        raise BadRequest(
            "prompt_weight",
            f"a weight in the prompt is beyond {MOST_WEIGHT:g}, nested brackets included",
            hint="weights between 0.5 and 1.5 do the most good",
        )


def _unknown_syntax(message: str, hint: str) -> BadRequest:
    return BadRequest("prompt_syntax", message, hint=hint)
