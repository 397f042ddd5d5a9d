"""The queue in front of the engine: the real queue and the real wire, with the far end played by the test."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from appliance.engine import wire
from appliance.engine.jobs import REMEMBERED, JobQueue, JobView
from appliance.errors import BadRequest, QueueFull
from appliance.request import GenerationRequest
from appliance.vault.volume import SessionId, Vault
from tests.bundles import DESCRIPTION
from tests.vaults import vault as a_vault

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
ANNA, BERT = SessionId("anna"), SessionId("bert")
CAPACITY = 3


class Engine:
    """The far end of a wire: takes orders and sends what a test wants to be sent."""

    def __init__(self, queue: JobQueue) -> None:
        self.end, theirs = socket.socketpair()
        self.end.settimeout(5)
        queue.attach(theirs)

    def hello(self) -> None:
        wire.send(self.end, wire.Hello(DESCRIPTION.to_json(), "d" * 64, "k" * 64, {}, "licence"))

    def order(self) -> wire.Order | None:
        return wire.receive_order(self.end)

    def started(self) -> int:
        order = self.order()
        assert isinstance(order, wire.Generate)
        return order.job

    def send(self, *reports: wire.Report) -> None:
        for report in reports:
            wire.send(self.end, report)


@pytest.fixture
def vault() -> Vault:
    return a_vault(capacity=1 << 20)


@pytest.fixture
def heard() -> list[bool]:
    return []


@pytest.fixture
def queue(vault: Vault, heard: list[bool]) -> JobQueue:
    return JobQueue(vault, capacity=CAPACITY, on_engine=heard.append)


@pytest.fixture
def engine(queue: JobQueue) -> Iterator[Engine]:
    engine = Engine(queue)
    with engine.end:
        engine.hello()
        until(lambda: queue.model is not None)
        yield engine


def until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def asked(**fields: object) -> GenerationRequest:
    return GenerationRequest.parse({"prompt": "apple", **fields}, DESCRIPTION, fresh_seed=1)


def seen(queue: JobQueue, session: SessionId, job: object) -> JobView:
    view = queue.view(session, job)     # type: ignore[arg-type]
    assert view is not None
    return view


def test_a_job_goes_from_waiting_to_running_to_done_and_its_picture_to_the_vault(
    queue: JobQueue, engine: Engine, vault: Vault
) -> None:
    job = queue.submit(ANNA, asked(steps=2))
    number = engine.started()
    assert seen(queue, ANNA, job).state == "running"
    engine.send(wire.Progress(number, 1, 1, 2, 0.5, b"jpeg"))
    until(lambda: seen(queue, ANNA, job).step == 1)
    assert seen(queue, ANNA, job).seconds_left == pytest.approx(0.5)
    assert queue.preview(ANNA, job) == b"jpeg"
    engine.send(wire.Picture(number, 1, 1, "fp32", PNG), wire.Finished(number))
    until(lambda: seen(queue, ANNA, job).state == "done")
    (image,) = seen(queue, ANNA, job).images
    kept = vault.get(ANNA, image)
    assert kept is not None
    assert kept.png == PNG
    assert queue.preview(ANNA, job) is None     # the preview is content too, and of no use any more


def test_jobs_wait_in_the_order_of_arrival_and_one_too_many_is_refused_with_a_time(queue: JobQueue, engine: Engine) -> None:
    first = queue.submit(ANNA, asked())
    waiting = [queue.submit(BERT, asked()) for _ in range(CAPACITY)]
    before = queue.jobs(BERT)
    with pytest.raises(QueueFull) as full:
        queue.submit(BERT, asked())
    assert full.value.retry_after > 0
    assert queue.jobs(BERT) == before
    assert [seen(queue, BERT, job).place for job in waiting] == [1, 2, 3]
    engine.send(wire.Finished(engine.started()))
    until(lambda: seen(queue, ANNA, first).state == "done")
    assert [seen(queue, BERT, job).place for job in waiting] == [0, 1, 2]


def test_another_sessions_job_is_answered_like_one_that_never_was(queue: JobQueue, engine: Engine) -> None:
    job = queue.submit(ANNA, asked())
    number = engine.started()
    engine.send(wire.Progress(number, 1, 1, 20, 0.1, b"jpeg"))
    until(lambda: seen(queue, ANNA, job).has_preview)
    assert queue.view(BERT, job) is None
    assert queue.preview(BERT, job) is None
    assert queue.request(BERT, job) is None
    assert queue.wait(BERT, job, 0, 0.01) is None
    assert queue.cancel(BERT, job) is False
    assert queue.jobs(BERT) == ()
    assert seen(queue, ANNA, job).state == "running"


def test_a_waiting_job_that_is_cancelled_never_reaches_the_engine(queue: JobQueue, engine: Engine) -> None:
    queue.submit(ANNA, asked())
    number = engine.started()
    unwanted, wanted = queue.submit(ANNA, asked()), queue.submit(ANNA, asked())
    assert queue.cancel(ANNA, unwanted) is True
    assert queue.cancel(ANNA, unwanted) is False
    assert seen(queue, ANNA, unwanted).state == "cancelled"
    engine.send(wire.Finished(number))
    assert engine.started() != number
    assert seen(queue, ANNA, wanted).state == "running"


def test_a_running_job_is_cancelled_at_the_engine_and_keeps_no_picture(queue: JobQueue, engine: Engine, vault: Vault) -> None:
    job = queue.submit(ANNA, asked())
    number = engine.started()
    queue.cancel(ANNA, job)
    assert engine.order() == wire.Cancel(number)
    # Too late: the picture was already on its way.
    engine.send(wire.Picture(number, 1, 1, "fp32", PNG), wire.Failed(number, "cancelled", "was cancelled", None))
    until(lambda: seen(queue, ANNA, job).state == "cancelled")
    assert vault.images(ANNA) == ()


def test_forgetting_a_session_drops_its_jobs_and_a_late_picture_of_theirs(queue: JobQueue, engine: Engine, vault: Vault) -> None:
    job = queue.submit(ANNA, asked())
    number = engine.started()
    queue.submit(ANNA, asked())
    queue.forget(ANNA)
    assert queue.jobs(ANNA) == ()
    assert queue.view(ANNA, job) is None
    assert engine.order() == wire.Cancel(number)
    other = queue.submit(BERT, asked())
    engine.send(wire.Picture(number, 1, 1, "fp32", PNG), wire.Finished(number))
    until(lambda: seen(queue, BERT, other).state == "running")
    assert vault.images(ANNA) == ()


def test_an_engine_that_ends_fails_its_job_alone_and_the_next_engine_takes_the_rest(
    queue: JobQueue, engine: Engine, heard: list[bool]
) -> None:
    lost, kept = queue.submit(ANNA, asked()), queue.submit(BERT, asked())
    engine.started()
    engine.end.close()
    until(lambda: queue.model is None)
    view = seen(queue, ANNA, lost)
    assert view.state == "failed"
    assert view.reason == "engine_stopped"
    assert view.message
    assert view.hint
    assert seen(queue, BERT, kept).state == "waiting"
    second = Engine(queue)
    with second.end:
        second.hello()
        second.send(wire.Finished(second.started()))
        until(lambda: seen(queue, BERT, kept).state == "done")
    until(lambda: heard == [True, False, True, False])


@pytest.mark.parametrize(
    "raw", [b"\0\0\0\2\0\0\0\0{}", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64]
)
def test_an_engine_that_breaks_the_rules_is_let_go(queue: JobQueue, engine: Engine, raw: bytes) -> None:
    job = queue.submit(ANNA, asked())
    engine.started()
    engine.end.sendall(raw)
    until(lambda: queue.model is None)
    assert seen(queue, ANNA, job).state == "failed"


def test_an_engine_that_speaks_before_it_says_hello_is_let_go(queue: JobQueue) -> None:
    engine = Engine(queue)
    with engine.end:
        engine.send(wire.Finished(1))
        assert engine.end.recv(1) == b""
    assert queue.model is None


def test_a_picture_that_the_vault_refuses_fails_the_job_and_stops_the_rest_of_it(queue: JobQueue, engine: Engine) -> None:
    job = queue.submit(ANNA, asked(count=4))
    number = engine.started()
    engine.send(wire.Picture(number, 1, 1, "fp32", PNG + bytes(1 << 20)))
    assert engine.order() == wire.Cancel(number)
    engine.send(wire.Failed(number, "cancelled", "was cancelled", None))
    until(lambda: seen(queue, ANNA, job).state == "failed")
    assert seen(queue, ANNA, job).reason == "vault_full"


def test_progress_beyond_what_was_asked_for_is_not_believed(queue: JobQueue, engine: Engine) -> None:
    job = queue.submit(ANNA, asked(steps=4, count=2))
    engine.send(wire.Progress(engine.started(), 900, 900, 900, 1.0, b"j"))
    until(lambda: seen(queue, ANNA, job).step > 0)
    view = seen(queue, ANNA, job)
    assert (view.step, view.picture) == (4, 2)
    assert view.seconds_left == 0


def test_waiting_for_news_returns_at_once_when_there_are_some_and_after_the_timeout_otherwise(
    queue: JobQueue, engine: Engine
) -> None:
    job = queue.submit(ANNA, asked())
    engine.started()
    view = seen(queue, ANNA, job)
    assert queue.wait(ANNA, job, view.revision - 1, 60) == view
    assert queue.wait(ANNA, job, view.revision, 0.01) == view


def test_old_jobs_are_dropped_so_that_memory_is_bounded(queue: JobQueue, engine: Engine) -> None:
    for _ in range(REMEMBERED + 5):
        job = queue.submit(ANNA, asked())
        number = engine.started()
        engine.send(wire.Finished(number))
        until(lambda job=job: seen(queue, ANNA, job).state == "done")
    assert len(queue.jobs(ANNA)) <= REMEMBERED + 1


def test_a_request_that_was_under_way_when_its_session_ended_begins_nothing(queue: JobQueue, engine: Engine) -> None:
    queue.forget(ANNA)
    with pytest.raises(BadRequest, match="session has ended"):
        queue.submit(ANNA, asked())
    assert queue.jobs(ANNA) == ()


def test_an_engine_that_says_hello_before_the_last_ones_end_was_read_leaves_no_job_running_for_ever(
    queue: JobQueue, engine: Engine
) -> None:
    job = queue.submit(ANNA, asked())
    engine.started()
    second = Engine(queue)
    with second.end:
        second.hello()
        until(lambda: seen(queue, ANNA, job).state == "failed")
        following = queue.submit(ANNA, asked())
        second.send(wire.Finished(second.started()))
        until(lambda: seen(queue, ANNA, following).state == "done")
