"""The engine's process: it verifies a bundle, loads it, and then answers orders on one wire until that closes.

In order:

1. Close itself off, before a byte of the bundle is read: no engine outlives the one who reaps it, and none gets out.
2. Verify. Nothing of the bundle is loaded, and onnxruntime is not even imported, before every digest has been compared.
3. Load, say hello, and report ready.
4. One job at a time. A reading thread takes the orders, so that a cancel is seen between two steps; another one shows the
   supervisor signs of life, and tries the ways out when it asks.

A failed job is reported with its reason and the engine goes on; anything unforeseen ends the process, and the supervisor
starts another. What is said on standard error is the reason of a refusal, and never a traceback: those show arguments.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.engine import wire
from appliance.errors import Cancelled, DarkroomError
from appliance.evidence.journal import Event, EventPipe
from appliance.link import ALIVE, LARGEST_MESSAGE, MODEL, PROBE, REPORT, SECONDS
from appliance.request import GenerationRequest
from appliance.seal.confine import Standing, close_off_child, fall_silent
from appliance.seal.probes import Errand, pack, probe_self
from appliance.trust.description import PLACE, ModelDescription
from appliance.trust.verify import TrustedKey, VerifiedModel, verify

if TYPE_CHECKING:
    from appliance.engine.pipeline import Pipeline, StepProgress

_PULSE: Final = 1.0             # seconds between two signs of life
_WAITING_ORDERS: Final = 64     # the worker sends one job at a time; more than this is no worker of ours


@dataclass(frozen=True)
class Descriptors:
    """What the supervisor hands down: the wire, the event pipe, its link, and the walls of the engine."""

    wire: int
    events: int
    link: int
    filter: int
    ruleset: int | None


def run(*, bundle: Path, trusted: Sequence[Path], threads: int | None, descriptors: Descriptors, supervisor: int) -> None:
    """Serve one worker until it closes the wire. Raises `VerificationRefused`, `EngineError`, `BadRequest`, `NotSealed`."""
    standing = close_off_child(
        supervisor, expendable=True, filter_fd=descriptors.filter, ruleset_fd=descriptors.ruleset
    )
    end, events = socket.socket(fileno=descriptors.wire), EventPipe(descriptors.events)
    link = socket.socket(fileno=descriptors.link)
    started = time.monotonic()
    model = verify(bundle, [TrustedKey.load(path) for path in trusted])
    events.say(Event.ENGINE_VERIFIED, len(model.digests), sum(len(model.read(path)) for path in model.digests) >> 20)

    # Importing onnxruntime starts threads and maps its libraries: only for a model that was verified.
    from appliance.engine.pipeline import Pipeline

    pipeline = Pipeline(model, threads=threads)
    hello, description = _hello(model), model.description
    del model       # the verified bytes go: ONNX Runtime has taken in what it needs of them
    link.send(MODEL + hello.digest.encode("ascii") + hello.key_fingerprint.encode("ascii"))
    desk = _Desk(end, events, description, pipeline)
    threading.Thread(target=_attend, args=(link, desk, standing), name="supervisor-link", daemon=True).start()
    # The reason of a refusal is said; from here on there are prompts, and nothing to say.
    fall_silent()
    # Ready first: a hello with a long licence waits for the worker to read it, and the worker is not there before ready.
    events.say(Event.ENGINE_READY, round(1000 * (time.monotonic() - started)))
    wire.send(end, hello)
    desk.serve()


def _attend(link: socket.socket, desk: _Desk, standing: Standing) -> None:
    """Show the supervisor a sign of life every second, and report on this process when it asks."""
    link.settimeout(_PULSE)
    while True:
        try:
            message = link.recv(LARGEST_MESSAGE)
        except TimeoutError:
            message = b""
        else:
            if not message:
                os._exit(1)     # the supervisor is gone: so is this process, in a moment
        if message[:1] == PROBE:
            found = probe_self("engine", Errand.unpack(message[1:]), standing)
            link.send(REPORT + pack(found))
        link.send(ALIVE + SECONDS.pack(desk.step_seconds))


def _hello(model: VerifiedModel) -> wire.Hello:
    return wire.Hello(
        bytes(model.read(PLACE)), model.digest, model.key_fingerprint, dict(model.digests), model.licence_text
    )


class _Desk:
    """Takes orders on one thread and works them off on another, one at a time."""

    def __init__(
        self, end: socket.socket, events: EventPipe, description: ModelDescription, pipeline: Pipeline
    ) -> None:
        self._end = end
        self._events = events
        self._description = description
        self._pipeline = pipeline
        self._orders: queue.Queue[wire.Generate | None] = queue.Queue(_WAITING_ORDERS)
        self._cancelled: set[int] = set()
        self._gone = threading.Event()
        self._step_began: float | None = None       # None while there is no job

    @property
    def step_seconds(self) -> int:
        """For how long the present step has been under way."""
        began = self._step_began
        return 0 if began is None else round(time.monotonic() - began)

    def serve(self) -> None:
        """Work until the wire closes."""
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        while (order := self._orders.get()) is not None:
            self._step_began = time.monotonic()
            self._work(order)
            self._step_began = None
            self._cancelled.discard(order.job)

    def _listen(self) -> None:
        try:
            while (order := wire.receive_order(self._end)) is not None:
                match order:
                    case wire.Cancel(job):
                        self._cancelled.add(job)
                    case wire.Generate():
                        self._orders.put_nowait(order)
        except (wire.WireError, OSError, queue.Full):
            with contextlib.suppress(OSError):       # it may have hung up already
                self._end.shutdown(socket.SHUT_RDWR)     # a worker that breaks the rules is not answered any more
        finally:
            self._gone.set()
            self._orders.put(None)

    def _work(self, order: wire.Generate) -> None:
        started = time.monotonic()
        try:
            # The worker parsed this already; the engine does not take its word for it.
            request = GenerationRequest.parse(order.fields, self._description, fresh_seed=0)
            for number, picture in enumerate(
                self._pipeline.generate(
                    request, on_step=_Steps(self._end, order.job), cancelled=lambda: self._stopped_between_steps(order.job)
                ),
                start=1,
            ):
                from appliance.engine.image import encode_png

                wire.send(self._end, wire.Picture(order.job, number, picture.seed, picture.variant, encode_png(picture.pixels)))
        except OSError:
            self._gone.set()        # the worker has closed the wire: the pictures have nowhere to go
        except DarkroomError as error:
            cancelled = isinstance(error, Cancelled)
            self._events.say(Event.JOB_CANCELLED if cancelled else Event.JOB_FAILED)
            self._answer(wire.Failed(order.job, error.reason, str(error), error.hint))
        else:
            self._events.say(Event.JOB_DONE, request.count, round(1000 * (time.monotonic() - started)))
            self._answer(wire.Finished(order.job))

    def _stopped_between_steps(self, job: int) -> bool:
        """Say whether the job was cancelled; asked between two steps, so that a new one begins here."""
        self._step_began = time.monotonic()
        return job in self._cancelled or self._gone.is_set()

    def _answer(self, report: wire.Report) -> None:
        try:
            wire.send(self._end, report)
        except OSError:
            self._gone.set()


class _Steps:
    """Tells the worker of every step, with the time that it took."""

    def __init__(self, end: socket.socket, job: int) -> None:
        self._end = end
        self._job = job
        self._last = time.monotonic()

    def __call__(self, progress: StepProgress) -> None:
        from appliance.engine.image import encode_jpeg

        now = time.monotonic()
        seconds, self._last = now - self._last, now
        wire.send(
            self._end,
            wire.Progress(
                self._job, progress.image_index + 1, progress.step, progress.steps, seconds, encode_jpeg(progress.preview)
            ),
        )
