"""The folder that outlives a wipe: whose it must be, what is refused, and what a crash leaves."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import VaultError
from appliance.vault import state as module
from appliance.vault.state import Counter, FailedUnlocks, State, default_folder


class Killed(BaseException):
    """The process was killed here."""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of writes are synced here, which a busy disk makes minutes of."""
    with tempfile.TemporaryDirectory(prefix="darkroom-test-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def state(folder: Path) -> Iterator[State]:
    with State.open(folder) as opened:
        yield opened


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(act: Callable[[], object]) -> VaultError:
    with pytest.raises(VaultError) as caught:
        act()
    return caught.value


def test_a_new_state_is_closed_to_everybody_else(folder: Path) -> None:
    before = os.umask(0)
    try:
        with State.open(folder) as state:
            state.device_key()
            state.advance(Counter.ERASES_BEGUN)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    assert modes == {"audit": 0o700, "certificates": 0o700, "device.pem": 0o600, "counters": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_device_key_is_made_once_and_is_read_by_openssl(state: State, folder: Path) -> None:
    first = state.device_key()
    assert isinstance(first.curve, ec.SECP256R1)
    assert state.device_key().private_numbers() == first.private_numbers()
    said = subprocess.run(["openssl", "pkey", "-in", folder / "device.pem", "-text", "-noout"], check=True, capture_output=True)
    assert b"prime256v1" in said.stdout
    assert (folder / "device.pem").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")      # PKCS#8


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_device_key_is_refused_and_not_replaced(state: State, folder: Path, content: bytes) -> None:
    state.root.write("device.pem", content)
    error = refusal(state.device_key)
    assert error.reason == "state_damaged"
    assert error.hint
    assert (folder / "device.pem").read_bytes() == content


def test_a_device_key_on_another_curve_is_refused(state: State) -> None:
    pem = subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"], check=True, capture_output=True
    ).stdout
    state.root.write("device.pem", pem)
    assert refusal(state.device_key).reason == "state_damaged"


@pytest.mark.parametrize("mode", [0o710, 0o701, 0o750, 0o777])
@pytest.mark.parametrize("which", ["", "audit", "certificates"])
def test_a_folder_that_others_can_enter_is_refused(folder: Path, which: str, mode: int) -> None:
    State.open(folder).close()
    (folder / which).chmod(mode)
    error = refusal(lambda: State.open(folder))
    assert f"{mode:03o}" in str(error)
    assert "chmod 700" in str(error.hint)


@pytest.mark.parametrize("which", ["", "audit", "certificates"])
def test_a_link_in_place_of_a_folder_is_refused_and_not_followed(folder: Path, tmp_path: Path, which: str) -> None:
    State.open(folder).close()
    elsewhere = tmp_path / "elsewhere"
    (folder / which).rename(elsewhere)
    (folder / which).symlink_to(elsewhere)
    before = everything(elsewhere)
    assert refusal(lambda: State.open(folder)).reason == "state_refused"
    assert everything(elsewhere) == before


def test_a_file_in_place_of_the_folder_is_refused(folder: Path) -> None:
    folder.write_bytes(b"")
    assert refusal(lambda: State.open(folder)).reason == "state_refused"


def test_a_folder_that_cannot_be_made_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    error = refusal(lambda: State.open(tmp_path / "file" / "state"))
    assert error.reason == "state_unusable"
    assert error.hint


def test_a_refused_folder_leaves_no_descriptor_open(folder: Path) -> None:
    State.open(folder).close()
    (folder / "certificates").chmod(0o755)
    before = len(list(Path("/proc/self/fd").iterdir()))
    refusal(lambda: State.open(folder))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_another_users_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    State.open(folder).close()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert "belongs to user" in str(refusal(lambda: State.open(folder)))


@pytest.mark.parametrize("name", ["counters", "unlocks", "device.pem"])
@pytest.mark.parametrize("trap", ["readable", "symlink", "hardlink", "fifo", "folder"])
def test_a_file_that_is_not_ours_alone_is_refused_and_left_as_it_is(state: State, folder: Path, tmp_path: Path, name: str, trap: str) -> None:
    state.device_key()
    state.advance(Counter.VAULT_GENERATION)
    state.count_failed_unlock("ab" * 16, 1)
    path, outside = folder / name, tmp_path / "outside"
    content = path.read_bytes()
    if trap == "readable":
        path.chmod(0o644)
    else:
        path.rename(outside)
        if trap == "symlink":
            path.symlink_to(outside)
        elif trap == "hardlink":
            os.link(outside, path)
        elif trap == "fifo":
            os.mkfifo(path, 0o600)      # reading it must not wait for a writer
        else:
            path.mkdir(0o700)
    read: dict[str, Callable[[], object]] = {
        "counters": lambda: state.counter(Counter.VAULT_GENERATION), "unlocks": state.failed_unlocks, "device.pem": state.device_key,
    }
    error = refusal(read[name])
    assert error.reason in {"state_refused", "state_unusable"}
    assert name in str(error)
    if trap != "readable":
        assert outside.read_bytes() == content


def test_writing_replaces_a_link_and_does_not_follow_it(state: State, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    (folder / "counters").symlink_to(outside)
    (folder / ".new-counters").symlink_to(outside)
    state.root.write("counters", b"ours")
    assert outside.read_bytes() == b"theirs"
    assert not (folder / "counters").is_symlink()
    assert (folder / "counters").read_bytes() == b"ours"


def test_counters_grow_and_are_there_after_a_new_start(folder: Path) -> None:
    with State.open(folder) as state:
        assert state.counter(Counter.VAULT_GENERATION) == 0
        assert state.advance(Counter.VAULT_GENERATION) == 1
        assert state.advance(Counter.VAULT_GENERATION, to=9) == 9
        assert state.advance(Counter.ERASES_BEGUN) == 1
    with State.open(folder) as state:
        assert [state.counter(counter) for counter in Counter] == [9, 1, 0]


@pytest.mark.parametrize("to", [8, 0, -1, 2**53])
def test_a_counter_never_steps_back_nor_over_its_end(state: State, folder: Path, to: int) -> None:
    state.advance(Counter.VAULT_GENERATION, to=9)
    before = everything(folder)
    assert refusal(lambda: state.advance(Counter.VAULT_GENERATION, to=to)).reason == "counter_back"
    assert everything(folder) == before


def test_two_processes_that_count_at_once_lose_no_count(folder: Path) -> None:
    State.open(folder).close()
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            with State.open(folder) as state:
                for _ in range(20):
                    state.count_failed_unlock("ab" * 16, 5)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    with State.open(folder) as state:
        assert state.failed_unlocks().count == 40


def test_failed_unlocks_are_counted_across_starts_and_forgiven(folder: Path) -> None:
    with State.open(folder) as state:
        assert state.failed_unlocks() == FailedUnlocks()
        state.count_failed_unlock("ab" * 16, 1000)
    with State.open(folder) as state:
        assert state.count_failed_unlock("cd" * 16, 12) == FailedUnlocks(2, "cd" * 16, 12)
        assert state.failed_unlocks() == FailedUnlocks(2, "cd" * 16, 12)
        state.forgive_failed_unlocks()
        state.forgive_failed_unlocks()
        assert state.failed_unlocks() == FailedUnlocks()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text(alphabet="count boot\n0123456789abcdef", max_size=120).map(str.encode))
def test_anything_else_than_a_count_is_refused_and_never_taken_for_none(state: State, content: bytes) -> None:
    state.root.write("unlocks", content)
    state.root.write("counters", content)
    assert refusal(state.failed_unlocks).reason == "state_damaged"
    assert refusal(lambda: state.count_failed_unlock("ab" * 16, 1)).reason == "state_damaged"
    assert refusal(lambda: state.advance(Counter.ERASES_DONE)).reason == "state_damaged"
    assert state.root.read("unlocks") == content


def test_a_count_cut_off_at_any_byte_is_refused(state: State) -> None:
    state.count_failed_unlock("ab" * 16, 123)
    whole = state.root.read("unlocks") or b""
    for length in range(len(whole)):
        state.root.write("unlocks", whole[:length])
        assert refusal(state.failed_unlocks).reason == "state_damaged"


CALLS = ("open", "write", "fsync", "rename", "unlink")


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, failure: BaseException) -> Callable[[], int]:
    """Let the `at`-th of the calls that change a file system raise; a write has then taken half. Return how many there were."""
    seen = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **named: object) -> object:
            nonlocal seen
            seen += 1
            if seen == at:
                if name == "write":
                    data = bytes(arguments[1])      # type: ignore[call-overload]
                    real(arguments[0], data[: len(data) // 2])
                raise failure
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, call)

    for name in CALLS:
        wrap(name)
    return lambda: seen


@pytest.mark.parametrize("failure", [Killed(), OSError(28, "no space"), OSError(5, "i/o")], ids=["killed", "full", "error"])
def test_a_write_that_is_cut_short_anywhere_leaves_the_old_or_the_new_file(folder: Path, failure: BaseException) -> None:
    points = 0
    while True:
        points += 1
        with State.open(folder) as state:
            state.root.write("counters", b"old" * 100)
            with pytest.MonkeyPatch.context() as patch:
                count = interrupted(patch, points, failure)
                with contextlib.suppress(Killed if isinstance(failure, Killed) else VaultError):
                    state.root.write("counters", b"new" * 100)
            if count() < points:
                break
            assert state.root.read("counters") in {b"old" * 100, b"new" * 100}
            if not isinstance(failure, Killed):
                assert not list(folder.glob(".new-*"))
            state.root.write("counters", b"next")       # what a crash left is in nobody's way
            assert state.root.read("counters") == b"next"
            assert state.root.names() == ["audit", "certificates", "counters"]
    assert points > 5


def test_a_full_disk_is_said_with_what_to_do(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 3, OSError(28, "no space"))
    error = refusal(lambda: state.root.write("counters", b"x"))
    assert error.reason == "state_full"
    assert "make room" in str(error.hint)


def test_destroying_overwrites_the_same_blocks_before_the_name_goes(state: State, folder: Path, tmp_path: Path) -> None:
    state.root.write("initial-key", b"k" * 32)
    witness = os.open(folder / "initial-key", os.O_RDONLY)      # the file's bytes outlive its name here
    try:
        state.root.destroy("initial-key")
        assert os.pread(witness, 100, 0) == bytes(32)
    finally:
        os.close(witness)
    assert not (folder / "initial-key").exists()
    state.root.destroy("initial-key")


def test_a_file_that_is_too_large_to_be_ours_is_refused(state: State, folder: Path) -> None:
    state.root.write("counters", b"")
    os.truncate(folder / "counters", module.LARGEST_FILE + 1)
    assert refusal(lambda: state.counter(Counter.ERASES_DONE)).reason == "state_damaged"


@pytest.mark.parametrize("name", ["../outside", ".hidden", "", "a/b", "A", "x" * 101])
def test_only_plain_names_reach_the_file_system(state: State, name: str) -> None:
    for act in (state.root.read, state.root.remove, state.root.create, state.root.below):
        with pytest.raises(ValueError, match="fixed by the program"):
            act(name)


def test_a_locked_folder_is_refused_to_the_next_process(folder: Path, state: State) -> None:
    state.audit.lock()
    with State.open(folder) as other:
        error = refusal(other.audit.lock)
        assert error.reason == "state_busy"
        assert error.hint


@pytest.mark.parametrize(("environment", "superuser", "expected"), [
    ({"STATE_DIRECTORY": "/var/lib/room:/var/lib/other"}, True, "/var/lib/room"),
    ({}, True, "/var/lib/darkroom"),
    ({"XDG_STATE_HOME": "/s", "HOME": "/h"}, False, "/s/darkroom"),
    ({"HOME": "/h"}, False, "/h/.local/state/darkroom"),
])
def test_the_default_folder_follows_systemd_then_the_superuser_then_xdg(
    environment: dict[str, str], superuser: bool, expected: str
) -> None:
    assert default_folder(environment, superuser=superuser) == Path(expected)
