"""One form for everything that is signed or chained: JSON of which each value has exactly one spelling.

It is the part of RFC 8785 (JSON Canonicalization Scheme) that needs no rules for numbers or escapes:

1. An object's keys are `[a-z][a-z0-9_]*`, sorted by their bytes, none twice. No white space anywhere.
2. A value is an object, a list, `true` or `false`, a whole number from -(2⁵³ - 1) to 2⁵³ - 1, or a text. There is no null.
3. A text is of printable ASCII characters, the double quote and the backslash left out; so nothing is ever escaped.

Bytes that are read are parsed, written again, and compared: what is not in this form is refused, whatever it means.

>>> encode({"b": [1, True], "a": "x y"})
b'{"a":"x y","b":[1,true]}'
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final, NoReturn, TypeAlias

from appliance.errors import VerificationRefused

GREATEST: Final = 2**53 - 1         # RFC 7493, section 2.2: what every reader of JSON agrees on
DEEPEST: Final = 8

Value: TypeAlias = "Mapping[str, Value] | list[Value] | tuple[Value, ...] | bool | int | str"

_KEY = re.compile(r"[a-z][a-z0-9_]*")
_TEXT = re.compile(r"[ !#-\[\]-~]*")


def encode(value: Mapping[str, Value]) -> bytes:
    """Return the one form of `value`. Raises `ValueError` for what has none: that is the caller's mistake."""
    _check(value, DEEPEST)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def decode(untrusted: bytes, place: str, *, largest: int) -> dict[str, object]:
    """Return the object in `untrusted`, at most `largest` bytes. Raises `VerificationRefused` for any other form."""
    if len(untrusted) > largest:
        refuse(place, "too large", expected=f"at most {largest} bytes")
    try:
        value = json.loads(untrusted.decode("ascii"))
        canonical = isinstance(value, dict) and encode(value) == untrusted
    except (ValueError, RecursionError):
        canonical = False       # what was found may be anything: it is not quoted
    if not canonical:
        refuse(place, "not JSON in the canonical form")
    found: dict[str, object] = value
    return found


def refuse(place: str, fact: str, *, expected: str | None = None, hint: str | None = None) -> NoReturn:
    """Raise `VerificationRefused` for evidence that has not the form that it must have."""
    raise VerificationRefused("evidence_form", place, fact, expected=expected, hint=hint)


def _check(value: object, deepest: int) -> None:
    if deepest == 0:
        raise ValueError("nested too deep")
    if isinstance(value, Mapping):
        for key, held in value.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ValueError("a key that has no canonical form")
            _check(held, deepest - 1)
    elif isinstance(value, list | tuple):
        for held in value:
            _check(held, deepest - 1)
    elif isinstance(value, str):
        if not _TEXT.fullmatch(value):
            raise ValueError("a text that has no canonical form")
    elif isinstance(value, int):        # bool is one of them
        if not -GREATEST <= value <= GREATEST:
            raise ValueError("a number that has no canonical form")
    else:
        raise ValueError("a value that has no canonical form")
