"""What is said quietly beside a prompt: a worry, or that the model will not understand it.

Nothing here blocks, stores, counts or reports. A notice names the kind of thing and never repeats the words, so that a
notice is not content. Everything is worked out in this process, by these rules:

1. An e-mail address, a payment card number (13 to 19 digits with a right Luhn sum) or a telephone number. A row of digits
   alone is no telephone number: it has a plus or a zero in front, or the three groups of North America.
2. A prompt in which the model knows no word, for a model that says which words it knows.

>>> [notice.kind for notice in notices("a red apple, call 0151 2345678", None)]
['telephone']
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from appliance.trust.description import Vocabulary

Kind = Literal["email", "card", "telephone", "unknown_words"]

_EMAIL: Final = re.compile(r"[^\s@,;<>()]{1,64}@[^\s@,;<>()]{1,253}\.\w{2,24}")
_CARD: Final = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")
_PLUS_OR_ZERO: Final = re.compile(r"(?<![\d.,:])\(?(?:\+|0)[\d ()/.-]{5,24}\d")
_NORTH_AMERICAN: Final = re.compile(r"(?<!\d)\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?!\d)")
_WORD: Final = re.compile(r"[^\W\d_]+")

_IN_MEMORY: Final = "It is kept in memory only, but the picture does not need it."


@dataclass(frozen=True)
class Notice:
    """One quiet line; `text` holds nothing of the prompt."""

    kind: Kind
    text: str


def notices(prompt: str, vocabulary: Vocabulary | None) -> tuple[Notice, ...]:
    """Return what should be said beside this prompt, the most worrying first."""
    said = []
    if _EMAIL.search(prompt):
        said.append(Notice("email", f"This looks like an e-mail address. {_IN_MEMORY}"))
    if any(_luhn(match.group()) for match in _CARD.finditer(prompt)):
        said.append(Notice("card", f"This looks like a card number. {_IN_MEMORY}"))
    elif _telephone(prompt):
        said.append(Notice("telephone", f"This looks like a telephone number. {_IN_MEMORY}"))
    if vocabulary is not None and prompt.strip() and not knows_a_word(prompt, vocabulary):
        said.append(
            Notice(
                "unknown_words",
                "This model knows none of these words, so the picture will be a guess. The Model page lists what it knows.",
            )
        )
    return tuple(said)


def knows_a_word(prompt: str, vocabulary: Vocabulary) -> bool:
    """Whether any word of the prompt, or its singular, is one that means something to the model."""
    known = set(vocabulary.words)
    said = _WORD.findall(prompt.casefold())
    return any(form in known for word in said for form in (word, word.removesuffix("s"), word.removesuffix("es")))


def _telephone(prompt: str) -> bool:
    if _NORTH_AMERICAN.search(prompt):
        return True
    return any(7 <= sum(c.isdigit() for c in match.group()) <= 15 for match in _PLUS_OR_ZERO.finditer(prompt))


def _luhn(text: str) -> bool:
    """ISO/IEC 7812-1, annex B: every second digit from the right doubled, the sum of all digits a multiple of ten."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    total = sum(digits[0::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return total % 10 == 0 and any(digits)
