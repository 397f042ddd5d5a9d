"""The certificate of sanitization: what it may claim, its one form, and openssl as the witness."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import VerificationRefused
from appliance.evidence.canonical import decode, encode
from appliance.evidence.certificate import (
    BY_HAND,
    LARGEST_CERTIFICATE,
    Act,
    Certificate,
    Item,
    Outcome,
    Remains,
    Technique,
    Verification,
    What,
    keep,
)
from appliance.evidence.records import Mode, Moment, Trigger
from appliance.evidence.signature import Signed, check, fingerprint, public_pem, sign
from appliance.trust.key import TrustedKey
from appliance.vault.state import State

KEY = ec.derive_private_key(0x1234567, ec.SECP256R1())
DEVICE = TrustedKey.of(KEY.public_key())
GONE = Item(What.VOLUME_KEY, (Technique.CRYPTOGRAPHIC_ERASE, Technique.PROCESS_ENDED), (Verification.REAPED, Verification.REAPED), Outcome.ERASED)
FILE = Item(
    What.VAULT_FILE, (Technique.OVERWRITE, Technique.UNLINK), (Verification.READ_BACK, Verification.ABSENT), Outcome.ERASED,
    (Remains.FLASH_SPARE_AREA,),
)
SWAP = Item(What.SWAP, (), (), Outcome.FAILED, (Remains.NOT_REACHED,))
GOOD = Certificate(
    Act.ERASE, Mode.PERSISTENT, Trigger.WIPE_COMMAND, (FILE, GONE), 41, Moment(1_790_000_000_000, 123_456, "ab" * 16), 7, "cd" * 32,
    fingerprint(KEY), "0.1.0",
)
SIGNED = sign(GOOD.as_bytes(), KEY)


def refused(act: object) -> VerificationRefused:
    with pytest.raises(VerificationRefused) as caught:
        act()       # type: ignore[operator]
    return caught.value


def test_openssl_alone_verifies_a_certificate_and_refuses_a_changed_one(tmp_path: Path) -> None:
    (tmp_path / "cert.json").write_bytes(SIGNED.content)
    (tmp_path / "cert.sig").write_bytes(SIGNED.signature)
    (tmp_path / "key.pem").write_bytes(public_pem(KEY))
    command = ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "cert.sig", "cert.json"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout == b"Verified OK\n"
    (tmp_path / "cert.json").write_bytes(SIGNED.content.replace(b":41,", b":40,"))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


def test_what_was_written_is_read_again() -> None:
    assert Certificate.parse(SIGNED.content) == GOOD
    assert Certificate.read(SIGNED, DEVICE) == GOOD
    assert sign(GOOD.as_bytes(), KEY) == SIGNED        # signing again after a crash makes the same bytes


def test_the_bytes_are_sorted_compact_ascii_json_as_rfc_8785_writes_them() -> None:
    assert json.dumps(json.loads(SIGNED.content), sort_keys=True, separators=(",", ":")).encode() == SIGNED.content
    assert SIGNED.content.startswith(b'{"act":"erase","boot":"abab')
    assert b'"time_verified":false' in SIGNED.content
    assert b'"medium":"not sanitized as a whole"' in SIGNED.content


def test_every_flipped_bit_of_a_certificate_is_refused() -> None:
    for index in range(len(SIGNED.content)):
        changed = bytearray(SIGNED.content)
        changed[index] ^= 1 << index % 8
        refused(lambda content=bytes(changed): Certificate.read(Signed(content, SIGNED.signature), DEVICE))


def test_every_flipped_bit_of_a_signature_and_every_cut_one_is_refused() -> None:
    for bit in range(8 * len(SIGNED.signature)):
        changed = bytearray(SIGNED.signature)
        changed[bit // 8] ^= 1 << bit % 8
        assert refused(lambda made=bytes(changed): check(Signed(SIGNED.content, made), DEVICE, "c")).reason == "signature_invalid"
    for length in range(len(SIGNED.signature)):
        refused(lambda made=SIGNED.signature[:length]: check(Signed(SIGNED.content, made), DEVICE, "c"))
    refused(lambda: check(Signed(SIGNED.content, SIGNED.signature + b"\0"), DEVICE, "c"))


def test_another_devices_signature_and_a_key_on_another_curve_are_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    refused(lambda: Certificate.read(sign(GOOD.as_bytes(), other), DEVICE))
    large = TrustedKey.of(ec.generate_private_key(ec.SECP384R1()).public_key())
    assert refused(lambda: Certificate.read(SIGNED, large)).reason == "key_kind"


VALUES = json.loads(SIGNED.content)


@pytest.mark.parametrize("key", sorted(VALUES))
def test_a_certificate_without_one_of_its_keys_is_refused(key: str) -> None:
    refused(lambda: Certificate.parse(encode({name: value for name, value in VALUES.items() if name != key})))


@pytest.mark.parametrize("key", sorted(VALUES))
@pytest.mark.parametrize("value", ["word", -1, 2**53 - 1, True, [], {}, "0" * 64], ids=str)
def test_a_value_of_another_kind_is_refused_or_says_what_it_did(key: str, value: object) -> None:
    content = encode({**VALUES, key: value})        # type: ignore[dict-item]
    try:
        made = Certificate.parse(content)
    except VerificationRefused:
        return
    # A number may be another number, a digest another digest, a version another word; each comes back as it was.
    assert key in {"time", "boottime", "record", "milliseconds_to_key_gone", "record_digest", "device", "version"} or content == SIGNED.content
    assert made.as_bytes() == content


def test_a_key_beside_the_known_ones_is_refused_also_inside_an_item() -> None:
    refused(lambda: Certificate.parse(encode({**VALUES, "note": "x"})))
    refused(lambda: Certificate.parse(encode({**VALUES, "items": [{**VALUES["items"][0], "note": "x"}, VALUES["items"][1]]})))


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"null", b"\xff", SIGNED.content + b"\n", b" " + SIGNED.content, SIGNED.content[:-1],
    SIGNED.content.replace(b'"act":"erase"', b'"act":"erase","act":"erase"'), SIGNED.content.replace(b"41", b"41.0"),
    SIGNED.content.replace(b"erase", b"er\\u0061se"), b"[" * 10_000, b'{"a":' * 3000, b"9" * 10_000,
    b"{" + b" " * LARGEST_CERTIFICATE + b"}",
])
def test_any_other_spelling_is_refused(content: bytes) -> None:
    assert refused(lambda: Certificate.parse(content)).reason == "evidence_form"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=10,
).map(lambda value: json.dumps(value).encode()))
def test_the_parser_refuses_and_never_breaks(content: bytes) -> None:
    refused(lambda: Certificate.parse(content))


TEXT = st.text(alphabet=[chr(code) for code in range(32, 127) if chr(code) not in '"\\'], max_size=10)
TREE = st.recursive(
    st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), TREE, max_size=4))
def test_the_canonical_form_is_read_as_what_it_was_written_from(value: dict[str, object]) -> None:
    try:
        content = encode(value)     # type: ignore[arg-type]
    except ValueError:
        return      # nested deeper than evidence is
    assert decode(content, "here", largest=1 << 20) == value


@pytest.mark.parametrize("value", [{"A": 1}, {"a": None}, {"a": 1.5}, {"a": "\n"}, {"a": 'x"'}, {"a": "é"}, {"a": 2**53}, {"": 1}, {1: 1}])
def test_what_has_no_canonical_form_is_not_written(value: object) -> None:
    with pytest.raises(ValueError, match="canonical form"):
        encode(value)       # type: ignore[arg-type]


@st.composite
def items(draw: st.DrawFn) -> Item:
    what = draw(st.sampled_from(list(What)))
    techniques = tuple(draw(st.lists(st.sampled_from(list(Technique)), unique=True, max_size=4)))
    verifications = tuple(draw(st.sampled_from(list(Verification))) for _ in techniques)
    remains = tuple(sorted(draw(st.lists(st.sampled_from(list(Remains)), unique=True, max_size=3))))
    try:
        return Item(what, techniques, verifications, draw(st.sampled_from(list(Outcome))), remains)
    except VerificationRefused:
        return GONE


@settings(max_examples=200, deadline=None)
@given(st.lists(items(), max_size=5))
def test_every_certificate_that_can_be_made_is_read_as_itself(several: list[Item]) -> None:
    by_name = {item.what: item for item in several} | {What.VOLUME_KEY: GONE}
    try:
        made = replace(GOOD, act=Act.CLOSE, items=tuple(by_name[name] for name in sorted(by_name)))
    except VerificationRefused:
        raise AssertionError("a close of a persistent vault may say all of this") from None
    assert Certificate.parse(made.as_bytes()) == made
    assert made.complete == all(item.outcome in {Outcome.ERASED, Outcome.KEPT} for item in made.items)


@pytest.mark.parametrize(("fact", "change"), [
    ("not verified by read_back", {"techniques": (Technique.PROCESS_ENDED,), "verifications": (Verification.READ_BACK,)}),
    ("not verified by reaped", {"techniques": (Technique.OVERWRITE,), "verifications": (Verification.REAPED,)}),
    ("not one verification", {"verifications": ()}),
    ("not one verification", {"techniques": (Technique.UNLINK,) * 2, "verifications": (Verification.ABSENT,) * 2}),
    ("erased by nothing", {"techniques": (), "verifications": ()}),
    ("nothing said of what remains", {"outcome": Outcome.FAILED}),
    ("nothing said of what remains", {"outcome": Outcome.PARTLY}),
    ("something was done to it", {"outcome": Outcome.KEPT, "remains": (Remains.CIPHERTEXT_AND_SLOTS,)}),
    ("not sorted", {"remains": (Remains.READ_ONLY, Remains.DISK_ERROR)}),
    ("not sorted", {"remains": (Remains.READ_ONLY, Remains.READ_ONLY)}),
])
def test_an_item_cannot_claim_more_than_it_shows(fact: str, change: dict[str, object]) -> None:
    assert fact in str(refused(lambda: replace(GONE, **change)))       # type: ignore[arg-type]


KEPT = Item(What.KEY_SLOTS, (), (), Outcome.KEPT, (Remains.CIPHERTEXT_AND_SLOTS,))


@pytest.mark.parametrize("change", [
    {"items": ()}, {"items": (FILE,)}, {"items": (GONE, FILE)}, {"items": (GONE, GONE)}, {"items": (KEPT, GONE)},
    {"items": (KEPT, GONE), "act": Act.CLOSE, "mode": Mode.SESSION}, {"version": "0.1 beta"}, {"version": ""}, {"digest": "CD" * 32},
    {"device": ""}, {"milliseconds": -1}, {"record": True},
])
def test_a_certificate_that_disagrees_with_itself_cannot_be_made(change: dict[str, object]) -> None:
    refused(lambda: replace(GOOD, **change))       # type: ignore[arg-type]


def test_only_the_close_of_a_persistent_vault_keeps_something() -> None:
    assert replace(GOOD, act=Act.CLOSE, items=(KEPT, GONE)).complete


def test_what_could_not_be_erased_is_said_on_the_first_lines_and_at_the_item() -> None:
    certificate = replace(GOOD, items=(SWAP, FILE, GONE))
    assert not certificate.complete
    text = certificate.as_text(sign(certificate.as_bytes(), KEY))
    assert "NO, see the items" in text
    assert "it is not the appliance's to reach" in text
    assert "flash may keep overwritten blocks in its spare area" in text


def test_the_page_has_every_field_and_lines_to_fill_in_for_what_the_appliance_does_not_know() -> None:
    text = GOOD.as_text(SIGNED)
    for wanted in (
        "CERTIFICATE OF SANITIZATION", "NIST SP 800-88 Rev. 2", "erase of a persistent vault, by wipe command", "darkroom 0.1.0",
        "unverified", "2026-09-21 14:13:20.000 UTC", "123456 ms, boot abab", "41 ms", "yes, read back", "yes, its parent reaped the process",
        f"sha256:{SIGNED.digest}", f"7, sha256:{'cd' * 32}", "not sanitized as a whole",
    ):
        assert wanted in text, wanted
    assert text.count("_" * 36) == sum(len(labels) for _, labels in BY_HAND)
    assert all(len(line) < 200 and line.isascii() for line in text.splitlines())


def test_a_kept_certificate_always_has_its_signature_and_keeping_again_changes_nothing(tmp_path: Path) -> None:
    with State.open(tmp_path / "state") as state:
        name = keep(state.certificates, GOOD, SIGNED)
        assert keep(state.certificates, GOOD, SIGNED) == name
        assert state.certificates.names() == [f"{name}.json", f"{name}.sig"]
        assert state.certificates.read(f"{name}.json") == SIGNED.content
        assert state.certificates.read(f"{name}.sig") == SIGNED.signature
