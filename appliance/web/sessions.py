"""Sessions: who is asking, known by a random cookie, in this process's memory alone.

1. The cookie is 256 random bits and holds nothing. The table is keyed by its SHA-256, so that a look-up's time tells
   nothing about a cookie that exists.
2. What jobs and pictures are filed under is another random id, so that the cookie goes no further than this file.
3. A session that nobody used for `idle_seconds` ends by itself, on a timer and not at the next visit: what it made must
   not lie here because nobody came by.
4. The table is bounded. Sessions in which nothing was ever sent make room for new ones, the oldest first; where none is
   left, a newcomer is refused.
5. However a session ends, `on_end` is called once, and drops what it made.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import BadRequest
from appliance.vault.volume import SessionId

_LEAST_WAIT: Final = 1.0    # seconds, so that a clock that stands still does not make the timer spin


class TooManySessions(BadRequest):
    """Every place in the table is somebody's who is using it."""

    def __init__(self) -> None:
        super().__init__("too_many_sessions", "too many people are using this darkroom", hint="try again in a few minutes")


@dataclass
class Session:
    """One visitor; `draft` is what stands in the form, so that a reload does not lose it."""

    id: SessionId
    csrf: str = field(repr=False)
    last_used: float            # seconds on the table's clock
    draft: dict[str, str] = field(default_factory=dict, repr=False)
    used: bool = False          # has sent something


class SessionTable:
    """Every session, bounded in number and in idle time; safe to use from several threads."""

    def __init__(
        self, *, idle_seconds: float, most: int, on_end: Callable[[SessionId], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle_seconds = idle_seconds
        self._most = most
        self._on_end = on_end
        self._clock = clock
        self._sessions: dict[bytes, Session] = {}
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def find(self, untrusted_cookie: str | None) -> Session | None:
        """Return the session of this cookie and note that it was used; None for a cookie that is nobody's."""
        if not untrusted_cookie:
            return None
        with self._lock:
            session = self._sessions.get(_key(untrusted_cookie))
            if session is None or self._clock() - session.last_used > self._idle_seconds:
                return None
            session.last_used = self._clock()
            return session

    def start(self) -> tuple[str, Session]:
        """Return a new cookie and its session. Raises `TooManySessions`."""
        cookie = secrets.token_urlsafe(32)
        session = Session(SessionId(secrets.token_urlsafe(16)), secrets.token_urlsafe(32), self._clock())
        dropped = None
        with self._lock:
            if len(self._sessions) >= self._most:
                idle = [(s.last_used, key) for key, s in self._sessions.items() if not s.used]
                if not idle:
                    raise TooManySessions
                dropped = self._sessions.pop(min(idle)[1])
            self._sessions[_key(cookie)] = session
            self._arm()
        if dropped is not None:
            self._on_end(dropped.id)
        return cookie, session

    def end(self, session: Session) -> None:
        """End a session and drop what it made; its cookie is nobody's from now on."""
        with self._lock:
            for key, other in list(self._sessions.items()):
                if other is session:
                    del self._sessions[key]
        session.draft.clear()
        self._on_end(session.id)

    def keep(self, session: Session) -> None:
        """Note that a session is in use, as while a page of it watches a picture develop."""
        with self._lock:
            session.last_used = self._clock()

    def sweep(self) -> None:
        """End every session that was idle for too long."""
        with self._lock:
            now = self._clock()
            stale = {key: s for key, s in self._sessions.items() if now - s.last_used > self._idle_seconds}
            for key in stale:
                del self._sessions[key]
        for session in stale.values():
            session.draft.clear()
            self._on_end(session.id)

    def _arm(self) -> None:
        """Under the lock: have the table swept when the next session can have become idle."""
        if self._timer is not None or not self._sessions:
            return
        soonest = min(session.last_used for session in self._sessions.values()) + self._idle_seconds - self._clock()
        self._timer = threading.Timer(max(_LEAST_WAIT, soonest + 0.1), self._sweep_and_arm)
        self._timer.daemon = True
        self._timer.start()

    def _sweep_and_arm(self) -> None:
        self.sweep()
        with self._lock:
            self._timer = None
            self._arm()


def _key(cookie: str) -> bytes:
    return hashlib.sha256(cookie.encode("utf-8", "surrogateescape")).digest()
