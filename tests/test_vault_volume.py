"""The vault with real files: what is kept, for whom, for how long, and what a full or failing storage does to it."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from appliance.errors import VaultError
from appliance.vault.age import Age, Retention
from appliance.vault.keys import VolumeKey
from appliance.vault.pages import Pages
from appliance.vault.thumbnail import SIDE, thumbnail_of
from appliance.vault.volume import ImageId, Vault
from tests.vaults import ANNA, BERT, asked, put

PAD = 8192


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def vault(folder: Path) -> Iterator[Vault]:
    vault = Vault.ephemeral(folder, capacity=64 << 20)
    yield vault
    vault.close()


class Clock:
    """A wall clock that can be set, and the time since boot."""

    def __init__(self) -> None:
        self.wall, self.boot = 1_800_000_000.0, 500.0

    def __call__(self) -> tuple[float, float]:
        return self.wall, self.boot

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds


def png(side: int = 300) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((side, side), 80).convert("RGB").save(out, "PNG")
    return out.getvalue()


# ── Keeping ───────────────────────────────────────────────────────────────────


def test_a_picture_comes_back_as_it_was_put_with_how_it_was_made(vault: Vault) -> None:
    before = time.time()
    kept = vault.get(ANNA, put(vault, b"\x89PNG and {more}", prompt="a green frog {}"))
    assert kept is not None
    assert (kept.png, kept.request, kept.seed, kept.variant) == (b"\x89PNG and {more}", asked("a green frog {}"), 7, "fp32")
    assert before <= kept.made_at <= time.time()
    assert "frog" not in repr(kept)
    assert "more" not in repr(kept)


def test_another_sessions_picture_is_answered_like_one_that_never_was(vault: Vault) -> None:
    image = put(vault, png())
    for session, one in ((BERT, image), (ANNA, ImageId("guessed"))):
        assert vault.get(session, one) is None
        assert vault.thumbnail(session, one) is None
        assert vault.delete(session, one) is False
    assert vault.images(BERT) == ()
    assert vault.get(ANNA, image) is not None
    vault.end(BERT)
    assert [kept.id for kept in vault.images(ANNA)] == [image]
    assert vault.sessions() == (ANNA,)


def test_pictures_are_listed_newest_first_without_their_bytes(vault: Vault) -> None:
    images = [put(vault) for _ in range(5)]
    assert [kept.id for kept in vault.images(ANNA)] == images[::-1]
    assert [kept.id for kept in vault.images(ANNA, newest=2)] == images[:2:-1]
    assert not hasattr(vault.images(ANNA)[0], "png")


def test_a_full_vault_refuses_and_keeps_what_it_has(folder: Path) -> None:
    vault = Vault.ephemeral(folder, capacity=3 * (PAD + 20_000))
    images = [put(vault) for _ in range(2)]
    held = vault.held
    with pytest.raises(VaultError) as refused:
        put(vault, bytes(40_000))
    assert refused.value.reason == "vault_full"
    assert vault.held == held
    assert [kept.id for kept in vault.images(ANNA)] == images[::-1]
    vault.delete(ANNA, images[0])
    put(vault)
    vault.close()


def test_the_files_are_their_owners_alone_and_go_with_a_session_vault(folder: Path) -> None:
    vault = Vault.ephemeral(folder, capacity=1 << 20)
    put(vault)
    files = list(folder.iterdir())
    assert len(files) == 3
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.name.startswith("session-")
        assert b"PNG" not in file.read_bytes()
        assert b"apple" not in file.read_bytes()
    vault.close()
    vault.close()
    assert list(folder.iterdir()) == []
    with pytest.raises(VaultError) as closed:
        put(vault)
    assert closed.value.reason == "vault_closed"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_may_enter_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(VaultError) as refused:
        Vault.ephemeral(folder, capacity=1)
    assert refused.value.reason == "vault_refused"
    assert list(folder.iterdir()) == []


def test_a_link_in_the_place_of_the_database_is_not_followed(folder: Path) -> None:
    key, elsewhere = VolumeKey.fresh(), folder / "elsewhere"
    elsewhere.write_bytes(b"somebody else's")
    (folder / "name").symlink_to(elsewhere)
    for make in (Pages.create, Pages.open):
        with pytest.raises(VaultError):
            make(folder, "name", key, durable=False)
    assert elsewhere.read_bytes() == b"somebody else's"
    assert (folder / "name").is_symlink()


def test_the_key_is_in_no_argument_of_a_statement_and_not_in_the_python_object(folder: Path) -> None:
    key = VolumeKey.fresh()
    with key.spelt() as spelt:
        text = bytes(spelt)
    assert bytes(spelt) == bytes(len(spelt))        # overwritten
    assert len(text) == 2 + 96 + 1
    assert repr(key) == "<volume key>"
    key.wipe()
    with key.spelt() as spelt:
        assert bytes(spelt[2:66]) == b"0" * 64


def test_several_threads_put_get_and_delete_without_losing_a_picture(vault: Vault) -> None:
    failures: list[BaseException] = []
    kept: list[ImageId] = []

    def work(number: int) -> None:
        try:
            for step in range(12):
                image = put(vault, bytes([number]) * 30_000)
                found = vault.get(ANNA, image)
                assert found is not None
                assert found.png == bytes([number]) * 30_000
                if step % 2:
                    assert vault.delete(ANNA, image)
                else:
                    kept.append(image)
        except BaseException as error:      # noqa: BLE001     # carried to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {image.id for image in vault.images(ANNA)} == set(kept)
    assert len(kept) == 36


def test_a_second_process_is_told_that_the_vault_is_open(folder: Path) -> None:
    key = VolumeKey.fresh()
    pages = Pages.create(folder, "vault-x", key, durable=True)
    child = os.fork()
    if child == 0:      # POSIX locks are between processes
        try:
            Pages.open(folder, "vault-x", key, durable=True)
        except VaultError as error:
            os._exit(0 if error.reason == "vault_busy" else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pages.close()


# ── Thumbnails ────────────────────────────────────────────────────────────────


def test_a_thumbnail_is_made_once_kept_and_dropped_with_its_picture(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    image = put(vault, png(600))
    made = vault.thumbnail(ANNA, image)
    assert made is not None
    assert max(Image.open(io.BytesIO(made)).size) == SIDE
    monkeypatch.setattr("appliance.vault.volume.thumbnail_of", lambda _: pytest.fail("made twice"))
    assert vault.thumbnail(ANNA, image) == made
    vault.delete(ANNA, image)
    assert vault.thumbnail(ANNA, image) is None


def test_what_is_no_png_has_no_thumbnail() -> None:
    good = png()
    bomb = good[:16] + (1 << 20).to_bytes(4, "big") * 2 + good[24:]
    for bad in (b"", b"GIF89a" + bytes(100), good[:200], bomb, good[:100] + bytes(200) + good[300:]):
        assert thumbnail_of(bad) is None


# ── Retention ─────────────────────────────────────────────────────────────────


def test_pictures_end_by_age_though_the_wall_clock_steps_back(folder: Path) -> None:
    clock = Clock()
    vault = Vault.ephemeral(folder, capacity=1 << 20, retention=Retention(age=3600), read_clock=clock)
    old = put(vault)
    clock.passes(1800)
    clock.wall -= 365 * 86400
    young = put(vault)
    clock.passes(1799)
    assert vault.expire() == 0
    clock.passes(2)
    assert vault.expire() == 1
    assert [kept.id for kept in vault.images(ANNA)] == [young]
    assert vault.get(ANNA, old) is None
    vault.close()


def test_the_age_goes_on_over_a_restart_and_a_boot(folder: Path) -> None:
    clock, key = Clock(), VolumeKey.fresh()
    from appliance.vault.volume import create, database_name
    create(folder, database_name(key.volume), key, durable=True).close()
    vault = Vault.open(folder, key.copy(), capacity=1 << 20, read_clock=clock)
    put(vault)
    vault.close()
    clock.wall, clock.boot = clock.wall - 86400, 400.0      # set back by a day while it was off; 400 seconds since the boot
    vault = Vault.open(folder, key, capacity=1 << 20, retention=Retention(age=400), read_clock=clock)
    assert vault.expire() == 1
    vault.close()


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e4)), max_size=30))
def test_age_never_steps_back_and_never_counts_less_than_the_time_since_boot(steps: list[tuple[float, float]]) -> None:
    clock = Clock()
    age = Age(clock, None)
    for wall, passed in steps:
        before = age.seconds
        clock.wall += wall
        clock.boot += passed
        age.advance()
        assert age.seconds >= before + passed - 1e-6


def test_the_oldest_go_when_there_are_too_many_or_too_much(folder: Path) -> None:
    vault = Vault.ephemeral(folder, capacity=1 << 20, retention=Retention(count=3))
    images = [put(vault) for _ in range(5)]
    assert [kept.id for kept in vault.images(ANNA)] == images[:1:-1]
    vault.close()
    vault = Vault.ephemeral(folder, capacity=1 << 20, retention=Retention(size=2 * (PAD + 21_000)))
    images = [put(vault) for _ in range(4)]
    assert [kept.id for kept in vault.images(ANNA)] == images[:1:-1]
    assert vault.held <= 2 * (PAD + 21_000)
    vault.close()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40_000)), max_size=25))
def test_what_is_held_is_what_is_listed_whatever_was_done(steps: list[tuple[int, int]]) -> None:
    from tests.vaults import vault as a_vault

    vault = a_vault(capacity=200_000)
    known: dict[ImageId, bytes] = {}
    for what, size in steps:
        if what == 3 and known:
            image, _ = known.popitem()
            assert vault.delete(ANNA, image)
        elif what == 2:
            vault.end(BERT)
        else:
            with contextlib.suppress(VaultError):       # full
                known[put(vault, bytes([what]) * size)] = bytes([what]) * size
    assert {image.id for image in vault.images(ANNA)} == set(known)
    for image, content in known.items():
        kept = vault.get(ANNA, image)
        assert kept is not None
        assert kept.png == content
    assert (vault.held == 0) == (not known)
    assert vault.damage() == ()
    vault.close()


# ── Storage that is full ──────────────────────────────────────────────────────


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB; mounting it takes the superuser."""
    place = tmp_path / "small"
    place.mkdir(0o700)
    import subprocess
    if os.geteuid() != 0 or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", place], check=False, capture_output=True
    ).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_on_a_full_disk_a_picture_is_refused_the_rest_is_there_and_deleting_makes_room(small: Path) -> None:
    vault = Vault.ephemeral(small, capacity=1 << 30)
    kept: list[ImageId] = []
    with pytest.raises(VaultError) as full:      # noqa: PT012     # some go in before
        while True:
            kept.append(put(vault, os.urandom(900_000)))
    assert full.value.reason == "storage_full"
    assert len(kept) > 4
    ballast = small / "ballast"     # the last byte of it, taken by somebody else
    with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:      # noqa: PT012
        while True:
            file.write(bytes(4096))
    assert [image.id for image in vault.images(ANNA)] == kept[::-1]
    for image in kept[:-1]:
        assert vault.delete(ANNA, image)
    assert vault.get(ANNA, kept[-1]) is not None
    ballast.unlink()
    again = put(vault, os.urandom(900_000))
    assert [image.id for image in vault.images(ANNA)] == [again, kept[-1]]
    assert vault.damage() == ()
    vault.close()
