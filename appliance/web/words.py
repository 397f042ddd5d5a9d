"""Sentences about a job, made in one place so that the page, the script and a page without a script say the same."""

from __future__ import annotations

import time

from flask import Flask

from appliance.engine.jobs import JobView
from appliance.web.offers import seconds_in_words


def install(app: Flask) -> None:
    """Give the templates the filters `sentence` and `clock`."""
    app.jinja_env.filters.update(sentence=sentence, clock=clock)


def sentence(text: str) -> str:
    """Return an error's lowercase message as a sentence."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".") if text else ""


def clock(moment: float) -> str:
    """Return the time of day of a Unix time, on this machine's clock."""
    return time.strftime("%H:%M", time.localtime(moment))


def status(job: JobView, *, behind: int, engine_is_there: bool) -> str:
    """Return the line under the picture: what is so, and for how long it will be."""
    left = "" if job.seconds_left is None else f", {seconds_in_words(job.seconds_left)} left"
    more = "" if behind == 0 else f", then {behind} more of yours"
    if job.state == "waiting" and not engine_is_there:
        return f"The engine is being started again. {_place(job.place)}{more}."
    if job.state == "waiting":
        return f"Waiting. {_place(job.place)}{left}{more}"
    if job.state == "running":
        which = "" if job.count == 1 else f"picture {job.picture} of {job.count}, "
        return f"Developing, {which}step {job.step} of {job.steps}{left}{more}"
    if job.state == "cancelled":
        kept = f"The {_pictures(len(job.images))} finished before stayed." if job.images else "Nothing of it was kept."
        return f"Cancelled. {kept}"
    if job.state == "failed":
        return "Not developed"
    return "Developed" if job.count == 1 else f"Developed, {_pictures(len(job.images))}"


def title(job: JobView | None) -> str:
    """Return the window's title: progress, and never a word of the prompt, since windows are listed and recorded."""
    if job is None or job.state == "done":
        return "Darkroom"
    done = (job.picture - 1) * job.steps + job.step
    return {
        "waiting": "Waiting · Darkroom",
        "running": f"{100 * done // (job.steps * job.count)} % · Darkroom",
        "failed": "Not developed · Darkroom",
        "cancelled": "Cancelled · Darkroom",
    }[job.state]


def _place(ahead: int) -> str:
    return "Yours is next" if ahead == 0 else f"{ahead} ahead of yours"


def _pictures(count: int) -> str:
    return "one picture" if count == 1 else f"{count} pictures"
