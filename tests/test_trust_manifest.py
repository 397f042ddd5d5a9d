"""The parsers of model.sig: what they write they read, and anything else is refused and nothing but refused."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import VerificationRefused
from appliance.trust.manifest import (
    LARGEST_SIGNATURE,
    Envelope,
    Manifest,
    in_order,
    plain_path,
    pre_authentication_encoding,
)
from tests.bundles import VECTORS

GOOD = (VECTORS / "valid" / "bundle" / "model.sig").read_bytes()
PAYLOAD = Envelope.parse(GOOD).payload

parts = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,6}", fullmatch=True)
paths = st.lists(parts, min_size=1, max_size=4).map("/".join).filter(lambda path: path != "model.sig")
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(paths, digests, min_size=1, max_size=12))
def test_a_manifest_is_read_back_as_it_was_written(files: dict[str, str]) -> None:
    manifest = Manifest("a name", files)
    again = Manifest.parse(manifest.to_payload())
    assert again == manifest
    assert again.to_payload() == manifest.to_payload()
    assert list(again.digests) == in_order(files)


def test_an_envelope_is_read_back_as_it_was_written() -> None:
    assert Envelope.parse(GOOD).to_json() == GOOD


def test_paths_are_sorted_part_by_part_as_the_public_package_sorts_them() -> None:
    from pathlib import PurePosixPath

    names = ["a.txt", "a/b", "a-b/c", "a/B", "B", "a+", "a0/z"]
    assert in_order(dict.fromkeys(names)) == [str(path) for path in sorted(PurePosixPath(name) for name in names)]


def test_the_signed_bytes_are_those_of_the_dsse_protocol() -> None:
    # The example of the DSSE protocol, v1.0, with the type of this format.
    assert pre_authentication_encoding(b"hello world") == b"DSSEv1 28 application/vnd.in-toto+json 11 hello world"


@pytest.mark.parametrize(
    "path",
    ["", "/", "a/", "/a", "a//b", ".", "..", "a/..", ".a", "-a", "a b", "a\n", "a\0", "é", "a\\b", "~",
     "a/" * 8 + "a", "a" * 256],
)
def test_a_path_that_is_not_plain_is_no_path(path: str) -> None:
    assert not plain_path(path)


def test_a_signature_file_beyond_its_limit_is_refused_unread() -> None:
    with pytest.raises(VerificationRefused) as caught:
        Envelope.parse(b"{" * (LARGEST_SIGNATURE + 1))
    assert caught.value.reason == "signature_size"


def test_more_files_than_a_bundle_may_have_are_refused() -> None:
    with pytest.raises(VerificationRefused) as caught:
        Manifest.parse(Manifest("m", {f"f{n:05}": "ab" * 32 for n in range(4097)}).to_payload())
    assert caught.value.reason == "resource_count"


def test_json_nested_without_end_is_refused() -> None:
    for untrusted in (b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(VerificationRefused):
            Envelope.parse(untrusted)
        with pytest.raises(VerificationRefused):
            Manifest.parse(untrusted)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-8-sig"])
def test_other_encodings_of_json_are_refused(encoding: str) -> None:
    with pytest.raises(VerificationRefused):
        Envelope.parse(GOOD.decode().encode(encoding))
    with pytest.raises(VerificationRefused):
        Manifest.parse(PAYLOAD.decode().encode(encoding))


def refused_or_the_same(untrusted: bytes) -> None:
    """Fail on any exception but a refusal, and on an envelope that is accepted in a second form."""
    with suppress(VerificationRefused):
        assert Envelope.parse(untrusted).to_json() == untrusted
    with suppress(VerificationRefused):
        Manifest.parse(untrusted)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_arbitrary_bytes_raise_nothing_but_a_refusal(untrusted: bytes) -> None:
    refused_or_the_same(untrusted)


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_arbitrary_json_raises_nothing_but_a_refusal(value: Any) -> None:
    refused_or_the_same(json.dumps(value).encode())


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [above]
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in members:
        found += places(inner, (*above, key))
    return found


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    changed = value.copy()
    changed[place[0]] = replaced(value[place[0]], place[1:], new)
    return changed


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_of_another_type_in_any_place_is_refused(data: st.DataObject) -> None:
    for good, parse in ((GOOD, Envelope.parse), (PAYLOAD, Manifest.parse)):
        document = json.loads(good)
        place = data.draw(st.sampled_from(places(document)))
        new: object = data.draw(st.none() | st.integers() | st.floats() | st.just({}) | st.just([0]) | st.just([{}, {}]))
        changed = json.dumps(replaced(document, place, new), separators=(",", ":")).encode()
        with pytest.raises(VerificationRefused) as caught:
            parse(changed)
        assert str(caught.value).isprintable()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_signature_file_is_refused_or_is_in_the_one_form(data: st.DataObject) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    refused_or_the_same(bytes(content))
