"""How the pages say no: a status, a slug for programs, a sentence, and what to do; never an exception's insides.

A script gets JSON, a person gets a page in the usual look. What somebody wrote comes back in the form, so that a refusal
never costs a prompt. What is unforeseen is a 500 with one sentence; its traceback goes nowhere, because tracebacks show
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flask import Flask, Response, g, jsonify, make_response, render_template, request
from werkzeug.exceptions import HTTPException

from appliance.errors import BadRequest, DarkroomError, EngineError, QueueFull, VaultError
from appliance.web import border
from appliance.web.room import room
from appliance.web.sessions import TooManySessions

_HTTP: Final = {
    400: ("bad_request", "the request could not be read", "go back and try again"),
    404: ("not_found", "there is nothing here", "it may have been forgotten, or was never here: begin on the first page"),
    405: ("method", "this page does not answer to that", "go back and try again"),
    413: ("too_large", "that is far more than a prompt can be", "go back and shorten it: at most 4,000 characters are read"),
    415: ("form_type", "only forms are read here", "send the fields as application/x-www-form-urlencoded"),
    421: ("host", "this address is not one under which Darkroom answers", "open the address that Darkroom printed"),
}
_UNFORESEEN: Final = ("unexpected", "something went wrong in the appliance", "try again; if it happens again, start it anew")


@dataclass(frozen=True)
class Refusal:
    """What is told to the one who asked."""

    status: int
    reason: str
    message: str
    hint: str | None
    retry_after: int | None = None


def install(app: Flask) -> None:
    """Answer every way in which a request can end badly."""
    app.register_error_handler(DarkroomError, lambda error: answer(_of(error)))
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unforeseen)


def answer(refusal: Refusal) -> Response:
    """Return the refusal as JSON or as a page."""
    if refusal.status >= 500:
        room().on_failure(refusal.status)
    if border.wants_json():
        response = _as_json(refusal)
    elif refusal.status == 421:
        # A stranger's name for this machine is not shown a page of ours.
        response = make_response(f"{refusal.message}\n", {"Content-Type": "text/plain; charset=utf-8"})
    else:
        response = _as_page(refusal)
    response.status_code = refusal.status
    if refusal.retry_after is not None:
        response.headers["Retry-After"] = str(refusal.retry_after)
    return response


def _as_json(refusal: Refusal) -> Response:
    said = {"error": refusal.reason, "message": refusal.message, "hint": refusal.hint}
    if refusal.reason == "session_ended" and request.endpoint == "develop.begin":
        # So that Develop works when it is pressed again. Only a page of ours gets here: its origin was checked before.
        said["csrf"] = border.enter().csrf
    return jsonify(said)


def _as_page(refusal: Refusal) -> Response:
    from appliance.web import develop

    if refusal.reason == "session_ended":
        border.enter()
    if request.method == "POST" and "prompt" in g.get("form", {}) and g.get("session") is not None:
        return develop.page(g.session, form=g.form, refusal=refusal)
    return make_response(render_template("refused.html", refusal=refusal, session=g.get("session")))


def _of(error: DarkroomError) -> Refusal:
    retry_after: int | None = None
    match error:
        case QueueFull():
            status, retry_after = 429, error.retry_after
        case border.SessionEnded():
            status = 403
        case TooManySessions():
            status, retry_after = 503, 60
        case BadRequest(reason="foreign_origin"):
            status = 403
        case BadRequest(reason="engine_starting" | "streams"):
            status, retry_after = 503, 3
        case BadRequest():
            status = 400
        case VaultError():
            status = 507
        case EngineError():
            status = 503
        case _:
            return Refusal(500, *_UNFORESEEN)
    return Refusal(status, error.reason, str(error), error.hint, retry_after)


def _http(error: HTTPException) -> Response:
    if error.response is not None:
        return make_response(error.response)
    status = error.code or 500
    if status == 308 or status < 400:
        return make_response(error.get_response())
    return answer(Refusal(status, *_HTTP.get(status, _HTTP[400] if status < 500 else _UNFORESEEN)))


def _unforeseen(_: Exception) -> Response:
    return answer(Refusal(500, *_UNFORESEEN))
