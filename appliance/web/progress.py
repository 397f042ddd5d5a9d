"""How a picture comes along, for the page's script: JSON, a stream of events, previews; and the draft of the form.

A stream holds one thread of the worker, so that there are few: beyond the limit the answer is 503, and the script asks for
the JSON at intervals instead. A stream ends by itself after `_LONGEST` seconds and is taken up again by the browser, so
that one whose reader has vanished without a word does not keep its place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Final

from flask import Blueprint, Response, abort, jsonify
from flask.typing import ResponseReturnValue

from appliance.engine.jobs import JobId, JobView, ModelCard
from appliance.errors import BadRequest
from appliance.request import LONGEST_PROMPT
from appliance.vault.volume import StoredImage
from appliance.web import words
from appliance.web.border import fields, inside
from appliance.web.care import notices
from appliance.web.offers import FORM_FIELDS, cares, seconds_in_short
from appliance.web.room import Room, room
from appliance.web.sessions import Session

blueprint: Final = Blueprint("progress", __name__, url_prefix="/api")

_BEAT: Final = 5.0          # seconds without news after which the stream says where it is all the same
_LONGEST: Final = 300.0     # seconds of one stream
_ENDED: Final = ("done", "failed", "cancelled")


@blueprint.get("/jobs/<job>")
def job(job: str) -> ResponseReturnValue:
    """Return one job."""
    session = inside()
    view = room().jobs.view(session.id, JobId(job)) or abort(404)
    return jsonify(as_json(room(), session, view))


@blueprint.get("/current")
def current() -> ResponseReturnValue:
    """Return the job to show now, or null, and every picture of the session, oldest first.

    A job can end while the page is between two streams: its pictures are found here.
    """
    session = inside()
    view = room().current(session.id)
    pictures = [picture_as_json(image) for image in reversed(room().vault.images(session.id))]
    return jsonify({"job": None if view is None else as_json(room(), session, view), "pictures": pictures})


@blueprint.get("/jobs/<job>/events")
def events(job: str) -> ResponseReturnValue:
    """Stream the job's progress until it ends."""
    session, here = inside(), room()
    view = here.jobs.view(session.id, JobId(job)) or abort(404)
    if not here.streams.take(session.id):
        raise BadRequest("streams", "every place for watching is taken", hint="ask for the job itself at intervals")
    response = Response(_stream(here, session, view), mimetype="text/event-stream")
    response.call_on_close(lambda: here.streams.give_back(session.id))
    return response


@blueprint.get("/jobs/<job>/preview/<int:revision>")
def preview(job: str, revision: int) -> ResponseReturnValue:
    """Return the newest preview, a JPEG, or 204 for none; the revision only makes each one's address its own."""
    del revision
    session, here = inside(), room()
    found = here.jobs.preview(session.id, JobId(job))
    if found is not None:
        return Response(found, mimetype="image/jpeg")
    # The job has ended since this was asked for: nothing is wrong with that.
    return ("", 204) if here.jobs.view(session.id, JobId(job)) is not None else abort(404)


@blueprint.post("/draft")
def draft() -> ResponseReturnValue:
    """Keep what stands in the form and return what should be said beside it."""
    session = inside()
    form = fields(*FORM_FIELDS)
    if any(len(value) > 2 * LONGEST_PROMPT for value in form.values()):
        return jsonify(notices=[], times={})      # Develop will say that it is too long; keeping it is not worth the memory
    session.draft = dict(form)
    model = room().model
    said = notices(form.get("prompt", ""), model.description.vocabulary if model else None)
    return jsonify(
        notices=[{"kind": notice.kind, "text": notice.text} for notice in said], times=times(form, model)
    )


def times(form: Mapping[str, str], model: ModelCard | None) -> dict[str, str]:
    """Return what each care would cost on this machine, in words: its time once a step was measured, its steps before."""
    seconds, many = room().jobs.step_seconds, form.get("count", "").strip()
    count = int(many) if many.isascii() and many.isdigit() and len(many) < 3 else 1
    return {
        care.id: f"{care.steps} steps" if seconds is None else seconds_in_short(care.steps * seconds * max(1, count))
        for care in (cares(model.description) if model is not None else ())
    }


def as_json(here: Room, session: Session, view: JobView) -> dict[str, object]:
    """Return a job as the script shows it."""
    stored = [image for id_ in view.images if (image := here.vault.get(session.id, id_)) is not None]
    return {
        "id": view.id,
        "state": view.state,
        "revision": view.revision,
        "status": words.status(view, behind=here.behind(session.id, view), engine_is_there=here.engine_is_there),
        "title": words.title(view),
        "done": (view.picture - 1) * view.steps + view.step,
        "total": view.count * view.steps,
        "preview": view.has_preview,
        "pictures": [picture_as_json(image) for image in stored],
        "message": None if view.message is None else words.sentence(view.message),
        "hint": None if view.hint is None else words.sentence(view.hint),
    }


def picture_as_json(image: StoredImage) -> dict[str, object]:
    """Return a finished picture as the script shows it; the seed as text, since it may be beyond what a script counts."""
    return {"id": image.id, "seed": str(image.seed)}


def _stream(here: Room, session: Session, view: JobView) -> Iterator[str]:
    until = time.monotonic() + _LONGEST
    yield "retry: 2000\n\n"
    while True:
        yield f"data: {json.dumps(as_json(here, session, view))}\n\n"
        if view.state in _ENDED or time.monotonic() > until:
            return
        here.sessions.keep(session)
        following = here.jobs.wait(session.id, view.id, view.revision, _BEAT)
        if following is None:
            yield "event: gone\ndata: {}\n\n"
            return
        view = following
