"""Sessions end when nobody uses them, make room for one another, and never outlive what they made."""

from __future__ import annotations

import pytest

from appliance.vault.volume import SessionId
from appliance.web.room import Streams
from appliance.web.sessions import SessionTable, TooManySessions
from tests.browser.client import pages, until


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ended() -> list[SessionId]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(ended: list[SessionId], clock: Clock) -> SessionTable:
    return SessionTable(idle_seconds=60, most=3, on_end=ended.append, clock=clock)


def test_a_session_is_found_by_its_cookie_alone(table: SessionTable) -> None:
    cookie, session = table.start()
    assert table.find(cookie) is session
    for other in (None, "", cookie[:-1], cookie + "=", cookie.upper(), session.id, session.csrf, "\udcff"):
        assert table.find(other) is None


def test_cookie_token_and_id_say_nothing_of_one_another_and_stay_out_of_repr(table: SessionTable) -> None:
    cookie, session = table.start()
    session.draft["prompt"] = "canary"
    assert len({cookie, session.id, session.csrf}) == 3
    for secret in (cookie, session.csrf, "canary"):
        assert secret not in repr(session)
        assert secret not in repr(vars(table))


def test_a_session_ends_after_its_idle_time_and_not_before(table: SessionTable, clock: Clock, ended: list[SessionId]) -> None:
    cookie, session = table.start()
    session.draft["prompt"] = "canary"
    clock.now += 59
    assert table.find(cookie) is session
    clock.now += 59
    table.sweep()
    assert ended == []
    clock.now += 2
    assert table.find(cookie) is None
    table.sweep()
    assert ended == [session.id]
    assert session.draft == {}


def test_a_session_ends_by_itself_though_nobody_comes_by(ended: list[SessionId]) -> None:
    table = SessionTable(idle_seconds=0.1, most=3, on_end=ended.append)
    _, session = table.start()
    until(lambda: ended == [session.id])


def test_a_page_that_watches_keeps_its_session(table: SessionTable, clock: Clock, ended: list[SessionId]) -> None:
    cookie, session = table.start()
    for _ in range(5):
        clock.now += 50
        table.keep(session)
    assert table.find(cookie) is session
    assert ended == []


def test_the_oldest_unused_session_makes_room_and_a_used_one_never_does(
    table: SessionTable, clock: Clock, ended: list[SessionId]
) -> None:
    sessions = []
    for _ in range(3):
        clock.now += 1
        sessions.append(table.start()[1])
    sessions[0].used = True
    newcomer = table.start()[1]
    assert ended == [sessions[1].id]
    sessions[2].used = newcomer.used = True
    with pytest.raises(TooManySessions):
        table.start()
    assert ended == [sessions[1].id]


def test_a_newcomer_to_a_full_darkroom_gets_a_sentence() -> None:
    here = pages(most_sessions=1)
    here.visitor().picture()
    answer = here.visitor().get("/")
    assert answer.status_code == 503
    assert "Too many people are using this darkroom." in answer.get_data(as_text=True)
    assert answer.headers["Retry-After"] == "60"
    here.easel.die()


def test_streams_are_limited_in_all_and_for_each_session() -> None:
    streams = Streams(3, 2)
    a, b = SessionId("a"), SessionId("b")
    assert [streams.take(a), streams.take(a), streams.take(a)] == [True, True, False]
    assert [streams.take(b), streams.take(b)] == [True, False]
    streams.give_back(a)
    assert streams.take(b)
    for session in (a, b, b):
        streams.give_back(session)
    assert streams._open == {}


def test_a_stream_beyond_the_limit_is_refused_and_the_page_can_still_ask() -> None:
    here = pages(most_streams=1)
    visitor = here.visitor()
    here.easel.hold.clear()
    job = visitor.develop()
    with here.app.test_client() as client:
        cookie = next(iter((visitor._client._cookies or {}).values()))
        client.set_cookie(cookie.key, cookie.value, domain="127.0.0.1")
        first = client.get(f"/api/jobs/{job}/events", base_url="http://127.0.0.1:8000", buffered=False)
        assert first.status_code == 200
        refused = visitor.get(f"/api/jobs/{job}/events")
        assert (refused.status_code, refused.json and refused.json["error"]) == (503, "streams")
        assert visitor.ask(f"/api/jobs/{job}").status_code == 200
        first.close()
    here.easel.hold.set()
    until(lambda: visitor.ask(f"/api/jobs/{job}").json["state"] == "done")     # type: ignore[index]
    assert b'"state": "done"' in visitor.get(f"/api/jobs/{job}/events").data
    here.easel.die()
