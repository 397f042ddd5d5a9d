"""The lists of calls, as data and as programs in the kernel."""

from __future__ import annotations

import errno
import platform
import signal
import subprocess
import sys
from pathlib import Path

import py_landlock
import pyseccomp
import pytest

from appliance.seal import calls, probes, walls
from appliance.seal.calls import GROUPS, ROLES, names
from appliance.seal.walls import program

ROOT = Path(__file__).parent.parent
NEVER = {      # by worker and engine, whatever the future brings
    "socket", "connect", "bind", "listen", "sendmsg", "sendmmsg", "execve", "execveat", "fork", "vfork", "ptrace",
    "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "io_uring_setup",
    "io_uring_enter", "io_uring_register", "setns", "unshare", "mount", "umount2", "bpf", "keyctl", "add_key", "request_key",
    "userfaultfd", "open_by_handle_at", "name_to_handle_at", "perf_event_open", "kill", "tkill", "tgkill", "rt_sigqueueinfo",
    "memfd_create", "seccomp", "landlock_restrict_self", "clone3", "chroot", "pivot_root", "init_module", "finit_module",
    "kexec_load", "reboot", "swapon", "acct", "personality", "vmsplice", "utimensat", "fchmod", "fchown", "unlink", "unlinkat", "rename", "renameat2", "mkdir", "rmdir", "sched_setaffinity", "splice", "tee", "shmget", "msgget", "semget",
    "mq_open", "symlink", "symlinkat", "link", "linkat", "mknod", "mknodat",
}


@pytest.mark.parametrize("role", ["worker", "engine"])
def test_a_process_with_content_may_make_none_of_the_calls_that_lead_out(role: calls.Role) -> None:
    assert set(names(role)) & NEVER == set()


def test_the_lists_nest_so_that_each_process_can_only_be_tighter_than_its_parent() -> None:
    assert set(names("worker")) <= set(names("arbiter")) <= set(names("supervisor"))
    assert set(names("engine")) <= set(names("supervisor"))


def test_every_call_is_one_that_the_kernel_knows_and_has_a_reason() -> None:
    for group in GROUPS:
        assert len(group.reason) > 10, group.title
        for one in group.allowed:
            assert pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, one.call) >= 0, one.call


def test_the_probes_numbers_are_those_of_the_calls() -> None:
    for attempts in (probes._SERVED, probes._FORBIDDEN, probes._LOOSENING):
        for attempt in attempts:
            name = attempt.name.split()[0]
            assert pyseccomp.resolve_syscall(pyseccomp.Arch.X86_64, name) == attempt.x86_64, name
            assert pyseccomp.resolve_syscall(pyseccomp.Arch.AARCH64, name) == attempt.aarch64, name


def test_the_document_is_the_list() -> None:
    """docs/seccomp.md is written from `seal.calls`; run this file to write it anew."""
    assert (ROOT / "docs" / "seccomp.md").read_text(encoding="utf-8") == document()


def test_every_attempt_of_the_probes_gets_through_where_there_is_no_filter() -> None:
    """A probe that looks refused without a filter could not tell that the filter is there."""
    code = """
from appliance.seal import probes
libc = ctypes.CDLL(None, use_errno=True)
confine.drop_capabilities()
for group in (probes._SERVED, probes._FORBIDDEN, probes._LOOSENING):
    for attempt in group:
        if probes._refused(libc, attempt):
            print(attempt.name)
"""
    refused = set(closed_off("engine", code).stdout.splitlines())
    # What an ordinary process is refused by the kernel itself, or by how this machine is set up.
    assert refused <= {"mount", "umount2", "bpf", "perf_event_open", "userfaultfd", "open_by_handle_at", "io_uring_setup", "chroot",
                       "init_module", "mknodat", "keyctl"}, refused


def test_a_virtual_environment_that_links_lib64_to_lib_does_not_show_the_model(tmp_path: Path) -> None:
    bundle = tmp_path / "venv" / "lib" / "site-packages" / "appliance" / "bundles" / "demo"
    bundle.mkdir(parents=True)
    (tmp_path / "venv" / "lib64").symlink_to("lib")
    (tmp_path / "venv" / "round").symlink_to(".")
    (tmp_path / "venv" / "lib" / "other.py").touch()
    rules = list(walls._beneath(tmp_path / "venv", walls._READ, (bundle,)))
    readable = [path for path, access in rules if access & py_landlock.AccessFs.READ_FILE]
    assert not any(path == bundle or path in bundle.parents for path in readable)
    assert tmp_path / "venv" / "lib" / "other.py" in readable


def closed_off(role: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process that has put the role's program on itself."""
    return subprocess.run(
        [sys.executable, "-c", f"""
import ctypes, os, sys, socket
from appliance.seal import confine
from appliance.seal.walls import program
fd = os.memfd_create("x"); os.write(fd, program({role!r}))
confine.forbid_new_privileges()
{code}
"""],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )


@pytest.mark.parametrize("role", ROLES)
def test_every_program_can_be_loaded(role: calls.Role) -> None:
    assert len(program(role)) % 8 == 0
    assert closed_off(role, "confine.restrict_calls(fd); print('alive')").stdout == "alive\n"


def test_a_thread_that_was_there_before_is_filtered_too() -> None:
    ended = closed_off("engine", """
import threading
go, said = threading.Event(), []
def other():
    go.wait()
    try:
        socket.socket()
        said.append("opened")
    except OSError as error:
        said.append(error.errno)
thread = threading.Thread(target=other); thread.start()
confine.restrict_calls(fd)
go.set(); thread.join()
print(said)
""")
    assert ended.stdout == f"[{errno.EPERM}]\n", ended.stderr


def test_a_thread_that_is_started_later_is_filtered_too() -> None:
    ended = closed_off("engine", """
import threading
confine.restrict_calls(fd)
def other():
    try:
        socket.socket()
    except OSError as error:
        print(error.errno)
thread = threading.Thread(target=other); thread.start(); thread.join()
""")
    assert ended.stdout == f"{errno.EPERM}\n", ended.stderr


def test_a_process_cannot_be_forked_where_a_thread_can_be_started() -> None:
    ended = closed_off("engine", """
confine.restrict_calls(fd)
try:
    os.fork()
    print("forked")
except OSError as error:
    print(error.errno)
""")
    assert ended.stdout == f"{errno.EPERM}\n", ended.stderr


# mov eax, 359 (socket, of the i386 table); mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; ret
I386_SOCKET = bytes.fromhex("b867010000 bb02000000 b901000000 31d2 cd80 c3")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other ABI is x86_64's")
def test_the_calls_of_the_32_bit_abi_end_the_process() -> None:
    code = f"""
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write({I386_SOCKET!r})
make = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
%s
print(make(), flush=True)
"""
    without = closed_off("engine", code % "")
    if without.returncode != 0 or int(without.stdout or -1) < 0:
        pytest.skip("this kernel has no 32-bit ABI")
    assert closed_off("engine", code % "confine.restrict_calls(fd)").returncode in (-signal.SIGSYS, -signal.SIGKILL)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other ABI is x86_64's")
def test_the_calls_of_the_x32_abi_are_refused() -> None:
    code = """
confine.restrict_calls(fd)
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(ctypes.c_long(0x40000000 + 41), 2, 1, 0), flush=True)
"""
    ended = closed_off("engine", code)
    assert ended.returncode in (-signal.SIGSYS, -signal.SIGKILL) or ended.stdout == "-1\n"


def document() -> str:
    """Return docs/seccomp.md."""
    lines = [
        "# Which kernel calls each process may make", "",
        "Written from `appliance/seal/calls.py` by `python tests/test_seal_calls.py`. What is on no list is refused with EPERM;",
        "`clone3` with ENOSYS, so that the C library uses `clone`, whose flags can be looked at. Calls of another ABI end the process.",
        "Every process inherits its parent's filter and adds its own: supervisor → arbiter → worker, supervisor → engine.", "",
        "| process | calls |", "|---|---|",
        *(f"| {role} | {len(names(role))} |" for role in ROLES), "",
    ]
    for group in GROUPS:
        lines += [f"## {group.title[0].upper()}{group.title[1:]}", "", f"*{', '.join(group.roles)}.* {group.reason[0].upper()}{group.reason[1:]}.", ""]
        plain = [one.call for one in group.allowed if not one.conditions]
        if plain:
            lines += [" ".join(f"`{call}`" for call in plain), ""]
        for one in group.allowed:
            if one.conditions:
                said = " and ".join(
                    f"argument {is_.argument + 1}" + (f" & {is_.mask:#x}" if is_.mask not in (2**64 - 1, 2**32 - 1) else "") + f" = {is_.value:#x}"
                    for is_ in one.conditions
                )
                lines.append(f"- `{one.call}` where {said}")
        if any(one.conditions for one in group.allowed):
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "seccomp.md").write_text(document(), encoding="utf-8")
