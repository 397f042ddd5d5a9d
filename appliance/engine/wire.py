"""What the worker and the engine say to each other: frames on a socket pair, parsed under limits.

A frame is two big-endian 32-bit lengths, a JSON object of the first length and raw bytes of the second. Never pickle:
either end may have been taken over, and a length-prefixed JSON object can be refused where a pickle would already have
run. The worker is the one with something to lose, so every message from the engine becomes a typed, checked value here
or a `WireError`, after which the wire is closed and the engine replaced.

Prompts and pictures pass through here. They are hidden from `repr`, and no `WireError` quotes what it read.

>>> ours, theirs = socket.socketpair()
>>> send(ours, Cancel(job=3))
>>> receive_order(theirs)
Cancel(job=3)
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import EngineError
from appliance.request import FIELDS, GenerationRequest

LARGEST_HEADER: Final = 4 << 20     # bytes: a description with a large vocabulary, a licence text
LARGEST_BODY: Final = 256 << 20     # bytes: the PNG of the largest picture that a description may allow
_LENGTHS: Final = struct.Struct(">II")


class WireError(EngineError):
    """The other end said something that this end does not accept."""

    def __init__(self, fact: str) -> None:
        super().__init__("wire", f"the engine's wire carried a frame that was refused: {fact}")


# ── From the worker to the engine ─────────────────────────────────────────────


@dataclass(frozen=True)
class Generate:
    """Make the pictures of one request; the engine parses `fields` anew against its own model."""

    job: int
    fields: Mapping[str, object] = field(repr=False)

    @classmethod
    def of(cls, job: int, request: GenerationRequest) -> Generate:
        return cls(job, {name: getattr(request, name) for name in sorted(FIELDS)})


@dataclass(frozen=True)
class Cancel:
    """Stop a job within one step; a job that has ended is no error."""

    job: int


# ── From the engine to the worker ─────────────────────────────────────────────


@dataclass(frozen=True)
class Hello:
    """The model that was verified: sent once, before anything else."""

    description: bytes = field(repr=False)      # the verified bytes of model.json
    digest: str
    key_fingerprint: str
    digests: Mapping[str, str] = field(repr=False)
    licence_text: str = field(repr=False)


@dataclass(frozen=True)
class Progress:
    """One step is done; `preview` is a small JPEG."""

    job: int
    picture: int        # from 1
    step: int           # from 1
    steps: int
    seconds: float      # what this step took
    preview: bytes = field(repr=False)


@dataclass(frozen=True)
class Picture:
    """One picture is finished; `png` carries no metadata."""

    job: int
    picture: int
    seed: int
    variant: str
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Finished:
    """Every picture of the job has been sent."""

    job: int


@dataclass(frozen=True)
class Failed:
    """The job ended without its pictures; the three texts hold no content."""

    job: int
    reason: str
    message: str
    hint: str | None


Order = Generate | Cancel
Report = Hello | Progress | Picture | Finished | Failed


def send(end: socket.socket, message: Order | Report) -> None:
    """Write one message; blocks until the kernel has taken it all. Raises `OSError` when the other end is gone."""
    match message:
        case Generate(job, fields):
            header, body = {"kind": "generate", "job": job, "fields": dict(fields)}, b""
        case Cancel(job):
            header, body = {"kind": "cancel", "job": job}, b""
        case Hello(description, digest, key, digests, licence):
            header = {"kind": "hello", "digest": digest, "key": key, "digests": dict(digests), "licence": licence}
            body = description
        case Progress(job, picture, step, steps, seconds, preview):
            header = {"kind": "progress", "job": job, "picture": picture, "step": step, "steps": steps, "seconds": seconds}
            body = preview
        case Picture(job, picture, seed, variant, png):
            header = {"kind": "picture", "job": job, "picture": picture, "seed": seed, "variant": variant}
            body = png
        case Finished(job):
            header, body = {"kind": "finished", "job": job}, b""
        case Failed(job, reason, text, hint):
            header, body = {"kind": "failed", "job": job, "reason": reason, "message": text, "hint": hint}, b""
    encoded = json.dumps(header, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(encoded) > LARGEST_HEADER or len(body) > LARGEST_BODY:
        raise WireError("larger than a frame may be")
    end.sendall(_LENGTHS.pack(len(encoded), len(body)) + encoded)
    if body:
        end.sendall(body)


def receive_order(end: socket.socket) -> Order | None:
    """Return the next order from the worker, or None when the worker is gone. Raises `WireError`."""
    frame = _receive(end)
    if frame is None:
        return None
    header, _ = frame
    match header.pop("kind", None):
        case "generate":
            fields = header.pop("fields", None)
            if not isinstance(fields, dict):
                raise WireError("a generate without fields")
            order: Order = Generate(_whole(header, "job"), fields)
        case "cancel":
            order = Cancel(_whole(header, "job"))
        case _:
            raise WireError("an order of no known kind")
    _nothing_left(header)
    return order


def receive_report(end: socket.socket) -> Report | None:
    """Return the next report from the engine, or None when the engine is gone. Raises `WireError`."""
    frame = _receive(end)
    if frame is None:
        return None
    header, body = frame
    report: Report
    match header.pop("kind", None):
        case "hello":
            digests = header.pop("digests", None)
            if not isinstance(digests, dict) or not all(isinstance(v, str) for v in digests.values()):
                raise WireError("digests that are no object of texts")
            report = Hello(body, _text(header, "digest"), _text(header, "key"), digests, _text(header, "licence"))
        case "progress":
            report = Progress(
                job=_whole(header, "job"), picture=_whole(header, "picture"), step=_whole(header, "step"),
                steps=_whole(header, "steps"), seconds=_seconds(header), preview=body,
            )
        case "picture":
            if not body.startswith(b"\x89PNG\r\n\x1a\n"):
                raise WireError("a picture that is no PNG")
            report = Picture(
                job=_whole(header, "job"), picture=_whole(header, "picture"), seed=_whole(header, "seed"),
                variant=_text(header, "variant"), png=body,
            )
        case "finished":
            report = Finished(_whole(header, "job"))
        case "failed":
            hint = header.pop("hint", None)
            if hint is not None and not isinstance(hint, str):
                raise WireError("a hint that is no text")
            report = Failed(_whole(header, "job"), _text(header, "reason"), _text(header, "message"), hint)
        case _:
            raise WireError("a report of no known kind")
    _nothing_left(header)
    return report


def _receive(end: socket.socket) -> tuple[dict[str, object], bytes] | None:
    lengths = _exactly(end, _LENGTHS.size, or_nothing=True)
    if lengths is None:
        return None
    header_length, body_length = _LENGTHS.unpack(lengths)
    if header_length > LARGEST_HEADER or body_length > LARGEST_BODY:
        raise WireError("larger than a frame may be")
    encoded, body = _exactly(end, header_length), _exactly(end, body_length)
    if encoded is None or body is None:
        raise WireError("cut short")
    try:
        header = json.loads(encoded, parse_constant=_no_constants)
    except (ValueError, RecursionError):
        header = None       # and not the error itself, whose text quotes the document
    if not isinstance(header, dict):
        raise WireError("not a JSON object")
    return header, bytes(body)


def _exactly(end: socket.socket, length: int, *, or_nothing: bool = False) -> bytearray | None:
    """Read `length` bytes; None at an end of file where one is expected. Memory grows with what has really arrived."""
    read = bytearray()
    while len(read) < length:
        try:
            part = end.recv(min(length - len(read), 1 << 20))
        except ConnectionError:
            part = b""
        if not part:
            if or_nothing and not read:
                return None
            raise WireError("cut short")
        read += part
    return read


def _no_constants(_: str) -> float:
    raise ValueError("not a JSON number")


def _whole(header: dict[str, object], key: str) -> int:
    value = header.pop(key, None)
    if type(value) is not int or not 0 <= value < 2**63:
        raise WireError(f"no whole number where {key} belongs")
    return value


def _text(header: dict[str, object], key: str) -> str:
    value = header.pop(key, None)
    if not isinstance(value, str):
        raise WireError(f"no text where {key} belongs")
    return value


def _seconds(header: dict[str, object]) -> float:
    value = header.pop("seconds", None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise WireError("no number where seconds belongs")
    return float(value)


def _nothing_left(header: dict[str, object]) -> None:
    if header:
        raise WireError("a field of no known name")
