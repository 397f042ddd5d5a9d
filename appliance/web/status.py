"""The face of the seal: what was seen of it, in words, for the Status page and for the top of every page.

It concludes nothing by itself. *Sealed* or not is the supervisor's conclusion, and each line is one of its promises with what
was observed, under the id that `darkroom status --json` and docs/promises.md use. Three things can be said of a promise:

    holds       it was tried, and it is so
    broken      it is not so, and the seal rests on it: every page says NOT sealed
    missing     it is not so, and the seal stands without it: a wall that this machine does not offer, with the reason

A promise of which nothing says whether the seal rests on it is taken for one on which it does. Before the first look nothing
is claimed at all. The page belongs to nobody: it holds no content, and begins no session.

>>> View(None, now=0.0).state
'looking'
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, Literal

from flask import Blueprint, Flask, g, render_template
from flask.typing import ResponseReturnValue

from appliance.web.room import Seen, room

blueprint: Final = Blueprint("status", __name__)

_ABOUT: Final = (
    ("1.", "Leaving the machine", "Nothing may get out of this machine but the answers to the browsers that ask it for a page."),
    ("2.", "The model", "Only a model that was signed with a key that this appliance trusts may draw."),
    ("3.", "What is kept", "What you write and make may stay in memory, and may reach no disk and no other program."),
    ("4.", "How it ends", "What held words and pictures may not outlive Darkroom."),
    ("", "Everything else", "What was observed besides."),
)


@dataclass(frozen=True)
class Line:
    """One promise, and what was observed."""

    id: str
    title: str
    observed: str
    state: Literal["holds", "broken", "missing"]
    essential: bool

    @classmethod
    def of(cls, promise: dict[str, object]) -> Line:
        """Return the line for a promise as the supervisor says it."""
        holds, essential = promise.get("holds") is True, promise.get("essential") is not False
        return cls(
            str(promise.get("id")), str(promise.get("title")), str(promise.get("observed")),
            "holds" if holds else "broken" if essential else "missing", essential,
        )


@dataclass(frozen=True)
class Group:
    """The promises about one thing, and what that thing is."""

    title: str
    meaning: str
    lines: tuple[Line, ...]

    @property
    def held(self) -> int:
        """How many of them hold."""
        return sum(line.state == "holds" for line in self.lines)


class View:
    """What was seen, as pages show it at the time `now` (Unix time)."""

    def __init__(self, seen: Seen | None, now: float) -> None:
        self.state: Final[Literal["sealed", "open", "looking"]] = (
            "looking" if seen is None else "sealed" if seen.sealed else "open"
        )
        self.lines: Final = tuple(Line.of(promise) for promise in seen.promises) if seen is not None else ()
        self.at: Final = seen.at if seen is not None else now
        self.ago: Final = ago(now - self.at)

    @property
    def held(self) -> int:
        """How many promises hold."""
        return sum(line.state == "holds" for line in self.lines)

    @property
    def broken(self) -> tuple[Line, ...]:
        """The promises for whose sake this is not sealed."""
        return tuple(line for line in self.lines if line.state == "broken")

    @property
    def missing(self) -> tuple[Line, ...]:
        """The walls that are not there, without which the seal stands."""
        return tuple(line for line in self.lines if line.state == "missing")

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every promise, by what it is about; none is left out."""
        left = list(self.lines)
        groups = []
        for prefix, title, meaning in _ABOUT:
            mine = tuple(line for line in left if line.id.startswith(prefix))
            left = [line for line in left if line not in mine]
            if mine:
                groups.append(Group(title, meaning, mine))
        return tuple(groups)

    @property
    def clock(self) -> str:
        """When it was looked at, on this machine's clock, to the second and with its zone."""
        return time.strftime("%-d %B %Y, %H:%M:%S %Z", time.localtime(self.at))

    @property
    def stamp(self) -> str:
        """When it was looked at, for programs (RFC 3339)."""
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.at))

    def line(self, id_: str) -> Line | None:
        """Return the line of one promise, where it was observed."""
        return next((line for line in self.lines if line.id == id_), None)


def install(app: Flask) -> None:
    """Give every template the view of the seal as `seal`."""
    app.context_processor(lambda: {"seal": View(room().seal.seen, time.time())})


def ago(seconds: float) -> str:
    """Return how long ago something was, as a person would say it; a clock that was set back says "just now"."""
    if seconds < 2:
        return "just now"
    for unit, length in (("hour", 3600), ("minute", 60), ("second", 1)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


@blueprint.get("/status")
def page() -> ResponseReturnValue:
    """Show what was seen of the seal, to whoever asks."""
    return render_template("status.html", session=g.session)
