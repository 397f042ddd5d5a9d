"""The bounded queue in front of the engine, and the worker's end of the engine's wire.

What holds:

1. A job belongs to the session that asked for it. Every question names both; a job of somebody else is answered exactly
   as one that never was.
2. At most `capacity` jobs wait. One more is refused with the seconds after which to try again, and changes nothing.
3. One job is with the engine at a time, in the order of arrival.
4. When the engine ends, the job that it had fails with the reason, the ones that wait go on waiting, and `attach` gives
   them the next engine.
5. State lives here, on the server: a reload, a second tab and a page without JavaScript see the same `JobView`.

A finished job is remembered until its session has had `REMEMBERED` later ones, so that memory is bounded.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import secrets
import socket
import statistics
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NewType

from appliance.engine import wire
from appliance.errors import BadRequest, DarkroomError, QueueFull, VerificationRefused
from appliance.request import GenerationRequest
from appliance.trust.description import ModelDescription
from appliance.vault.volume import ImageId, SessionId, Vault

JobId = NewType("JobId", str)
JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
REMEMBERED: Final = 20
_ENDED_SESSIONS: Final = 4096   # remembered, so that a request that was under way when its session ended begins nothing
_MEASURED: Final = 32       # step times that the estimate is taken over
_ONE_SECOND: Final = struct.pack("ll", 1, 0)    # a timeval


@dataclass(frozen=True)
class ModelCard:
    """The verified model that the engine has loaded, as the pages show it."""

    description: ModelDescription
    digest: str
    key_fingerprint: str
    digests: Mapping[str, str]
    licence_text: str


@dataclass(frozen=True)
class JobView:
    """A job as it is at one moment; `revision` changes with everything else here but the clock's `seconds_left`."""

    id: JobId
    state: JobState
    place: int                      # jobs ahead of this one
    step: int                       # of the current picture, done
    steps: int
    picture: int                    # from 1
    count: int
    seconds_left: float | None      # None until a step has been measured
    reason: str | None              # slug, for programs
    message: str | None             # for people
    hint: str | None
    images: tuple[ImageId, ...]
    revision: int
    has_preview: bool


@dataclass
class _Job:
    id: JobId
    number: int                     # what the engine knows it by
    session: SessionId
    request: GenerationRequest = field(repr=False)
    state: JobState = "waiting"
    step: int = 0
    picture: int = 1
    cancelled: bool = False
    reason: str | None = None
    message: str | None = None
    hint: str | None = None
    images: list[ImageId] = field(default_factory=list)
    preview: bytes | None = field(default=None, repr=False)
    revision: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class JobQueue:
    """Jobs of every session, one engine at a time; safe to use from several threads."""

    def __init__(self, vault: Vault, *, capacity: int, on_engine: Callable[[bool], None]) -> None:
        """Make an empty queue; `on_engine` is told, outside the lock, when an engine has said hello and when it is gone."""
        self._vault = vault
        self._capacity = capacity
        self._on_engine = on_engine
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._jobs: dict[JobId, _Job] = {}
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._model: ModelCard | None = None
        self._engine: socket.socket | None = None
        self._step_times: deque[float] = deque(maxlen=_MEASURED)
        self._ended: deque[SessionId] = deque(maxlen=_ENDED_SESSIONS)

    # ── What the pages ask ────────────────────────────────────────────────────

    @property
    def model(self) -> ModelCard | None:
        """The model of the running engine; None while it starts or is being replaced."""
        with self._changed:
            return self._model

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of one step on this machine, over the latest ones; None before the first."""
        with self._changed:
            return self._typical_step()

    def submit(self, session: SessionId, request: GenerationRequest) -> JobId:
        """Put a request in the queue. Raises `QueueFull`, and `BadRequest` for a session that was forgotten."""
        with self._changed:
            if session in self._ended:
                raise BadRequest("session_ended", "the session has ended, and nothing was begun", hint="reload the page")
            if len(self._waiting) >= self._capacity:
                raise QueueFull(
                    f"all {self._capacity} places in the queue are taken", retry_after=self._seconds_until_a_place()
                )
            job = _Job(JobId(secrets.token_urlsafe(16)), next(self._numbers), session, request)
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._drop_old(session)
            self._start_next()
            self._changed.notify_all()
            return job.id

    def view(self, session: SessionId, job: JobId) -> JobView | None:
        """Return the job as it is now; None for an unknown id and for another session's."""
        with self._changed:
            found = self._own(session, job)
            return None if found is None else self._view(found)

    def jobs(self, session: SessionId) -> tuple[JobView, ...]:
        """Return the session's jobs, newest first."""
        with self._changed:
            return tuple(self._view(job) for job in reversed(self._jobs.values()) if job.session == session)

    def request(self, session: SessionId, job: JobId) -> GenerationRequest | None:
        """Return what was asked for, to fill the form again."""
        with self._changed:
            found = self._own(session, job)
            return None if found is None else found.request

    def preview(self, session: SessionId, job: JobId) -> bytes | None:
        """Return the newest preview, a JPEG."""
        with self._changed:
            found = self._own(session, job)
            return None if found is None else found.preview

    def wait(self, session: SessionId, job: JobId, revision: int, timeout: float) -> JobView | None:
        """Return the job once its revision is another one, or as it is after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(
                lambda: (found := self._own(session, job)) is None or found.revision != revision, timeout
            )
            found = self._own(session, job)
            return None if found is None else self._view(found)

    def cancel(self, session: SessionId, job: JobId) -> bool:
        """Cancel a job of the session's; False when there is none, or it has ended already."""
        with self._changed:
            found = self._own(session, job)
            if found is None or found.ended:
                return False
            self._cancel(found)
            self._start_next()
            self._changed.notify_all()
            return True

    def forget(self, session: SessionId) -> None:
        """End the session: cancel and drop every job of it, and take no other.

        A running job ends within a step, and its picture is not kept.
        """
        with self._changed:
            self._ended.append(session)
            for job in [job for job in self._jobs.values() if job.session == session]:
                if not job.ended:
                    self._cancel(job)
                del self._jobs[job.id]
            self._start_next()
            self._changed.notify_all()

    # ── The engine's end ──────────────────────────────────────────────────────

    def attach(self, engine: socket.socket) -> None:
        """Take the next engine's wire and read it on a thread of its own until the engine is gone."""
        # Orders are sent under the lock: an engine that has stopped reading must not stop the pages with it.
        engine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _ONE_SECOND)
        threading.Thread(target=self._read, args=(engine,), name="engine-wire", daemon=True).start()

    def _read(self, engine: socket.socket) -> None:
        greeted = False
        try:
            while (report := wire.receive_report(engine)) is not None:
                if isinstance(report, wire.Hello):
                    if greeted:
                        break       # an engine that says hello twice is not ours any more
                    greeted = True
                    self._greet(engine, report)
                elif not greeted:
                    break
                else:
                    self._take(report)
        except (wire.WireError, VerificationRefused, OSError):
            pass                    # every way in which an engine can end is told to the session below
        finally:
            self._detach(engine)
            engine.close()

    def _greet(self, engine: socket.socket, hello: wire.Hello) -> None:
        card = ModelCard(
            ModelDescription.parse(hello.description), hello.digest, hello.key_fingerprint, hello.digests, hello.licence_text
        )
        with self._changed:
            self._fail_running()        # of an engine that was replaced before its end was read
            self._engine, self._model = engine, card
            self._step_times.clear()
            self._start_next()
            self._changed.notify_all()
        self._on_engine(True)

    def _detach(self, engine: socket.socket) -> None:
        with self._changed:
            if self._engine is not engine:
                return
            self._engine = self._model = None
            self._fail_running()
            for job in self._waiting:
                job.revision += 1
            self._changed.notify_all()
        self._on_engine(False)

    def _fail_running(self) -> None:
        if self._running is not None:
            self._end(
                self._running, "engine_stopped", "the engine stopped while it was developing this picture",
                "it is being started again: develop it once more",
            )

    def _take(self, report: wire.Progress | wire.Picture | wire.Finished | wire.Failed) -> None:
        with self._changed:
            job = self._running
            if job is None or job.number != report.job:
                return              # the last words about a job that was cancelled or forgotten
            match report:
                case wire.Progress(picture=picture, step=step, seconds=seconds, preview=preview):
                    # Within what was asked for, whatever an engine that was taken over may say.
                    job.picture, job.step = min(picture, job.request.count), min(step, job.request.steps)
                    job.preview = preview or job.preview
                    self._step_times.append(seconds)
                case wire.Picture():
                    self._keep(job, report)
                case wire.Finished():
                    self._end(job)
                case wire.Failed(reason=reason, message=message, hint=hint):
                    self._end(job, reason, message, hint)
            job.revision += 1
            self._start_next()
            self._changed.notify_all()

    def _keep(self, job: _Job, report: wire.Picture) -> None:
        if job.cancelled or job.id not in self._jobs:
            return
        try:
            job.images.append(
                self._vault.put(job.session, report.png, job.request, seed=report.seed, variant=report.variant)
            )
        except DarkroomError as refusal:
            # The rest of the job would be refused too.
            job.reason, job.message, job.hint = refusal.reason, str(refusal), refusal.hint
            self._cancel(job)

    # ── Under the lock ────────────────────────────────────────────────────────

    def _own(self, session: SessionId, job: JobId) -> _Job | None:
        found = self._jobs.get(job)
        return found if found is not None and found.session == session else None

    def _start_next(self) -> None:
        if self._engine is None or self._running is not None or not self._waiting:
            return
        job = self._waiting.popleft()
        if not self._tell(wire.Generate.of(job.number, job.request)):
            self._waiting.appendleft(job)       # the next engine takes it
            return
        job.state = "running"
        job.revision += 1
        self._running = job
        for other in self._waiting:
            other.revision += 1                 # each has moved up by one place

    def _cancel(self, job: _Job) -> None:
        job.cancelled = True
        job.revision += 1
        if job in self._waiting:
            self._waiting.remove(job)
            job.state = "cancelled"
            for other in self._waiting:
                other.revision += 1
        elif job is self._running:
            self._tell(wire.Cancel(job.number))

    def _tell(self, order: wire.Order) -> bool:
        """Send an order; False when the engine no longer takes any, in which case the reading thread ends its job."""
        if self._engine is None:
            return False
        try:
            wire.send(self._engine, order)
        except OSError:
            with contextlib.suppress(OSError):      # it may be gone altogether
                # The engine sees the end and ends too; the filter lets a worker shut down no more than its own half.
                self._engine.shutdown(socket.SHUT_WR)
            return False
        return True

    def _end(self, job: _Job, reason: str | None = None, message: str | None = None, hint: str | None = None) -> None:
        self._running = None
        job.preview = None
        job.revision += 1
        if job.reason is not None:              # a picture was refused by the vault
            job.state = "failed"
        elif job.cancelled or reason == "cancelled":
            job.state = "cancelled"
        elif reason is not None:
            job.state, job.reason, job.message, job.hint = "failed", reason, message, hint
        else:
            job.state = "done"

    def _drop_old(self, session: SessionId) -> None:
        ended = [job for job in self._jobs.values() if job.session == session and job.ended]
        for job in ended[: max(0, len(ended) - REMEMBERED)]:
            del self._jobs[job.id]

    def _typical_step(self) -> float | None:
        return statistics.median(self._step_times) if self._step_times else None

    def _seconds_of(self, job: _Job) -> float | None:
        step = self._typical_step()
        left = (job.request.count - job.picture) * job.request.steps + job.request.steps - job.step
        return None if step is None else left * step

    def _seconds_left(self, job: _Job) -> float | None:
        ahead = [] if job is self._running else list(itertools.takewhile(lambda other: other is not job, self._waiting))
        if self._running is not None:
            ahead.append(self._running)
        each = [self._seconds_of(other) for other in ([job, *ahead] if job is not self._running else [job])]
        return None if None in each else sum(seconds for seconds in each if seconds is not None)

    def _seconds_until_a_place(self) -> int:
        seconds = self._seconds_of(self._running) if self._running is not None else None
        return min(600, max(1, math.ceil(seconds))) if seconds is not None else 10

    def _view(self, job: _Job) -> JobView:
        place = 0
        if job.state == "waiting":
            place = self._waiting.index(job) + (self._running is not None)
        return JobView(
            id=job.id, state=job.state, place=place, step=job.step, steps=job.request.steps, picture=job.picture,
            count=job.request.count, seconds_left=None if job.ended else self._seconds_left(job), reason=job.reason,
            message=job.message, hint=job.hint, images=tuple(job.images), revision=job.revision,
            has_preview=job.preview is not None,
        )
