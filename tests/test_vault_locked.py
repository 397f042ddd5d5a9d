"""A persistent vault with real files: slots, generations, crashes at every write, replays, damage, and guessing."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import BadRequest, DarkroomError, VaultError
from appliance.vault import keys as keys_module
from appliance.vault.header import HEADER, Header, HeaderFile, Policy
from appliance.vault.keys import Argon2, Hkdf, KeyFile, Passphrase, Pbkdf2, RecoveryKey, Secret, Slot, VolumeKey
from appliance.vault.locked import LockedVault, Moment, UnlockedVault
from appliance.vault.state import FailedUnlocks
from appliance.vault.volume import Generation, ImageId, Vault
from tests.vaults import ANNA, Counted, put

WORDS, OTHER = Passphrase("several words are easy"), Passphrase("quite other words here")
PAPER, STICK = RecoveryKey(bytes(range(25))), KeyFile(bytes(range(64)))
MOMENT = Moment("b" * 32, 1_000_000)


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest derivation that a header may ask for: these tests are about the slots."""
    monkeypatch.setattr(keys_module, "Argon2", lambda: Argon2(19_456, 1, 1))
    monkeypatch.setattr(keys_module, "Pbkdf2", lambda: Pbkdf2(200_000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "vault"
    folder.mkdir(0o700)
    return folder


def opened(folder: Path, secret: Secret = STICK, tries: Counted | None = None, moment: Moment = MOMENT) -> UnlockedVault:
    return LockedVault.at(folder).unlock(secret, tries=tries or Counted(), capacity=64 << 20, moment=moment)


def refused(folder: Path, secret: Secret = STICK, tries: Counted | None = None, moment: Moment = MOMENT) -> str:
    """Return why the vault does not open, having looked that nothing was changed by trying."""
    before = state(folder)
    with pytest.raises(VaultError) as why:
        opened(folder, secret, tries, moment).close()
    assert state(folder) == before
    return why.value.reason


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(("-reserve", "-wal")) or (path.name.endswith("-wal") and path.stat().st_size)}


def saved(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def database(folder: Path) -> Path:
    (path,) = (path for path in folder.glob("vault-*") if "-" not in path.name.removeprefix("vault-"))
    return path


@pytest.fixture
def filled(folder: Path) -> tuple[Path, ImageId]:
    """A closed vault with one picture, opened by STICK."""
    LockedVault.init(folder, [STICK])
    with opened(folder) as vault:
        image = put(vault.vault, b"kept" * 20_000)
    return folder, image


# ── Slots ─────────────────────────────────────────────────────────────────────


def test_every_kind_of_secret_opens_the_same_vault(folder: Path) -> None:
    LockedVault.init(folder, [WORDS, PAPER, STICK])
    with opened(folder) as vault:
        image = put(vault.vault)
    for secret in (WORDS, RecoveryKey.parse(PAPER.printed().lower().replace("-", " ")), STICK):
        with opened(folder, secret) as vault:
            assert vault.vault.get(ANNA, image) is not None
    assert refused(folder, OTHER) == refused(folder, RecoveryKey.fresh()) == refused(folder, KeyFile.fresh()) == "unlock_refused"


def test_a_slot_is_added_changed_and_removed_and_the_last_one_stays(filled: tuple[Path, ImageId]) -> None:
    folder, image = filled
    with opened(folder) as vault:
        assert vault.add(WORDS) == 1
        vault.change(1, OTHER)
        with pytest.raises(BadRequest):
            vault.remove(5)
    assert refused(folder, WORDS) == "unlock_refused"
    with opened(folder, OTHER) as vault:
        vault.remove(0)
        with pytest.raises(BadRequest) as last:
            vault.remove(1)
        assert last.value.reason == "slot_last"
    assert refused(folder, STICK) == "unlock_refused"
    with opened(folder, OTHER) as vault:
        assert vault.vault.get(ANNA, image) is not None
        for _ in range(7):
            vault.add(KeyFile.fresh())
        with pytest.raises(BadRequest) as full:
            vault.add(KeyFile.fresh())
        assert full.value.reason == "slots_full"


def test_under_the_approved_policy_a_passphrase_goes_through_pbkdf2(folder: Path) -> None:
    LockedVault.init(folder, [OTHER], Policy(approved_only=True))
    header = HeaderFile.at(folder).read()
    assert header is not None
    assert isinstance(header.slots[0].kdf, Pbkdf2)
    opened(folder, OTHER).close()


def test_a_weak_passphrase_makes_no_vault_and_leaves_nothing(folder: Path) -> None:
    with pytest.raises(BadRequest):
        LockedVault.init(folder, [Passphrase("short")])
    assert list(folder.iterdir()) == []
    LockedVault.init(folder, [STICK])
    with pytest.raises(VaultError) as exists:
        LockedVault.init(folder, [STICK])
    assert exists.value.reason == "vault_exists"


def test_rekey_makes_a_saved_header_useless_which_would_have_worked_without_it(folder: Path, tmp_path: Path) -> None:
    LockedVault.init(folder, [STICK, WORDS])
    with opened(folder) as vault:
        image = put(vault.vault)
    stolen = HeaderFile.at(folder).read()
    assert stolen is not None
    key = stolen.slots[1].opened(WORDS, stolen.volume)      # by somebody with the saved header and the passphrase, and no use for ours
    assert key is not None
    with opened(folder) as vault:
        vault.remove(1)
    copy = Vault.open(folder, key.copy(), capacity=1)
    assert copy.get(ANNA, image) is not None                # removing the slot was not enough
    copy.close()
    with opened(folder) as vault:
        vault.rekey([STICK])
        assert vault.vault.get(ANNA, image) is not None
    raw = database(folder)
    shutil.copy(raw, disguised := tmp_path / f"vault-{key.volume.hex()}")
    disguised.chmod(0o600)
    with pytest.raises(VaultError) as useless:
        Vault.open(tmp_path, key, capacity=1)
    assert useless.value.reason == "vault_damaged"
    assert len([path for path in folder.iterdir() if not path.name.endswith("-reserve")]) == 2
    with opened(folder) as vault:
        assert vault.vault.get(ANNA, image) is not None


# ── Generations ───────────────────────────────────────────────────────────────


class Killed(BaseException):
    """The machine went off here."""


def every_write(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Call `before` ahead of every write of a generation and of a header, and ahead of the old database's removal."""
    from appliance.vault import locked

    for owner, name in ((Vault, "record"), (HeaderFile, "write"), (locked, "_remove_database"), (Vault, "copy")):
        real = getattr(owner, name)

        def hooked(*values: object, _real: Callable[..., object] = real) -> object:
            before()
            return _real(*values)

        monkeypatch.setattr(owner, name, hooked)


@pytest.mark.parametrize("act", ["add", "remove", "rekey", "close"])
def test_killed_before_any_write_the_vault_is_the_old_or_the_new_one_and_goes_on(
    act: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LockedVault.init(folder, [STICK, PAPER])
    with opened(folder) as vault:
        image = put(vault.vault)
    points: list[Path] = []

    def snapshot() -> None:
        points.append(saved(folder, tmp_path / f"point-{len(points)}"))

    vault = opened(folder)
    with monkeypatch.context() as patch:
        every_write(patch, snapshot)
        match act:
            case "add":
                vault.add(KeyFile(bytes(64)))
            case "remove":
                vault.remove(1)
            case "rekey":
                vault.rekey([STICK, PAPER])
            case _:
                vault.close()
        snapshot()
    if act != "close":
        vault.close()
    assert len(points) >= 3
    for point in points:
        with opened(point) as again:
            assert again.vault.get(ANNA, image) is not None
            assert len(again.slots) in {"add": (2, 3), "remove": (1, 2)}.get(act, (2,))
            assert again.vault.generation == Generation(again.generation, again.generation)
        with opened(point):
            pass
        assert len([path for path in point.iterdir() if path.name.startswith("vault-") and "-" not in path.name[6:]]) == 1


def test_an_older_header_is_refused_also_the_one_right_before_a_change(filled: tuple[Path, ImageId]) -> None:
    folder, _ = filled
    with opened(folder) as vault:
        vault.add(WORDS)
        before = (folder / HEADER).read_bytes()
        vault.remove(1)
        now = vault.generation
    for age, old in enumerate((before,)):
        (folder / HEADER).write_bytes(old)
        assert refused(folder) == "vault_replayed", age
        assert refused(folder, WORDS) == "vault_replayed"      # the removed passphrase unwraps the key, and is turned away
    assert now > 3


def test_an_older_database_is_refused_by_a_newer_header(filled: tuple[Path, ImageId]) -> None:
    folder, _ = filled
    old = database(folder).read_bytes()
    opened(folder).close()
    database(folder).write_bytes(old)
    assert refused(folder) == "vault_replayed"


def test_both_files_put_back_together_are_not_detected_but_for_the_generation(filled: tuple[Path, ImageId], tmp_path: Path) -> None:
    folder, _ = filled
    old = saved(folder, tmp_path / "old")
    with opened(folder) as vault:
        highest = vault.generation
        put(vault.vault)
    with opened(old) as vault:
        assert len(vault.vault.images(ANNA)) == 1
    with opened(folder) as vault:
        assert vault.generation > highest
    with opened(saved(tmp_path / "old", tmp_path / "again")) as vault:
        assert vault.generation <= highest + 1


def test_a_single_page_put_back_is_not_detected(filled: tuple[Path, ImageId]) -> None:
    folder, image = filled
    path = database(folder)
    with opened(folder) as vault:
        pages = vault.vault._pages
        assert pages is not None
        pages.checkpoint()
        before = path.read_bytes()
        with pages.transaction() as connection:
            connection.execute("UPDATE contents SET png = ?", (b"new!" * 20_000,))
    after = bytearray(path.read_bytes())
    last = max(at for at in range(0, min(len(before), len(after)), 8192) if before[at:at + 8192] != after[at:at + 8192])
    after[last:last + 8192] = before[last:last + 8192]
    path.write_bytes(after)
    with opened(folder) as vault:
        kept = vault.vault.get(ANNA, image)
        assert kept is not None
        assert b"kept" in kept.png
        assert b"new!" in kept.png
        assert vault.vault.damage() == ()


# ── Damage ────────────────────────────────────────────────────────────────────


def test_every_flipped_bit_of_the_header_is_refused(filled: tuple[Path, ImageId]) -> None:
    folder, _ = filled
    good = (folder / HEADER).read_bytes()
    header = Header.parse(good)
    key = header.slots[0].opened(STICK, header.volume)
    assert key is not None
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            try:
                changed = Header.parse(bytes(bad))
            except VaultError as error:
                assert error.reason == "header_refused"        # noqa: PT017
                continue
            found = next(filter(None, (slot.opened(STICK, changed.volume) for slot in changed.slots if slot.kind == "keyfile")), None)
            assert found is None or not changed.is_sealed_by(found), (at, bit)
    (folder / HEADER).write_bytes(good.replace(b'"generation": ', b'"generation": 1'))
    assert refused(folder) == "header_refused"
    (folder / HEADER).write_bytes(good)
    opened(folder).close()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400) | st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["format", "volume", "generation", "policy", "slots", "mac", "x"]), inner, max_size=7), max_leaves=12).map(lambda value: __import__("json").dumps(value).encode()))
def test_whatever_is_no_header_is_refused_with_a_reason(untrusted: bytes) -> None:
    with pytest.raises(VaultError) as why:
        Header.parse(untrusted)
    assert why.value.reason == "header_refused"


@given(
    st.integers(1, 2**53 - 1), st.none() | st.integers(1, 1000), st.booleans(),
    st.lists(st.sampled_from([("passphrase", Argon2()), ("passphrase", Pbkdf2()), ("recovery", Hkdf()), ("keyfile", Hkdf())]), max_size=8),
)
def test_a_header_reads_back_as_it_was_written(generation: int, after: int | None, approved: bool, slots: list[tuple[str, object]]) -> None:
    key = VolumeKey(bytes(32), bytes(16))
    header = Header(key.volume, generation, Policy(approved, after), tuple(
        Slot(number, kind, kdf, bytes(32), bytes(40)) for number, (kind, kdf) in enumerate(slots)    # type: ignore[arg-type]
    )).sealed(key)
    assert Header.parse(header.to_bytes()) == header
    assert header.is_sealed_by(key)
    assert not replace(header, generation=generation % 7 + 1 if generation % 7 + 1 != generation else 9).is_sealed_by(key)


def test_a_database_cut_at_any_page_is_refused_and_left_as_it_is(filled: tuple[Path, ImageId]) -> None:
    folder, _ = filled
    path = database(folder)
    good = path.read_bytes()
    for length in (*range(0, len(good), 8192), len(good) - 1, 100):
        path.write_bytes(good[:length])
        assert refused(folder) == "vault_damaged", length
    path.unlink()
    assert refused(folder) == "vault_missing"
    path.write_bytes(good)
    path.chmod(0o600)
    opened(folder).close()


def test_a_damaged_page_is_told_and_the_other_pictures_can_still_be_read(filled: tuple[Path, ImageId]) -> None:
    folder, image = filled
    with opened(folder) as vault:
        other = put(vault.vault, b"more" * 20_000)
    path = database(folder)
    good = path.read_bytes()
    told = 0
    for page in range(len(good) // 8192):
        bad = bytearray(good)
        bad[page * 8192 + 4000] ^= 1
        path.write_bytes(bad)
        try:
            vault = opened(folder)
        except VaultError as error:
            assert error.reason == "vault_damaged"        # noqa: PT017
            assert path.read_bytes() == bad
            told += 1
            continue
        failed = []
        for one in (image, other):
            try:
                assert vault.vault.get(ANNA, one) is not None
            except VaultError as error:
                assert error.reason == "vault_damaged"        # noqa: PT017
                failed.append(one)
        assert len(failed) < 2 or page < 10
        told += bool(failed) or bool(vault.vault.damage())
        vault.vault.close()
    assert told == len(good) // 8192


def test_a_foreign_header_does_not_open_the_database(filled: tuple[Path, ImageId], tmp_path: Path) -> None:
    folder, _ = filled
    other = tmp_path / "other"
    other.mkdir(0o700)
    LockedVault.init(other, [STICK])
    shutil.copy(other / HEADER, folder / HEADER)
    assert refused(folder) == "vault_missing"
    database(folder).rename(folder / database(other).name)
    assert refused(folder) == "vault_damaged"


# ── Guessing ──────────────────────────────────────────────────────────────────


def test_failed_unlocks_are_counted_before_they_are_tried_and_made_to_wait(filled: tuple[Path, ImageId]) -> None:
    folder, _ = filled
    tries = Counted()
    for count in range(1, 4):
        assert refused(folder, WORDS if count == 9 else KeyFile.fresh(), tries) == "unlock_refused"
        assert tries.failed.count == count
    assert refused(folder, STICK, tries) == "unlock_throttled"      # also the right one, and it is not counted
    assert tries.failed.count == 3
    assert refused(folder, STICK, tries, Moment("c" * 32, 1_999)) == "unlock_throttled"     # a boot gives no free try
    opened(folder, STICK, tries, Moment(MOMENT.boot, MOMENT.boottime + 2_000)).close()
    assert tries.failed == FailedUnlocks()


def test_the_wait_doubles_to_a_quarter_of_an_hour() -> None:
    waits = [Moment("a", 5).must_wait(FailedUnlocks(count, "a", 5)) for count in range(3, 14)]
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]


def test_after_so_many_failures_the_slots_are_destroyed_where_the_policy_says_so(filled: tuple[Path, ImageId], tmp_path: Path) -> None:
    folder, _ = filled
    with opened(folder) as vault:
        vault.set_policy(Policy(destroy_after=3))
    tries = Counted()
    for _ in range(2):
        assert refused(folder, KeyFile.fresh(), tries) == "unlock_refused"
    with (folder / HEADER).open("rb") as held:
        with pytest.raises(VaultError) as gone:
            opened(folder, KeyFile.fresh(), tries)
        assert held.read().strip(b"\0") == b""        # overwritten, not only unlinked
    assert gone.value.reason == "slots_destroyed"
    assert not (folder / HEADER).exists()


def test_a_replaced_headers_bytes_are_overwritten(filled: tuple[Path, ImageId]) -> None:
    folder, _ = filled
    with opened(folder) as vault, (folder / HEADER).open("rb") as held:
        vault.add(WORDS)
        assert held.read().strip(b"\0") == b""


# ── Secrets ───────────────────────────────────────────────────────────────────


@given(st.binary(min_size=25, max_size=25), st.integers(0, 54), st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZ"))
def test_a_recovery_key_reads_back_and_a_mistyped_character_is_found(content: bytes, at: int, letter: str) -> None:
    printed = RecoveryKey(content).printed()
    assert RecoveryKey.parse(printed.lower()) == RecoveryKey(content)
    if printed[at] not in ("-", letter):
        with pytest.raises(BadRequest) as found:
            RecoveryKey.parse(printed[:at] + letter + printed[at + 1:])
        assert f"group {at // 7 + 1} " in str(found.value)


def test_nothing_of_a_secret_is_in_its_repr_and_it_cannot_be_pickled() -> None:
    import pickle

    key = VolumeKey(bytes(range(32)), bytes(16))
    for secret in (WORDS, PAPER, STICK, key):
        assert "several" not in repr(secret)
        assert "\\x01" not in repr(secret)
        with pytest.raises(TypeError):
            pickle.dump(secret, io.BytesIO())


@pytest.mark.parametrize("bad", [(19_455, 1, 1), (1 << 21, 1, 1), (1 << 20, 9, 1), (65_536, 0, 1), (65_536, 1, 17)])
def test_parameters_of_a_derivation_are_bounded(bad: tuple[int, int, int]) -> None:
    with pytest.raises(DarkroomError):
        Argon2(*bad)
    with pytest.raises(DarkroomError):
        Pbkdf2(199_999)


@pytest.fixture(scope="module")
def openssl() -> str:
    found = shutil.which("openssl")
    if found is None:
        pytest.skip("no openssl here")
    return found


def test_a_slot_opens_with_openssl_alone(openssl: str, folder: Path) -> None:
    import subprocess

    LockedVault.init(folder, [OTHER], Policy(approved_only=True))
    header = HeaderFile.at(folder).read()
    assert header is not None
    (slot,) = header.slots
    assert isinstance(slot.kdf, Pbkdf2)
    kek = subprocess.run(
        [openssl, "kdf", "-keylen", "32", "-kdfopt", "digest:SHA512", "-kdfopt", f"pass:{OTHER.text}", "-kdfopt",
         f"hexsalt:{slot.salt.hex()}", "-kdfopt", f"iter:{slot.kdf.iterations}", "PBKDF2"],
        capture_output=True, text=True, check=True,
    ).stdout.strip().replace(":", "")
    key = subprocess.run(
        [openssl, "enc", "-d", "-id-aes256-wrap", "-K", kek, "-iv", "A6A6A6A6A6A6A6A6"], input=slot.wrapped, capture_output=True, check=True,
    ).stdout
    ours = slot.opened(OTHER, header.volume)
    assert ours is not None
    assert bytes(ours._key) == key
