"""What the session has made: the contact sheet, each picture's file, and forgetting one or all."""

from __future__ import annotations

from typing import Final

from flask import Blueprint, Response, abort, jsonify, redirect, render_template, url_for
from flask.typing import ResponseReturnValue

from appliance.vault.volume import ImageId
from appliance.web.border import enter, fields, inside, leave, wants_json
from appliance.web.room import room

blueprint: Final = Blueprint("pictures", __name__)


@blueprint.get("/pictures")
def sheet() -> ResponseReturnValue:
    """Show every picture of the session."""
    session = enter()
    return render_template(
        "sheet.html", session=session, pictures=room().vault.images(session.id), idle=room().idle_in_words
    )


@blueprint.get("/pictures/<image>/png")
def file(image: str) -> ResponseReturnValue:
    """Return one picture; the name under which it would be saved holds its seed and nothing of the prompt."""
    stored = room().vault.get(inside().id, ImageId(image)) or abort(404)
    return Response(
        stored.png, mimetype="image/png",
        headers={"Content-Disposition": f'inline; filename="darkroom-{stored.seed}.png"'},
    )


@blueprint.post("/pictures/<image>/forget")
def forget(image: str) -> ResponseReturnValue:
    """Drop one picture."""
    session = inside()
    fields()
    if not room().vault.delete(session.id, ImageId(image)):
        abort(404)
    return jsonify(forgotten=image) if wants_json() else redirect(url_for("develop.index"), 303)


@blueprint.post("/forget")
def forget_everything() -> ResponseReturnValue:
    """End the session: its jobs, its pictures, its draft and its cookie."""
    fields()
    leave()
    return redirect(url_for("about.forgotten"), 303)
