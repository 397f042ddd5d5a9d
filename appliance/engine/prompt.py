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

import math
import re
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import BadRequest

EMPHASIS: Final = 1.1
MOST_WEIGHT: Final = 10.0

# In this order: an escape, a closing `:weight)`, a single bracket, separator or backslash, a run of anything else.
_TOKENS: Final = re.compile(r"\\[\\()\[\]]|:[ ]*([+-]?[.0-9]+)[ ]*\)|[\\()\[\]:|]|[^\\()\[\]:|]+")
_BREAK: Final = re.compile(r"\bBREAK\b")
_NETWORK: Final = re.compile(r"<\w+:[^<>]+>")
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*", re.ASCII)


@dataclass(frozen=True)
class WeightedText:
    """A stretch of the prompt and how much it counts; 1 is neither more nor less."""

    text: str = field(repr=False)
    weight: float


def parse_prompt(prompt: str) -> tuple[WeightedText, ...]:
    """Return the prompt's stretches in order, neighbours of one weight joined; none for an empty prompt.

    Raises `BadRequest` for the syntax that rule 4 names and for weights beyond rule 5.
    """
    raise NotImplementedError
