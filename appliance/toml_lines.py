"""On which lines of a TOML document its tables and keys stand.

Lines are found by giving tomllib, which alone decides what a document says, one statement at a time: a statement ends at the
first line with which it parses, so a multi-line string that looks like keys cannot mislead. tomlkit and rtoml keep no
positions, spanned-toml has not been kept since 2022, and another grammar (tree-sitter) could read a document differently.

What is not certain is left out: nobody is sent to a wrong line.

>>> locate("[limits]\\nqueue = 8\\n")
{('limits',): (1, 1), ('limits', 'queue'): (2, 2)}
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

KeyPath: TypeAlias = tuple[str, ...]
Lines: TypeAlias = tuple[int, int]      # first and last, counted from 1

MOST_EFFORT: Final = 1 << 20      # characters given to tomllib once more; a statement of n lines is tried n times


def locate(text: str) -> dict[KeyPath, Lines]:
    """Return the lines of each table and key of a valid document, by its path; where one is not certain, it is left out.

    A table has the line of its first mention. A key inside an inline table that runs over several lines has them all.
    """
    found: dict[KeyPath, Lines] = {}
    lines = text.replace("\r\n", "\n").split("\n")
    header: KeyPath = ()
    first, effort = 0, 0
    while first < len(lines):
        last, statement = first, _loads(lines[first])
        while statement is None:
            last += 1
            effort += sum(len(line) + 1 for line in lines[first:last + 1])
            if last == len(lines) or effort > MOST_EFFORT:
                return found
            statement = _loads("\n".join(lines[first:last + 1]))
        if statement and lines[first].lstrip(" \t").startswith("["):
            header = _only_path(statement)
            within: Iterator[KeyPath] = iter(())
            key = header
        elif statement:
            effort += lines[first].count("=") * len(lines[first])
            if effort > MOST_EFFORT:
                return found
            # A key has no line break in it, and its end is the first "=" up to which there is one.
            starts = (_loads(lines[first][:sign.start()] + "=0") for sign in re.finditer("=", lines[first]))
            own = _only_path(next(start for start in starts if start is not None))
            key = header + own
            within = (header + path for path in _paths(statement) if len(path) > len(own))
        if statement:
            for length in range(1, len(key) + 1):
                found.setdefault(key[:length], (first + 1, first + 1))
            for path in within:
                found.setdefault(path, (first + 1, last + 1))
        first = last + 1
    return found


def _loads(statement: str) -> dict[str, object] | None:
    try:
        return tomllib.loads(statement)
    except (ValueError, RecursionError):
        return None


def _only_path(document: Mapping[str, object]) -> KeyPath:
    """Return the path to the one innermost thing of a document that a header or a key alone makes."""
    path: KeyPath = ()
    inner: object = document
    while isinstance(inner, dict) and inner:
        (name, inner), = inner.items()
        path += (name,)
    return path


def _paths(document: Mapping[str, object]) -> Iterator[KeyPath]:
    """Yield the path of every table and key; what is in an array has none."""
    waiting: list[tuple[KeyPath, object]] = [((), document)]
    while waiting:
        path, inner = waiting.pop()
        if path:
            yield path
        if isinstance(inner, dict):
            waiting += [((*path, name), value) for name, value in inner.items()]
