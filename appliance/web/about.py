"""Pages that say what is so: the model, privacy, and that a session is forgotten."""

from __future__ import annotations

from typing import Final

from flask import Blueprint, render_template
from flask.typing import ResponseReturnValue

from appliance.web.border import enter
from appliance.web.room import room

blueprint: Final = Blueprint("about", __name__)


@blueprint.get("/model")
def model() -> ResponseReturnValue:
    """Show the model: what it is, what it may be used for, and what was verified."""
    return render_template("model.html", session=enter(), model=room().model, engine_is_there=room().engine_is_there)


@blueprint.get("/privacy")
def privacy() -> ResponseReturnValue:
    """Show what is kept, where and until when."""
    return render_template("privacy.html", session=enter(), idle=room().idle_in_words)


@blueprint.get("/forgotten")
def forgotten() -> ResponseReturnValue:
    """Show that a session has ended; no new one is begun by that."""
    return render_template("forgotten.html", session=None)
