"""The engine's process: it verifies a bundle, loads it, and then answers orders on one wire until that closes.

In order:

1. Die with the supervisor: no engine outlives the one who reaps it.
2. Verify. Nothing of the bundle is loaded, and onnxruntime is not even imported, before every digest has been compared.
3. Load, say hello, and report ready.
4. One job at a time. A reading thread takes the orders, so that a cancel is seen between two steps.

A failed job is reported with its reason and the engine goes on; anything unforeseen ends the process, and the supervisor
starts another. What is said on standard error is the reason of a refusal, and never a traceback: those show arguments.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.engine import wire
from appliance.errors import Cancelled, DarkroomError
from appliance.evidence.journal import Event, EventPipe
from appliance.request import GenerationRequest
from appliance.seal.confine import settle
from appliance.trust.description import PLACE, ModelDescription
from appliance.trust.verify import TrustedKey, VerifiedModel, verify

if TYPE_CHECKING:
    from appliance.engine.pipeline import Pipeline, StepProgress

_WAITING_ORDERS: Final = 64     # the worker sends one job at a time; more than this is no worker of ours


def run(
    *, bundle: Path, trusted: Sequence[Path], threads: int | None, end: socket.socket, events: EventPipe, supervisor: int
) -> None:
    """Serve one worker until it closes the wire. Raises `VerificationRefused`, `EngineError`, `BadRequest`."""
    settle(supervisor, expendable=True)
    started = time.monotonic()
    model = verify(bundle, [TrustedKey.load(path) for path in trusted])
    events.say(Event.ENGINE_VERIFIED, len(model.digests), sum(len(model.read(path)) for path in model.digests) >> 20)

    # Importing onnxruntime starts threads and maps its libraries: only for a model that was verified.
    from appliance.engine.pipeline import Pipeline

    pipeline = Pipeline(model, threads=threads)
    hello, description = _hello(model), model.description
    del model       # the verified bytes go: ONNX Runtime has taken in what it needs of them
    # Ready first: a hello with a long licence waits for the worker to read it, and the worker is not there before ready.
    events.say(Event.ENGINE_READY, round(1000 * (time.monotonic() - started)))
    wire.send(end, hello)
    _Desk(end, events, description, pipeline).serve()


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

    def serve(self) -> None:
        """Work until the wire closes."""
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        while (order := self._orders.get()) is not None:
            self._work(order)
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
                    request, on_step=_Steps(self._end, order.job), cancelled=lambda: self._stopped(order.job)
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

    def _stopped(self, job: int) -> bool:
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
