"""What worker and engine say to each other, and what neither believes."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine import wire

PNG = b"\x89PNG\r\n\x1a\n" + b"rest"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("order", [wire.Generate(3, {"prompt": "ä\u2028", "steps": 3}), wire.Cancel(2**62)])
def test_an_order_arrives_as_it_was_sent(pair: tuple[socket.socket, socket.socket], order: wire.Order) -> None:
    wire.send(pair[0], order)
    assert wire.receive_order(pair[1]) == order


@pytest.mark.parametrize(
    "report",
    [
        wire.Hello(b"{}", "ab", "cd", {"model.json": "ef"}, "text"),
        wire.Progress(1, 1, 2, 20, 0.5, b"jpeg"),
        wire.Picture(1, 1, 7, "fp32", PNG),
        wire.Finished(1),
        wire.Failed(1, "wire", "a sentence", None),
        wire.Failed(1, "wire", "a sentence", "a hint"),
    ],
)
def test_a_report_arrives_as_it_was_sent(pair: tuple[socket.socket, socket.socket], report: wire.Report) -> None:
    wire.send(pair[0], report)
    assert wire.receive_report(pair[1]) == report


def test_a_frame_larger_than_the_sockets_buffer_arrives_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    report = wire.Picture(1, 1, 7, "fp32", PNG + bytes(5 << 20))
    sender = threading.Thread(target=wire.send, args=(pair[0], report))
    sender.start()
    assert wire.receive_report(pair[1]) == report
    sender.join()


def test_an_end_between_two_frames_is_no_error_and_an_end_within_one_is(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(b"\0\0")
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(wire.WireError):
        wire.receive_report(pair[1])
    pair[1].shutdown(socket.SHUT_WR)
    assert wire.receive_order(pair[0]) is None


def frame(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">II", len(header), len(body)) + header + body


@pytest.mark.parametrize(
    "raw",
    [
        frame(b""), frame(b"{"), frame(b"[]"), frame(b"null"), frame(b"\xff"), frame(b"{}"), frame(b'{"kind": "surprise"}'),
        frame(b'{"kind": "finished"}'), frame(b'{"kind": "finished", "job": -1}'), frame(b'{"kind": "finished", "job": true}'),
        frame(b'{"kind": "finished", "job": 1.0}'), frame(b'{"kind": "finished", "job": 1, "more": 1}'),
        frame(b'{"kind": "progress", "job": 1, "picture": 1, "step": 1, "steps": 2, "seconds": NaN}'),
        frame(b'{"kind": "progress", "job": 1, "picture": 1, "step": 1, "steps": 2, "seconds": 1e999}'),
        frame(b'{"kind": "picture", "job": 1, "picture": 1, "seed": 1, "variant": "v"}', b"<script>"),
        frame(b'{"kind": "failed", "job": 1, "reason": "r", "message": "m", "hint": 1}'),
        frame(b'{"kind": "hello", "digest": "a", "key": "b", "licence": "c", "digests": []}'),
        frame(b'{"kind": ' * 5000 + b"1" + b"}" * 5000), frame(b"1" * 5000),
        struct.pack(">II", wire.LARGEST_HEADER + 1, 0), struct.pack(">II", 0, wire.LARGEST_BODY + 1),
        b"\x00\x00\x00\x05\x00\x00\x00\x00{",
    ],
)
@pytest.mark.parametrize("receive", [wire.receive_report, wire.receive_order])
def test_a_frame_that_breaks_a_rule_is_refused_without_being_quoted(
    pair: tuple[socket.socket, socket.socket], raw: bytes, receive: Callable[[socket.socket], object]
) -> None:
    pair[0].sendall(raw)
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(wire.WireError) as refused:
        receive(pair[1])
    assert "script" not in str(refused.value)
    assert "surprise" not in str(refused.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_understood_and_nothing_else(raw: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(raw)
        ours.shutdown(socket.SHUT_WR)
        try:
            assert wire.receive_report(theirs) is None or raw
        except wire.WireError:
            pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
)


@given(st.sampled_from(["hello", "progress", "picture", "finished", "failed"]), st.dictionaries(
    st.sampled_from(["job", "picture", "step", "steps", "seconds", "seed", "variant", "reason", "message", "hint", "digest", "key",
                     "digests", "licence"]), json_values))
def test_any_json_of_a_known_kind_is_refused_or_understood(kind: str, fields: dict[str, object]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame(json.dumps({"kind": kind, **fields}).encode()))
        ours.shutdown(socket.SHUT_WR)
        try:
            assert wire.receive_report(theirs) is not None
        except wire.WireError:
            pass


def test_no_message_shows_its_content_in_its_repr() -> None:
    shown = repr(wire.Generate(1, {"prompt": "canary"})) + repr(wire.Picture(1, 1, 1, "v", b"canary"))
    assert "canary" not in shown
