"""The parent of everything that holds content: it binds, seals, spawns, reaps and ends, and never holds any itself.

    supervisor      one thread, no numpy, no pictures, no prompts
    ├── engine      verifies the bundle, then loads it
    └── gunicorn    answers on the listening socket that was made here
        └── worker  the pages and the pictures

In order:

1. Bind the listening socket, or take it from systemd, and the control socket.
2. Prepare the walls of every process, then close itself off (`seal.confine`); what it starts can only be tighter.
3. Start the engine and wait until it has verified and loaded the model. A refusal ends everything with its exit code.
4. Start gunicorn, hand the engine's wire to the worker, and wait until a request was answered.
5. Have every process look for ways out, look at them from outside, and refuse to go on where one is open (exit code 6).
6. Only then say ready: to systemd where it listens, and to whoever waits for the address.
7. Watch. An engine that ends or stands still is replaced, and the worker is given the next one's wire. A worker that ends or
   stands still is a close: what it held is gone with it, and both are started afresh. Too many ends in a short time end the
   supervisor too, with exit code 5. systemd's watchdog is told of life only where worker and engine have shown some.
8. On SIGTERM, SIGINT or SIGHUP: end the worker and the engine, reap both, and return.

Engine and worker are told who their parent is, and the kernel ends them with it.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

from appliance.children import Child, reason_of, state_of
from appliance.config import Config
from appliance.errors import BadRequest, EngineError, NotSealed, VerificationRefused
from appliance.evidence.journal import Event, Record
from appliance.link import ENGINE, POSTURE, VISIT
from appliance.listening import address, allowed_hosts, listener_for
from appliance.seal.calls import Role
from appliance.seal.confine import Standing, close_off_supervisor
from appliance.seal.control import ControlSocket, answer, run_folder
from appliance.seal.errands import errands_for, places_outside
from appliance.seal.posture import Posture, look_at_machine, look_at_threads
from appliance.seal.probes import probe_self
from appliance.seal.walls import Paths, Walls
from appliance.signals import Closing, Signals
from appliance.systemd import notify, watchdog_interval

_GRACE: Final = 1.5             # seconds between asking gunicorn to end and ending it
_START_LIMIT: Final = 600.0     # seconds for verifying and loading a large model
_ANSWER_LIMIT: Final = 60.0     # … for the pages to be there, and for a request to be answered
_PROBE_LIMIT: Final = 20.0      # … for worker and engine to report on themselves
_VISIT_EVERY: Final = 5.0       # … between two requests that the supervisor makes itself
_LOOK_EVERY: Final = 60.0       # … between two looks at the posture
_STEP_LIMIT: Final = 1800       # … for one denoising step, the slowest machine and the largest model included
_MOST_ENDS: Final = 5           # of children, within `_ENDS_WINDOW` seconds
_ENDS_WINDOW: Final = 60.0


class _PagesEnded(EngineError):
    """gunicorn ended while something else was being waited for."""

    def __init__(self) -> None:
        super().__init__("start", "the pages ended while they were being started")


def serve(config: Config, *, ready: Callable[[str], None], publish: Callable[[Record], None]) -> None:
    """Run the appliance until it is told to close.

    `ready` is called with the address once a request has been answered and the posture has been looked at. Raises
    `BadRequest` where the port cannot be had, `VerificationRefused` where the model is not what a trusted key signed,
    `EngineError` where children keep ending, `NotSealed` where a way out is open and that was not allowed.
    """
    with ExitStack() as held:
        listener = held.enter_context(listener_for(config))
        control = held.enter_context(closing(ControlSocket(run_folder(config.run_folder, os.environ))))
        walls = held.enter_context(closing(Walls.prepare(Paths(config.bundle, config.trust, control.folder.parent))))
        signals = held.enter_context(closing(Signals()))
        wall = walls.of("supervisor")
        standing = close_off_supervisor(
            filter_fd=wall.filter_fd, ruleset_fd=wall.ruleset_fd, no_landlock=walls.no_landlock
        )
        _Supervisor(config, listener, control, walls, standing, signals, ready, publish).run()


class _Supervisor:
    """The children, and the sockets to them; one thread."""

    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        control: ControlSocket,
        walls: Walls,
        standing: Standing,
        signals: Signals,
        ready: Callable[[str], None],
        publish: Callable[[Record], None],
    ) -> None:
        self._config = config
        self._listener = listener
        self._control = control
        self._walls = walls
        self._standing = standing
        self._signals = signals
        self._ready = ready
        self._publish = publish
        self._engine: Child | None = None
        self._pages: Child | None = None
        self._worker_pid = 0
        self._wire: socket.socket | None = None         # the worker's end of the running engine's wire
        self._visit: socket.socket | None = None        # the supervisor's own request, under way
        self._visited_at = self._answered_at = self._looked_at = time.monotonic()
        self._posture = Posture.unknown()
        self._sealed: bool | None = None                # as it was last said
        self._asked: list[socket.socket] = []           # of the control socket: who waits for the status
        self._ends: deque[float] = deque(maxlen=_MOST_ENDS)
        self._watchdog = watchdog_interval()
        self._told_at = 0.0
        self._is_open = False                           # once READY was said
        self._places = places_outside(config.bundle)    # as they were before anybody could take the ground away

    def run(self) -> None:
        try:
            self._open()
            notify(f"READY=1\nSTATUS={'sealed' if self._posture.sealed else 'NOT sealed'}")
            self._is_open = True
            self._ready(address(self._listener, self._config))
            while True:
                self._watch()
        except Closing as told:
            notify("STOPPING=1")
            started = time.monotonic()
            self._end_everything()
            self._publish(Record(Event.CLOSED, told.signum, round(1000 * (time.monotonic() - started))))
        finally:
            self._end_everything()

    # ── Starting ──────────────────────────────────────────────────────────────

    def _open(self) -> None:
        """Start the engine, then the pages; return when a page was answered and every way out was found closed."""
        self._start_engine()
        self._start_pages()
        self._hand_over_engine()
        self._await_a_page()
        self._look()

    def _start_engine(self) -> None:
        config, wall = self._config, self._walls.of("engine")
        ours, theirs = socket.socketpair()
        command = [
            "engine", "--bundle", str(config.bundle), "--wire", str(theirs.fileno()), *wall.arguments(),
            *(argument for key in config.trust for argument in ("--trust", str(key))),
            *(("--threads", str(config.threads)) if config.threads else ()),
        ]
        with theirs:
            self._engine = Child("engine", command, theirs.fileno(), *wall.descriptors)
        self._wire = ours
        self._await(Event.ENGINE_READY, _START_LIMIT)

    def _start_pages(self) -> None:
        arbiter, worker = self._walls.of("arbiter"), self._walls.of("worker")
        command = [
            "pages", "--listener", str(self._listener.fileno()), "--queue", str(self._config.queue),
            "--memory-for-pictures", str(self._config.memory_for_pictures),
            *arbiter.arguments("arbiter-"), *worker.arguments("worker-"),
            *(argument for host in allowed_hosts(self._listener, self._config) for argument in ("--host", host)),
        ]
        self._pages = Child("arbiter", command, self._listener.fileno(), *arbiter.descriptors, *worker.descriptors)
        self._await(Event.WORKER_READY, _ANSWER_LIMIT)

    def _hand_over_engine(self) -> None:
        if self._pages is None or self._wire is None or not self._pages.send(ENGINE, descriptor=self._wire.fileno()):
            raise _PagesEnded
        # The worker holds the only end now: its wire closes when the engine does, and the other way round.
        self._wire.close()
        self._wire = None
        self._await(Event.WORKER_HAS_ENGINE, _ANSWER_LIMIT)

    def _await_a_page(self) -> None:
        """Ask for a page as a browser would: ready is what was answered, not what was started."""
        before, until = self._answered_at, time.monotonic() + _ANSWER_LIMIT
        self._begin_a_visit()
        while self._answered_at == before:
            self._turn(0.1)
            self._see_who_has_ended()
            if time.monotonic() > until:
                raise EngineError("pages", "the pages do not answer")

    # ── The supervisor as a visitor ───────────────────────────────────────────

    def _begin_a_visit(self) -> None:
        """Hand the worker one end of a socket pair as if a visitor had connected: `connect` is nobody's here."""
        self._end_visit()
        self._visited_at = time.monotonic()
        if self._pages is None:
            return
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        name = allowed_hosts(self._listener, self._config)[0]
        with theirs:
            if self._pages.send(VISIT, descriptor=theirs.fileno()):
                ours.send(f"GET /static/ready.txt HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode("ascii"))
                self._visit = ours
            else:
                ours.close()

    def _take_answer(self) -> None:
        visit = self._visit
        if visit is None:
            return
        try:
            said = visit.recv(64)
        except OSError:
            said = b""
        if b" 200 " in said.split(b"\r\n", 1)[0]:
            self._answered_at = time.monotonic()
        self._end_visit()

    def _end_visit(self) -> None:
        if self._visit is not None:
            self._visit.close()
            self._visit = None

    # ── Waiting ───────────────────────────────────────────────────────────────

    def _turn(self, seconds: float) -> list[Record]:
        """Wait for whatever comes first, at most `seconds`, deal with it, and return what children have said.

        Raises `Closing` when a closing signal came.
        """
        children = [child for child in (self._engine, self._pages) if child is not None]
        waited: list[socket.socket | int] = [self._signals.fd, *self._control.waited_for]
        waited += [source for child in children for source in (child.events, child.link)]
        waited += [self._visit] if self._visit is not None else []
        readable: list[socket.socket | int] = []
        if self._signals.received is None:
            readable, _, _ = select.select(waited, [], [], seconds)
        if self._signals.received is not None:
            raise Closing(self._signals.received)
        heard = []
        for child in children:
            if child.link in readable:
                child.take_message()
            if child.events in readable:
                heard += child.heard()
        if self._visit in readable:
            self._take_answer()
        for connection, question in self._control.questions(readable):
            if question == "status":
                self._asked.append(connection)
            else:
                answer(connection, {"error": "unknown_question"})
        for record in heard:
            self._publish(record)
            if record.event == Event.WORKER_READY:
                self._worker_pid = self._checked_worker(record.first)
        if time.monotonic() - self._visited_at > _VISIT_EVERY and self._visit is None:
            self._begin_a_visit()
        self._tell_the_watchdog()
        return heard

    def _checked_worker(self, pid: int) -> int:
        """Return the pid that the worker says it has, where its parent is the arbiter indeed; 0 otherwise."""
        return pid if self._pages is not None and state_of(pid)[1] == self._pages.pid else 0

    def _await(self, event: Event, limit: float) -> None:
        """Return when a child says `event`; raise as soon as one ends instead, or when `limit` seconds have passed."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            if any(record.event == event for record in self._turn(0.1)):
                return
            self._see_who_has_ended()
        raise EngineError("start", f"{event.name.lower().replace('_', ' ')} was waited for longer than {limit:.0f} seconds")

    def _see_who_has_ended(self) -> None:
        """Raise for a child that ended, and end one that was stopped: it would be waited for in vain."""
        for child in (self._pages, self._engine):
            if child is not None and child.is_stopped():
                child.end(0)
        if self._pages is not None and state_of(self._worker_pid)[0] == "T":
            self._pages.end(0)
        if self._pages is not None and self._pages.status is not None:
            raise _PagesEnded
        if self._engine is not None and (status := self._engine.status) is not None:
            raise reason_of(status)

    # ── Watching ──────────────────────────────────────────────────────────────

    def _watch(self) -> None:
        """Publish what is said and see to who has ended or stands still; returns after at most a quarter of a second."""
        self._turn(0.25)
        self._end_what_stands_still()
        if self._pages is not None and self._pages.status is not None:
            self._begin_afresh()
        elif self._engine is not None and self._engine.status is not None:
            self._replace_engine()
        elif self._asked or time.monotonic() - self._looked_at > _LOOK_EVERY:
            self._look_again()

    def _end_what_stands_still(self) -> None:
        """End an engine or a worker that was stopped, or has given no sign of life for too long."""
        now = time.monotonic()
        engine, pages = self._engine, self._pages
        if engine is not None:
            silence = now - engine.alive_at
            if engine.is_stopped() or silence > _ANSWER_LIMIT or engine.step_seconds > _STEP_LIMIT:
                self._publish(Record(Event.ENGINE_STANDS_STILL, round(max(silence, engine.step_seconds))))
                engine.end(0)
        if pages is not None:
            silence = now - self._answered_at
            if pages.is_stopped() or state_of(self._worker_pid)[0] == "T" or silence > _ANSWER_LIMIT:
                self._publish(Record(Event.WORKER_STANDS_STILL, round(silence)))
                pages.end(0)

    def _tell_the_watchdog(self) -> None:
        """Tell systemd that worker and engine live, as often as it wants to hear it, and only where they do."""
        now = time.monotonic()
        engine = self._engine
        if not self._watchdog or not self._is_open or now - self._told_at < self._watchdog or engine is None:
            return
        # An engine that loads its model gives no sign of life, and has its own limit for that.
        lives = now - engine.alive_at < (_START_LIMIT if engine.model is None else 3 * _VISIT_EVERY)
        if lives and now - self._answered_at < 3 * _VISIT_EVERY:
            self._told_at = now
            notify("WATCHDOG=1")

    def _replace_engine(self) -> None:
        """Start the next engine for the worker that is there, again and again while engines keep ending."""
        while True:
            if self._engine is not None:
                self._publish(Record(Event.ENGINE_ENDED, self._engine.status or 0))
                self._engine.end(0)
            self._count_an_end()
            try:
                self._start_engine()
                self._hand_over_engine()
                self._look()
            except (_PagesEnded, OSError):
                # The engine had ended because its worker did, which shows a moment later.
                self._begin_afresh()
            except EngineError:
                continue
            return

    def _begin_afresh(self) -> None:
        """Close, since the worker has ended and what it held is gone, and open again."""
        while True:
            if self._pages is not None:
                self._publish(Record(Event.WORKER_ENDED, self._pages.status or 0))
            self._count_an_end()
            self._end_everything()
            try:
                self._open()
            except (EngineError, OSError):
                continue
            return

    def _count_an_end(self) -> None:
        now = time.monotonic()
        self._ends.append(now)
        if len(self._ends) == _MOST_ENDS and now - self._ends[0] < _ENDS_WINDOW:
            raise EngineError(
                "restarts", f"the appliance's processes ended {_MOST_ENDS} times within {_ENDS_WINDOW:.0f} seconds",
                hint="look at the events above; a model that is too large for this machine's memory is a common cause",
            )

    # ── Looking ───────────────────────────────────────────────────────────────

    def _look_again(self) -> None:
        """Look at a time when nothing is being started; a child that ends meanwhile is seen to in the next turn."""
        try:
            self._look()
        except (EngineError, VerificationRefused, BadRequest):
            self._answer_who_asked()

    def _look(self) -> None:
        """Have every process try its ways out, and look at all of them from outside. Raises `NotSealed`."""
        engine, pages = self._engine, self._pages
        if engine is None or pages is None:
            return
        self._control.heard()       # what came before the probes is none of theirs
        pids: dict[Role, int] = {
            "supervisor": os.getpid(), "arbiter": pages.pid, "worker": self._worker_pid, "engine": engine.pid,
        }
        errands = errands_for(pids, self._places, self._config.bundle, self._control.folder)
        engine.ask_for_a_report(errands["engine"])
        pages.ask_for_a_report(errands["worker"])
        until = time.monotonic() + _PROBE_LIMIT
        while engine.report is None or pages.report is None:
            self._turn(0.1)
            self._see_who_has_ended()
            if time.monotonic() > until:
                self._end_the_silent(engine, pages)
        own = probe_self("supervisor", errands["supervisor"], self._standing)
        self._posture = Posture(
            found={"supervisor": own, "worker": pages.report or {}, "engine": engine.report or {}},
            threads={role: look_at_threads(pid, role, self._standing.filters_before) for role, pid in pids.items()},
            standing=self._standing,
            machine=look_at_machine(lambda path: Path(path).read_text(encoding="ascii", errors="replace")),
            planted_heard=self._control.heard(),
            digest=engine.model[0] if engine.model else None,
            key=engine.model[1] if engine.model else None,
        )
        self._looked_at = time.monotonic()
        self._say_what_was_seen()

    def _end_the_silent(self, engine: Child, pages: Child) -> None:
        """End whoever has not reported: it stands still, which is no open way out. Raises `EngineError`."""
        if pages.report is None:
            self._publish(Record(Event.WORKER_STANDS_STILL, round(_PROBE_LIMIT)))
            pages.end(0)
            raise _PagesEnded
        self._publish(Record(Event.ENGINE_STANDS_STILL, round(_PROBE_LIMIT)))
        engine.end(0)
        raise EngineError("probe", f"the engine did not report on itself within {_PROBE_LIMIT:.0f} seconds")

    def _say_what_was_seen(self) -> None:
        """Tell the pages, the log and whoever asked. Raises `NotSealed` where a way out is open and may not be."""
        promises = self._posture.promises()
        sealed = self._posture.sealed
        if self._pages is not None and (sealed or self._config.allow_unsealed):
            # The worker answers nobody before this has come.
            self._pages.send(POSTURE, json.dumps(self._status()).encode("utf-8"))
        if sealed != self._sealed:
            self._sealed = sealed
            held = sum(promise.holds for promise in promises)
            self._publish(Record(Event.SEALED if sealed else Event.UNSEALED, held, len(promises)))
        self._answer_who_asked()
        if not sealed and not self._config.allow_unsealed:
            broken = [promise for promise in promises if promise.essential and not promise.holds]
            raise NotSealed(
                "open", "a way out is open: " + "; ".join(f"{one.id} {one.title.lower()}: {one.observed}" for one in broken),
                hint="--allow-unsealed serves all the same and says so on every page",
            )

    def _status(self) -> dict[str, object]:
        return {
            "sealed": self._posture.sealed,
            "model": {"name": self._config.bundle.name, "digest": self._posture.digest, "key": self._posture.key},
            "vault": "session: encrypted in memory, with a key that the worker alone has and that is gone with it",
            "promises": [promise.as_json() for promise in self._posture.promises()],
        }

    def _answer_who_asked(self) -> None:
        for connection in self._asked:
            answer(connection, self._status())
        self._asked.clear()

    # ── Ending ────────────────────────────────────────────────────────────────

    def _end_everything(self) -> None:
        """End and reap every child: the worker is asked first, so that an answer under way can finish."""
        if self._pages is not None:
            self._pages.end(_GRACE)
        if self._engine is not None:
            self._engine.end(0)
        self._pages = self._engine = None
        self._worker_pid = 0
        self._end_visit()
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        # The next children have as long as these had.
        self._answered_at = time.monotonic()
