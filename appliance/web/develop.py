"""The page that makes pictures, and the ways to begin one.

The form is filled from the session's draft, which lives on the server: a reload, the back button and a second tab show
what was being written. A form goes to the queue as a `GenerationRequest` or not at all.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from flask import Blueprint, Response, abort, jsonify, make_response, redirect, render_template, url_for
from flask.typing import ResponseReturnValue

from appliance.engine.jobs import JobId, JobView, ModelCard
from appliance.errors import BadRequest
from appliance.request import SAMPLERS, SPACINGS, GenerationRequest
from appliance.vault.volume import ImageId, StoredImage
from appliance.web import words
from appliance.web.border import enter, fields, inside, wants_json
from appliance.web.care import notices
from appliance.web.offers import FORM_FIELDS, cares, form_of, shapes, translate
from appliance.web.progress import as_json, times
from appliance.web.room import room
from appliance.web.sessions import Session

if TYPE_CHECKING:
    from appliance.web.refusals import Refusal

blueprint: Final = Blueprint("develop", __name__)

_SEEDS: Final = 2**32       # of pictures that nobody chose a seed for: short enough to be read aloud
_EXAMPLES: Final = 6
SAMPLER_NAMES: Final = {
    "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler ancestral", "heun": "Heun (two looks a step)", "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE", "unipc": "UniPC", "lcm": "LCM (for LCM models)",
}
SPACING_NAMES: Final = {"model": "As the model was trained", "karras": "Karras", "exponential": "Exponential"}


@blueprint.get("/")
def index() -> ResponseReturnValue:
    """Show the form, and the job that is next to be finished or the latest one."""
    return page(enter())


@blueprint.get("/jobs/<job>")
def of_job(job: str) -> ResponseReturnValue:
    """Show the form with one job."""
    session = inside()
    view = room().jobs.view(session.id, JobId(job))
    return page(session, job=view) if view is not None else abort(404)


@blueprint.get("/pictures/<image>")
def of_picture(image: str) -> ResponseReturnValue:
    """Show the form, filled as this picture was asked for, and the picture."""
    return _with_picture(image, keep_seed=False)


@blueprint.get("/pictures/<image>/seed")
def of_picture_with_seed(image: str) -> ResponseReturnValue:
    """Show the form, filled as this picture was asked for and with its seed, and the picture."""
    return _with_picture(image, keep_seed=True)


@blueprint.post("/jobs")
def begin() -> ResponseReturnValue:
    """Put what the form asks for in the queue."""
    session = inside()
    form = fields(*FORM_FIELDS)
    session.draft = dict(form)
    return _submit(session, translate(form, _model().description))


@blueprint.post("/pictures/<image>/again")
def again(image: str) -> ResponseReturnValue:
    """Put what a picture was asked for in the queue once more, with a new seed."""
    session = inside()
    fields()
    stored = room().vault.get(session.id, ImageId(image)) or abort(404)
    description = _model().description
    return _submit(session, translate(form_of(stored.request, description, seed=None), description))


@blueprint.post("/jobs/<job>/cancel")
def cancel(job: str) -> ResponseReturnValue:
    """Cancel a job; one that has ended already stays as it is."""
    session, here = inside(), room()
    fields()
    here.jobs.cancel(session.id, JobId(job))
    view = here.jobs.view(session.id, JobId(job)) or abort(404)
    return jsonify(as_json(here, session, view)) if wants_json() else redirect(url_for(".of_job", job=job), 303)


@blueprint.post("/examples")
def example() -> ResponseReturnValue:
    """Show the form with one of the model's examples in place of its prompt."""
    session = inside()
    form = fields(*FORM_FIELDS, "example")
    vocabulary = _model().description.vocabulary
    number = form.pop("example", "")
    if vocabulary is None or not (number.isascii() and number.isdigit() and int(number) < len(vocabulary.examples)):
        raise BadRequest("example", "there is no such example", hint="reload the page")
    session.draft = form | {"prompt": vocabulary.examples[int(number)]}
    return page(session)


def page(
    session: Session, *, job: JobView | None = None, picture: StoredImage | None = None,
    form: Mapping[str, str] | None = None, refusal: Refusal | None = None,
) -> Response:
    """Return the whole page around a job or a picture."""
    here, model = room(), room().model
    pictures = here.vault.images(session.id)
    if job is None and picture is None:
        job = here.current(session.id)
    if picture is None and job is not None and job.images and job.state not in ("waiting", "running"):
        picture = here.vault.get(session.id, job.images[-1])
    if job is not None and job.state == "done" and picture is None:
        job = None      # its pictures were forgotten
    filled = session.draft if form is None else form
    return make_response(
        render_template(
            "develop.html",
            session=session, model=model, refusal=refusal, form=filled, job=job, picture=picture, pictures=pictures,
            status=None if job is None else _status(session, job), title=words.title(job),
            notices=notices(filled.get("prompt", ""), model.description.vocabulary if model else None),
            cares=cares(model.description) if model else (), shapes=shapes(model.description) if model else (),
            times=times(filled, model), engine_is_there=here.engine_is_there,
            examples=_examples(model), samplers={name: SAMPLER_NAMES[name] for name in SAMPLERS},
            spacings={name: SPACING_NAMES[name] for name in SPACINGS}, idle=here.idle_in_words,
        )
    )


def _with_picture(image: str, *, keep_seed: bool) -> Response:
    session = inside()
    stored = room().vault.get(session.id, ImageId(image)) or abort(404)
    model = room().model
    if model is not None:
        session.draft = form_of(stored.request, model.description, seed=stored.seed if keep_seed else None)
    return page(session, picture=stored)


def _submit(session: Session, asked: Mapping[str, object]) -> ResponseReturnValue:
    request = GenerationRequest.parse(asked, _model().description, fresh_seed=secrets.randbelow(_SEEDS))
    job = room().jobs.submit(session.id, request)
    if wants_json():
        view = room().current(session.id) or abort(404)
        return jsonify(as_json(room(), session, view)), 201
    return redirect(url_for(".of_job", job=job), 303)


def _model() -> ModelCard:
    model = room().model
    if model is None:
        raise BadRequest(
            "engine_starting", "the engine is being started and has not said yet what it can draw",
            hint="wait a few seconds and press Develop again",
        )
    return model


def _status(session: Session, job: JobView) -> str:
    return words.status(job, behind=room().behind(session.id, job), engine_is_there=room().engine_is_there)


def _examples(model: ModelCard | None) -> list[tuple[int, str]]:
    """Return a few examples with their numbers: the number is what a form sends, so that no prompt is in it."""
    if model is None or model.description.vocabulary is None:
        return []
    return list(enumerate(model.description.vocabulary.examples))[:_EXAMPLES]
