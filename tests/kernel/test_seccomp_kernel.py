"""The compiled filter in the running kernel: loaded in a forked child, called with harmless arguments."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from child import in_child, load_filter, system_call

from stockade.kernel.seccomp import compile_filter
from stockade.kernel.syscalls import host_architecture, numbers

ARCHITECTURE = host_architecture()
HIGH = 1 << 32
BAD = 1  # an address that nothing is mapped at

# Call, arguments that the kernel refuses by itself, errno that the filter gives. None of them changes
# anything where there is no filter: that is run too, and must give another answer.
REFUSED = [
    ("mount", (0, 0, 0, 0, 0), "EPERM"),
    ("umount2", (BAD, 0), "EPERM"),
    ("pivot_root", (BAD, BAD), "EPERM"),
    ("fsopen", (BAD, 0), "ENOSYS"),
    ("open_tree", (-1, BAD, 0), "ENOSYS"),
    ("move_mount", (-1, BAD, -1, BAD, 0), "ENOSYS"),
    ("fsconfig", (-1, 0, 0, 0, 0), "ENOSYS"),
    ("fsmount", (-1, 0, 0), "ENOSYS"),
    ("fspick", (-1, BAD, 0), "ENOSYS"),
    ("mount_setattr", (-1, BAD, 0, 0, 0), "ENOSYS"),
    ("setns", (-1, 0), "EPERM"),
    ("unshare", (1,), "EPERM"),
    ("clone", (0x10000200, 0, 0, 0, 0), "EPERM"),  # CLONE_NEWUSER | CLONE_FS: EINVAL
    *(("clone", (flag | 0x800, 0, 0, 0, 0), "EPERM") for flag in (  # with CLONE_SIGHAND alone: EINVAL
        0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000,
    )),
    ("clone3", (0, 0), "ENOSYS"),
    ("ptrace", (0x4206, -1, 0, 0), "EPERM"),  # PTRACE_SEIZE
    ("process_vm_readv", (-1, 0, 0, 0, 0, 0), "EPERM"),
    ("pidfd_getfd", (-1, -1, 0), "EPERM"),
    ("kcmp", (-1, -1, 0, 0, 0), "EPERM"),
    ("keyctl", (-1, 0, 0, 0, 0), "EPERM"),
    ("add_key", (BAD, 0, 0, 0, 0), "EPERM"),
    ("request_key", (BAD, 0, 0, 0), "EPERM"),
    ("bpf", (-1, 0, 0), "EPERM"),
    ("perf_event_open", (BAD, 0, 0, 0, 0), "EPERM"),
    ("io_uring_setup", (0, BAD), "EPERM"),
    ("userfaultfd", (-1,), "EPERM"),
    ("init_module", (BAD, 0, 0), "EPERM"),
    ("finit_module", (-1, BAD, 0), "EPERM"),
    ("kexec_load", (0, 1 << 40, 0, 0), "EPERM"),
    ("open_by_handle_at", (-1, BAD, 0), "EPERM"),
    ("acct", (BAD,), "EPERM"),
    ("reboot", (0, 0, 0, 0), "EPERM"),
    ("syslog", (-1, 0, 0), "EPERM"),
    ("swapon", (BAD, -1), "EPERM"),
    ("settimeofday", (BAD, 0), "EPERM"),
    ("sethostname", (BAD, 5), "EPERM"),
    ("chroot", (BAD,), "EPERM"),
    ("personality", (0x0008,), "EPERM"),
    ("personality", (0x0040000,), "EPERM"),
    ("mknodat", (-1, BAD, 0o020666, 0x0101), "EPERM"),
    ("mknodat", (-1, BAD, 0o060666, 0x0101), "EPERM"),
    ("ioctl", (-1, 0x5412), "EPERM"),
    ("ioctl", (-1, HIGH | 0x5412), "EPERM"),
    ("ioctl", (-1, 0x541C), "EPERM"),
    ("ioctl", (-1, HIGH | 0x541C), "EPERM"),
    ("ioctl", (-1, 0x5423), "EPERM"),
    ("socket", (17, -1, 0), "EAFNOSUPPORT"),  # AF_PACKET, with a type that no family has
    ("socket", (38, -1, 0), "EAFNOSUPPORT"),
    ("socket", (40, -1, 0), "EAFNOSUPPORT"),
    ("socket", (HIGH | 17, -1, 0), "EAFNOSUPPORT"),
    ("socket", (16, -1, 9), "EPROTONOSUPPORT"),
]  # fmt: skip
if ARCHITECTURE == "x86_64":
    REFUSED += [
        ("iopl", (5,), "EPERM"), ("ioperm", (1 << 20, 1, 1), "EPERM"), ("mknod", (BAD, 0o020666, 0x0101), "EPERM"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    """errno of every call of REFUSED in a child with the default filter, and in one without."""
    table = numbers(ARCHITECTURE)
    program = compile_filter("default", architecture=ARCHITECTURE)

    def ask(*, filtered: bool) -> list[str]:
        if filtered:
            load_filter(program)
        return [system_call(table[name], *arguments) for name, arguments, _ in REFUSED]

    return {
        "filtered": in_child(lambda: ask(filtered=True)),
        "unfiltered": in_child(lambda: ask(filtered=False)),
    }


@pytest.mark.parametrize("place", range(len(REFUSED)), ids=lambda place: f"{REFUSED[place][0]}-{place}")
def test_call_is_refused_by_the_filter_and_not_without_it(answers: dict[str, list[str]], place: int) -> None:
    _, _, expected = REFUSED[place]
    assert answers["filtered"][place] == expected
    if os.geteuid() != 0 and answers["unfiltered"][place] == "EPERM":
        pytest.skip("the kernel refuses this call to an ordinary user anyway: run as root")
    assert answers["unfiltered"][place] != expected, "the kernel alone gives the same answer: the row proves nothing"


ALLOWED = [
    ("getpid", ()), ("personality", (0xFFFFFFFF,)), ("personality", (0,)), ("uname", (BAD,)), ("ioctl", (-1, 0x5413)),
    ("mknodat", (-1, BAD, 0o010600, 0)), ("mknodat", (-1, BAD, 0o100600, 0)), ("chroot", (BAD,)),
    ("socket", (16, 3, 0)), ("socket", (1, 1, 0)), ("socket", (2, 1, 0)), ("socket", (10, 2, 0)),
    ("clone", (0x800, 0, 0, 0, 0)), ("setresuid", (-1, -1, -1)), ("landlock_create_ruleset", (0, 0, 1)),
    ("pidfd_open", (-1, 0)), ("close_range", (9, 1, 0)), ("openat2", (-1, BAD, BAD, 0)),
    ("statx", (-1, BAD, 0, 0, BAD)), ("seccomp", (99, 0, 0)), ("mbind", (BAD, 0, 99, 0, 0)),
]  # fmt: skip


def test_what_the_policy_allows_answers_as_without_a_filter() -> None:
    table = numbers(ARCHITECTURE)
    program = compile_filter("default", ["mbind"], architecture=ARCHITECTURE, chroot=True)

    def ask(*, filtered: bool) -> list[str]:
        if filtered:
            load_filter(program)
        return [system_call(table[name], *arguments) for name, arguments in ALLOWED]

    unfiltered = in_child(lambda: ask(filtered=False))
    assert in_child(lambda: ask(filtered=True)) == unfiltered
    assert "EPERM" not in unfiltered
    assert "ENOSYS" not in unfiltered


def _machine_code(code: bytes) -> Callable[[], int]:
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    function.keep = memory  # type: ignore[attr-defined]
    return function


# mov eax, 20 (getpid of i386); int 0x80; ret
_I386_GETPID = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"


@pytest.mark.skipif(ARCHITECTURE != "x86_64", reason="only x86_64 has the calls of i386")
def test_an_i386_call_kills_the_process() -> None:
    program = compile_filter("shell", architecture=ARCHITECTURE)

    def call(*, filtered: bool) -> bool:
        getpid = _machine_code(_I386_GETPID)
        if filtered:
            load_filter(program)
        return getpid() == os.getpid()

    unfiltered = in_child(lambda: call(filtered=False))
    if unfiltered is not True:
        pytest.skip("this kernel has no i386 calls (CONFIG_IA32_EMULATION)")
    assert in_child(lambda: call(filtered=True)) == ("signal", signal.SIGSYS)


@pytest.mark.skipif(ARCHITECTURE != "x86_64", reason="only x86_64 has x32")
def test_an_x32_call_is_absent() -> None:
    program = compile_filter("shell", architecture=ARCHITECTURE)

    def call() -> str:
        load_filter(program)
        return system_call(0x40000000 + numbers("x86_64")["getpid"])

    assert in_child(call) == "ENOSYS"


@pytest.mark.parametrize("preset", ["strict", "default", "shell"])
def test_programs_threads_files_and_sockets_work_behind_the_filter(preset: str, tmp_path: Path) -> None:
    program = compile_filter(preset, architecture=ARCHITECTURE)

    def work() -> list[object]:
        load_filter(program)
        results: list[object] = []
        thread = threading.Thread(target=lambda: results.append("thread"))
        thread.start()
        thread.join()
        note = tmp_path / "note"
        note.write_text("kept")
        results.append(note.rename(tmp_path / "renamed").read_text())
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.connect(server.getsockname())
            results.append(server.accept()[1][0])
        answer = subprocess.run(["/bin/sh", "-c", "echo a | tr a b; exit 3"], capture_output=True, timeout=10)
        return [*results, answer.stdout.decode(), answer.returncode]

    assert in_child(work) == ["thread", "kept", "127.0.0.1", "b\n", 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="changing ids needs root")
def test_strict_refuses_other_ids_and_default_allows_them() -> None:
    def become(preset: str) -> list[str]:
        load_filter(compile_filter(preset, architecture=ARCHITECTURE))
        table = numbers(ARCHITECTURE)
        return [system_call(table["setresgid"], 65534, 65534, 65534), system_call(table["setresuid"], -1, -1, 65534)]

    assert in_child(lambda: become("default")) == ["0", "0"]
    assert in_child(lambda: become("strict")) == ["EPERM", "EPERM"]


def test_trace_mode_stops_what_has_no_tracer_with_enosys_and_log_mode_lets_it_pass() -> None:
    table = numbers(ARCHITECTURE)

    def ask(mode: str) -> str:
        load_filter(compile_filter("default", architecture=ARCHITECTURE, mode=mode))  # type: ignore[arg-type]
        return system_call(table["personality"], 0x0008)

    assert in_child(lambda: ask("enforce")) == "EPERM"
    # seccomp(2), SECCOMP_RET_TRACE: without a tracer the call is not made and gives ENOSYS.
    assert in_child(lambda: ask("trace")) == "ENOSYS"
    assert in_child(lambda: ask("log")) == "0"


def test_filters_of_the_presets_can_be_stacked() -> None:
    """A program behind the walls may narrow itself: its own filter comes on top."""
    table = numbers(ARCHITECTURE)

    def stack() -> list[str]:
        load_filter(compile_filter("default", architecture=ARCHITECTURE))
        load_filter(compile_filter("strict", remove=["kill"], architecture=ARCHITECTURE))
        return [system_call(table["kill"], os.getpid(), 0), system_call(table["getpid"])]

    assert in_child(stack) == ["EPERM", "0"]
