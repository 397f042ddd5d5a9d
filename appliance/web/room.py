"""What every view needs, made once by `create_app` and found again through the application that is being asked."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from flask import current_app

from appliance.engine.jobs import JobQueue, JobView, ModelCard
from appliance.vault.volume import SessionId, Vault
from appliance.web.sessions import SessionTable

EXTENSION: Final = "darkroom"


@dataclass(frozen=True)
class WebSettings:
    """The limits of the pages; `allowed_hosts` are the values of Host that are answered, lowercase."""

    allowed_hosts: tuple[str, ...]
    most_streams: int = 24
    most_streams_of_a_session: int = 3     # a browser opens six connections to a host: half of them stay free for pages
    most_sessions: int = 500
    idle_minutes: int = 60


@dataclass(frozen=True)
class Seen:
    """What the supervisor has seen of the seal: its conclusion, and each promise as `darkroom status` prints it."""

    sealed: bool
    promises: tuple[dict[str, object], ...]
    at: float       # Unix time


class Seal:
    """The latest that was seen; safe to use from several threads."""

    def __init__(self) -> None:
        self._seen: Seen | None = None
        self._shown = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait for the first look; False where it has not come within `seconds`."""
        return self._shown.wait(seconds)

    def show(self, said: dict[str, object]) -> None:
        """Take what the supervisor says."""
        promises = said.get("promises")
        self._seen = Seen(
            said.get("sealed") is True, tuple(promises) if isinstance(promises, list) else (), time.time()
        )
        self._shown.set()

    @property
    def seen(self) -> Seen | None:
        """What was seen; None before the first look."""
        return self._seen


class Streams:
    """How many answers are being streamed, in all and to each session; each holds a thread while it lasts."""

    def __init__(self, most: int, most_of_a_session: int) -> None:
        self._most = most
        self._most_of_a_session = most_of_a_session
        self._open: Counter[SessionId] = Counter()
        self._lock = threading.Lock()

    def take(self, session: SessionId) -> bool:
        """Take a place; False when there is none, and the page asks again at intervals instead."""
        with self._lock:
            if self._open.total() >= self._most or self._open[session] >= self._most_of_a_session:
                return False
            self._open[session] += 1
            return True

    def give_back(self, session: SessionId) -> None:
        """Give a place back."""
        with self._lock:
            self._open[session] -= 1
            if self._open[session] <= 0:
                del self._open[session]


class Room:
    """The queue, the vault, the sessions, the limits, and what was seen of the seal."""

    def __init__(
        self, jobs: JobQueue, vault: Vault, settings: WebSettings, on_failure: Callable[[int], None], seal: Seal
    ) -> None:
        self.jobs = jobs
        self.vault = vault
        self.settings = settings
        self.on_failure = on_failure
        self.seal = seal
        self.streams = Streams(settings.most_streams, settings.most_streams_of_a_session)
        self.sessions = SessionTable(
            idle_seconds=60 * settings.idle_minutes, most=settings.most_sessions, on_end=self._forget
        )
        self._last_model: ModelCard | None = None

    @property
    def model(self) -> ModelCard | None:
        """The model that pages are written for: the running engine's, or the last one's while it is being replaced."""
        self._last_model = self.jobs.model or self._last_model
        return self._last_model

    @property
    def engine_is_there(self) -> bool:
        """Whether an engine takes jobs at this moment."""
        return self.jobs.model is not None

    @property
    def idle_in_words(self) -> str:
        """After how long a session ends by itself, as the middle of a sentence."""
        minutes = self.settings.idle_minutes
        return "an hour passes" if minutes == 60 else f"{minutes} minutes pass" if minutes > 1 else "a minute passes"

    def current(self, session: SessionId) -> JobView | None:
        """Return the job to show: the one that is next to be finished, otherwise the latest."""
        jobs = self.jobs.jobs(session)
        unended = [job for job in jobs if job.state in ("waiting", "running")]
        return unended[-1] if unended else jobs[0] if jobs else None

    def behind(self, session: SessionId, job: JobView) -> int:
        """Return how many more of the session's jobs are waiting beside this one."""
        return sum(1 for other in self.jobs.jobs(session) if other.state == "waiting" and other.id != job.id)

    def _forget(self, session: SessionId) -> None:
        # Jobs first: once they are gone the queue keeps no picture of theirs, and the vault can be emptied for good.
        self.jobs.forget(session)
        self.vault.end(session)


def room() -> Room:
    """Return what the application that is being asked was made with."""
    return cast(Room, current_app.extensions[EXTENSION])
