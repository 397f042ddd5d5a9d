"""What is concluded from what was observed."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.seal.calls import Role
from appliance.seal.confine import Standing
from appliance.seal.posture import Machine, Posture, Threads, look_at_machine, look_at_threads
from appliance.seal.probes import Errand, Probe, pack, unpack

ROLES: tuple[Role, ...] = ("supervisor", "worker", "engine")
CLEAN = dict.fromkeys(Probe, 0) | {Probe.PARENT: 9}
GOOD = Posture(
    found={role: dict(CLEAN) for role in ROLES},
    threads={role: Threads(3, 3, 3, 3) for role in (*ROLES, "arbiter")},
    machine=Machine(),
    digest="ab" * 32,
    key="cd" * 32,
)


def broken(posture: Posture) -> set[str]:
    return {promise.id for promise in posture.promises() if not promise.holds}


def test_everything_holds_where_nothing_was_found_open() -> None:
    assert broken(GOOD) == set()
    assert GOOD.sealed


def test_nothing_that_was_not_observed_is_taken_to_hold() -> None:
    unknown = Posture.unknown()
    assert not unknown.sealed
    held = {promise.id for promise in unknown.promises() if promise.holds}
    assert held == set()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("probe", "promise", "essential"),
    [
        (Probe.FAMILIES, "1.sockets", True), (Probe.SERVED, "1.served", True), (Probe.CALLS, "1.calls", True),
        (Probe.LOOSENING, "1.loosening", True), (Probe.WRITES, "3.files", False), (Probe.DUMPABLE, "3.cores", False),
        (Probe.CORE, "3.cores", False),
    ],
)
def test_one_finding_in_one_process_breaks_the_promise_and_names_the_process(
    role: Role, probe: Probe, promise: str, essential: bool
) -> None:
    worse = replace(GOOD, found={**GOOD.found, role: {**CLEAN, probe: 1}})
    assert broken(worse) == {promise}
    assert worse.sealed is not essential
    [said] = [one.observed for one in worse.promises() if one.id == promise]
    assert role in said


@pytest.mark.parametrize("role", ROLES)
def test_a_process_that_does_not_answer_breaks_what_it_should_have_answered(role: Role) -> None:
    silent = replace(GOOD, found={other: found for other, found in GOOD.found.items() if other != role})
    assert not silent.sealed
    assert any(f"{role}: did not answer" in one.observed for one in silent.promises())


@pytest.mark.parametrize("role", ["supervisor", "arbiter", "worker", "engine"])
@pytest.mark.parametrize("seen", [Threads(3, 2, 3, 3), Threads(3, 3, 2, 3), Threads(0, 0, 0, 0)])
def test_one_thread_without_the_filter_breaks_the_seal(role: Role, seen: Threads) -> None:
    worse = replace(GOOD, threads={**GOOD.threads, role: seen})
    assert "1.filter" in broken(worse)
    assert ("1.privileges" in broken(worse)) is (seen.count == 0)
    assert not worse.sealed


def test_a_thread_with_a_capability_is_named() -> None:
    worse = replace(GOOD, threads={**GOOD.threads, "engine": Threads(3, 3, 3, 2)})
    assert broken(worse) == {"1.privileges"}
    assert worse.sealed


def test_a_datagram_that_arrived_counts_whatever_the_probes_say() -> None:
    assert broken(replace(GOOD, planted_heard=1)) == {"1.unix"}
    assert not replace(GOOD, planted_heard=1).sealed


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "limited to none"), (errno.EPERM, "forbidden"), (errno.EINVAL, "invalid argument")]
)
def test_a_host_without_namespaces_is_named_with_its_reason_and_stays_sealed(number: int, reason: str) -> None:
    worse = replace(GOOD, standing=Standing(network_namespace=number))
    [said] = [one.observed for one in worse.promises() if one.id == "1.network"]
    assert reason in said
    assert worse.sealed


def test_a_host_without_landlock_is_named_with_its_reason_and_stays_sealed() -> None:
    without = {role: {**CLEAN, Probe.LANDLOCK: errno.EOPNOTSUPP} for role in ROLES}
    worse = replace(GOOD, found=without)
    assert broken(worse) == {"3.files"}
    assert worse.sealed


def test_swap_in_the_clear_matters_unless_memory_is_locked() -> None:
    unlocked: dict[Role, dict[Probe, int]] = {role: {**CLEAN, Probe.MEMORY_LOCK: errno.ENOMEM} for role in ROLES}
    swapping = replace(GOOD, found=unlocked, machine=Machine(swap=("/dev/sda2",)))
    assert broken(swapping) == {"3.swap"}
    assert broken(replace(swapping, found=GOOD.found)) == set()
    assert broken(replace(swapping, machine=Machine())) == set()
    assert broken(replace(swapping, machine=Machine(swap_known=False))) == {"3.swap"}


SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


def machine(files: dict[str, str]) -> Machine:
    def read(path: str) -> str:
        try:
            return files[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    return look_at_machine(read)


NET = "Inter-|   Receive\n face |bytes\n    lo: 0\n"


def test_encrypted_swap_and_swap_in_memory_are_not_swap_in_the_clear() -> None:
    seen = machine({
        "/proc/self/net/dev": NET, "/proc/self/net/fib_trie": "",
        "/proc/swaps": SWAPS + "".join(f"{area} partition 1 0 -2\n" for area in (
            "/dev/dm-1", "/dev/dm-2", "/dev/zram0", "/dev/zram1", "/swapfile", "/zram0",
        )),
        "/sys/block/dm-1/dm/uuid": "CRYPT-PLAIN-swap", "/sys/block/dm-2/dm/uuid": "LVM-abc",
        "/sys/block/zram0/backing_dev": "none\n", "/sys/block/zram1/backing_dev": "/dev/sda3\n",
    })
    assert seen.swap == ("/dev/dm-2", "/dev/zram1", "/swapfile", "/zram0")
    assert seen.interfaces == ()


def test_a_loopback_that_is_up_and_any_other_interface_are_seen() -> None:
    seen = machine({
        "/proc/self/net/dev": NET + "  eth0: 0\n", "/proc/self/net/fib_trie": "  |-- 127.0.0.1\n", "/proc/swaps": SWAPS,
    })
    assert seen.interfaces == ("eth0", "lo")


def test_what_cannot_be_read_is_not_taken_for_good() -> None:
    seen = machine({})
    assert seen.interfaces == ("unknown",)
    assert not seen.swap_known


def test_threads_are_counted_from_proc(tmp_path: Path) -> None:
    good = "CapInh:\t0\nCapPrm:\t0\nCapEff:\t0\nCapAmb:\t0\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t2\n"
    for task, status in {
        "10": good, "11": good.replace("filters:\t2", "filters:\t1"), "12": good.replace("Eff:\t0", "Eff:\t1"),
        "13": good.replace("Privs:\t1", "Privs:\t0"), "14": "nothing that is known\n",
    }.items():
        folder = tmp_path / "10" / "task" / task
        folder.mkdir(parents=True)
        (folder / "status").write_text(status, encoding="ascii")
    assert look_at_threads(10, "engine", proc=tmp_path) == Threads(5, 3, 3, 3)
    # Filters that a container or a unit had put on everybody are none of ours.
    assert look_at_threads(10, "engine", 1, proc=tmp_path).filtered == 0
    assert look_at_threads(99, "engine", proc=tmp_path) == Threads(0, 0, 0, 0)


@given(st.dictionaries(st.sampled_from(list(Probe)), st.integers(-(2**31), 2**31 - 1)))
def test_a_report_is_read_as_it_was_written(found: dict[Probe, int]) -> None:
    assert unpack(pack(found)) == found


@given(st.binary(max_size=400))
def test_no_report_breaks_its_reader(untrusted: bytes) -> None:
    assert set(unpack(untrusted)) <= set(Probe)


@given(
    st.lists(st.text(max_size=20), max_size=4), st.lists(st.integers(1, 2**22), max_size=4), st.text(max_size=30)
)
def test_an_errand_is_read_as_it_was_written(places: list[str], peers: list[int], planted: str) -> None:
    errand = Errand(tuple(places), tuple(places), tuple(peers), planted)
    assert Errand.unpack(errand.pack()) == errand
