"""The border of the pages: what a request must be before any view sees it, and what every answer carries.

In order, for every request:

1. The Host is one of ours, or 421: a name that somebody pointed at this machine (DNS rebinding) is answered with nothing.
2. The session is looked up; a page starts one, nothing else does. A page that another site linked to is answered with a
   step inside first, since the browser withholds the cookie on that way and a new one would bury the visitor's session.
3. A method that changes something comes from our own pages: Sec-Fetch-Site says same-origin where it is sent, and Origin
   is ours. Under `Referrer-Policy: no-referrer` a browser sends `Origin: null` with its own forms (Fetch, "append a request
   Origin header"), which is therefore taken together with Sec-Fetch-Site alone, a header that no page can forge.
4. Its body is a small urlencoded form, read whole into memory and parsed strictly here: nothing is spooled to a disk, and
   what is not UTF-8, or says a field twice, is refused.
5. It carries its session's token.

Every answer carries the headers below, `no-store` on everything included: the style sheet too, so that a browser's disk
holds nothing of this appliance.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from io import BytesIO
from typing import IO, Any, Final
from urllib.parse import parse_qsl

from flask import Flask, Response, abort, g, make_response, render_template, request
from flask import Request as FlaskRequest

from appliance.errors import BadRequest
from appliance.web.room import Room, room
from appliance.web.sessions import Session

LARGEST_BODY: Final = 256 * 1024    # bytes: two of the longest prompts fit, with every character four times %XX
_MOST_FIELDS: Final = 32
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_CSP: Final = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types 'none'",
))
HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": _CSP,
    "Cache-Control": "no-store",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": ", ".join(
        f"{feature}=()" for feature in (
            "accelerometer", "autoplay", "browsing-topics", "camera", "display-capture", "encrypted-media", "fullscreen",
            "geolocation", "gyroscope", "hid", "idle-detection", "magnetometer", "microphone", "midi", "payment",
            "picture-in-picture", "publickey-credentials-get", "screen-wake-lock", "serial", "usb",
            "xr-spatial-tracking",
        )
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Request(FlaskRequest):
    """A request that never leaves memory, whoever should ask for its form."""

    def _get_file_stream(self, *_: Any, **__: Any) -> IO[bytes]:
        # Werkzeug's own spools to a temporary file beyond 500 kB.
        return BytesIO()


class SessionEnded(BadRequest):
    """A form of a session that is no more, or of nobody's."""

    def __init__(self) -> None:
        super().__init__(
            "session_ended", "the session that this page belonged to has ended, and its pictures are gone",
            hint="nothing was begun: press the button again",
        )


def install(app: Flask) -> None:
    """Put the border around every route of the application."""
    app.request_class = Request
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    app.config["MAX_FORM_MEMORY_SIZE"] = LARGEST_BODY
    app.config["MAX_FORM_PARTS"] = _MOST_FIELDS
    app.before_request(_check)
    app.after_request(_dress)


def enter() -> Session:
    """Return the session of the one who asks for a page, a new one for a newcomer. Raises `TooManySessions`."""
    if g.session is None:
        if request.headers.get("Sec-Fetch-Site") == "cross-site":
            abort(make_response(render_template("step.html"), 200))
        g.new_cookie, g.session = room().sessions.start()
    session: Session = g.session
    return session


def leave() -> None:
    """End the session of the one who asks and have its browser forget the cookie."""
    if g.session is not None:
        room().sessions.end(g.session)
        g.session, g.left = None, True


def inside() -> Session:
    """Return the session of the one who asks for something of a session's own; 404 for nobody, as for an unknown id."""
    session: Session | None = g.session
    if session is None:
        abort(404)
    return session


def fields(*known: str) -> dict[str, str]:
    """Return the form without its token. Raises `BadRequest` for a field that this route does not have."""
    form: dict[str, str] = g.form
    if set(form) - set(known):
        raise BadRequest("unknown_field", "the form holds a field that this page does not have", hint="reload the page")
    return form


def wants_json() -> bool:
    """Whether the one who asks is a program or a script of the page."""
    return request.path.startswith("/api/") or (
        request.accept_mimetypes.best_match(["text/html", "application/json"]) == "application/json"
    )


def _check() -> None:
    g.session, g.new_cookie, g.left, g.form = None, None, False, {}
    here: Room = room()
    host = request.environ.get("HTTP_HOST", "").lower()
    if host not in here.settings.allowed_hosts:
        abort(421)
    g.session = here.sessions.find(request.cookies.get(_cookie_name(host)))
    if request.method in _SAFE:
        return
    _from_our_own_page(host)
    form = _strict_form()
    token = form.pop("csrf", "")
    g.form = form
    if g.session is None or not secrets.compare_digest(token.encode(), g.session.csrf.encode()):
        raise SessionEnded
    g.session.used = True


def _from_our_own_page(host: str) -> None:
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    ours = f"{request.scheme}://{host}"
    if site not in (None, "same-origin") or origin not in (None, ours, "null") or (origin == "null" and site is None):
        raise BadRequest(
            "foreign_origin", "this was sent by a page that is not Darkroom's", hint="open Darkroom itself and do it there"
        )


def _strict_form() -> dict[str, str]:
    body = request.get_data(cache=False)
    if len(body) >= LARGEST_BODY:
        abort(413)      # Werkzeug 3.1 refuses a longer Content-Length itself, and cuts a chunked body off at the limit
    if request.mimetype != "application/x-www-form-urlencoded":
        abort(415)
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=bool(body), errors="strict",
            max_num_fields=_MOST_FIELDS,
        )
    except ValueError:      # UnicodeDecodeError is one
        raise BadRequest("form", "the form could not be read as UTF-8 text", hint="type the text anew as plain text") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise BadRequest("form", "the form says a field twice", hint="reload the page")
    return form


def _dress(response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers[name] = value
    if "Server" in response.headers:
        del response.headers["Server"]
    name = _cookie_name(request.environ.get("HTTP_HOST", "").lower())
    if g.get("new_cookie") is not None:
        response.set_cookie(name, g.new_cookie, httponly=True, samesite="Strict", path="/")
    elif g.get("left"):
        response.delete_cookie(name, httponly=True, samesite="Strict", path="/")
        # ASVS 5.0, 14.3.1; "cache" also empties the back/forward cache in Chromium.
        response.headers["Clear-Site-Data"] = '"cache", "storage"'
    return response


def _cookie_name(host: str) -> str:
    # Cookies know no ports (RFC 6265, section 8.5): two appliances on one machine must not overwrite each other's.
    _, _, port = host.rpartition(":")
    return f"darkroom-{port}" if port.isascii() and port.isdigit() else "darkroom"
