"""What can be said while the appliance runs: an event and two numbers."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.evidence.journal import Event, EventPipe, Record, records, to_journal
from appliance.systemd import notify

ROOT = Path(__file__).parent.parent


def test_what_is_said_arrives_in_order_with_its_numbers() -> None:
    reading, writing = os.pipe()
    pipe = EventPipe(writing)
    pipe.say(Event.ENGINE_VERIFIED, 8, 38)
    pipe.say(Event.ENGINE_ENDED, -9)                # the supervisor's to say, and no child's
    pipe.say(Event.JOB_DONE, 2**40, 2**40)          # more than a field holds is no number of ours
    pipe.say(Event.REQUEST_FAILED, 0x43414E41)      # four letters of anything
    pipe.say(Event.REQUEST_FAILED, 500, 1)
    pipe.say(Event.JOB_DONE, 2, 1500)
    heard = list(records(bytearray(os.read(reading, 4096))))
    os.close(reading)
    os.close(writing)
    assert heard == [Record(Event.ENGINE_VERIFIED, 8, 38), Record(Event.JOB_DONE, 2, 1500)]
    assert str(heard[0]) == "the model was verified: 8 files, 38 MiB"


def test_a_full_pipe_and_a_supervisor_that_is_gone_never_stop_the_one_who_speaks() -> None:
    reading, writing = os.pipe()
    pipe = EventPipe(writing)
    for _ in range(20_000):
        pipe.say(Event.JOB_DONE)
    os.close(reading)
    pipe.say(Event.JOB_DONE)
    os.close(writing)


def test_half_a_record_is_kept_until_the_rest_has_come() -> None:
    unread = bytearray(struct.pack(">Hxxii", Event.JOB_DONE, 1, 2))
    rest = unread[5:]
    del unread[5:]
    assert list(records(unread)) == []
    unread += rest
    assert list(records(unread)) == [Record(Event.JOB_DONE, 1, 2)]
    assert unread == b""


@given(st.binary(max_size=200))
def test_any_bytes_become_known_events_or_nothing(untrusted: bytes) -> None:
    for record in records(bytearray(untrusted)):
        assert record.event in Event
        assert str(record)


def test_every_event_has_a_sentence_and_a_place_in_the_documentation() -> None:
    documented = (ROOT / "docs" / "logging.md").read_text(encoding="utf-8")
    for event in Event:
        assert str(Record(event, 1, 2))
        assert f"`{event.name}`" in documented


def test_without_a_journal_a_plain_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    said: list[str] = []
    to_journal(said.append)(Record(Event.WORKER_READY))
    assert said == ["the worker is ready"]


def test_systemd_is_told_over_its_socket_and_nobody_is_told_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("READY=1")
        assert systemd.recv(64) == b"READY=1"
