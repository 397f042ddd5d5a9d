"""The door to the pages: `create_app` puts blueprints, border and errors together and holds no state of its own.

    develop     the page that makes pictures, and what it may be asked to begin
    progress    how a picture comes along: JSON, a stream of events, previews, the draft
    pictures    what the session has: contact sheet, files, forgetting
    about       the model, privacy
    status      whether the room is sealed, and what that was concluded from; every page shows the conclusion

What is refused, and how, is said in `border` and `refusals`.
"""

from __future__ import annotations

from collections.abc import Callable

from flask import Flask

from appliance.engine.jobs import JobQueue
from appliance.vault.volume import Vault
from appliance.web import about, border, develop, pictures, progress, refusals, status, words
from appliance.web.room import EXTENSION, Room, Seal, WebSettings

__all__ = ["WebSettings", "create_app"]


class _Pages(Flask):
    """Flask without a word to any log: an exception's text and a request's path may hold content."""

    def log_exception(self, *_: object) -> None:
        return


def _say_nothing(_status: int) -> None:
    return


def create_app(
    *,
    jobs: JobQueue,
    vault: Vault,
    settings: WebSettings,
    on_failure: Callable[[int], None] = _say_nothing,
    seal: Seal | None = None,
) -> Flask:
    """Return the pages over this queue and this vault.

    `on_failure` is told the status of a request that went wrong here; `seal` is what the pages say of the seal, and without
    one they say that nothing is known of it.
    """
    app = _Pages(__name__)
    app.logger.disabled = True
    app.extensions[EXTENSION] = Room(jobs, vault, settings, on_failure, seal or Seal())
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    border.install(app)
    refusals.install(app)
    words.install(app)
    status.install(app)
    for blueprint in (develop.blueprint, progress.blueprint, pictures.blueprint, about.blueprint, status.blueprint):
        app.register_blueprint(blueprint)
    return app
