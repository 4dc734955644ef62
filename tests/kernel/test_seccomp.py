"""The compiled filter: verdicts against libseccomp's over all numbers, its form, and its explanation."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import bpf_machine
import libseccomp
import pytest
from libseccomp import ALLOW, KILL_PROCESS, OracleRule, errno_action

from stockade.errors import HostError, SpecError
from stockade.kernel import presets
from stockade.kernel.bpf import Assembler
from stockade.kernel.seccomp import Mode, compile_filter, explain, explain_all
from stockade.kernel.syscalls import ARCHITECTURES, AUDIT_ARCH, numbers
from stockade.records.policy import Verdict

EPERM, ENOSYS = errno_action(errno.EPERM), errno_action(errno.ENOSYS)
HIGH = 1 << 32  # a bit that the kernel drops from every argument that rules look at

# Values of the arguments that rules look at: each kind of right and wrong one, with and without high bits.
NAMESPACE_FLAGS = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
ARGUMENTS: dict[str, list[tuple[int, ...]]] = {
    "clone": [(0x3D0F00,), (0x11,), (HIGH | 0x11,), *((flag | 0x11,) for flag in NAMESPACE_FLAGS), (0x7E020000,)],
    "socket": [
        *((family, 2, protocol) for family in (*range(47), HIGH | 1, HIGH | 38, 0xFFFFFFFF) for protocol in (0, 6)),
        *((16, kind, HIGH * high | protocol) for kind in (2, 3) for high in (0, 1) for protocol in range(24)),
    ],
    "socketpair": [(family, 1, 0) for family in (*range(47), HIGH | 1, HIGH | 38)],
    "ioctl": [
        (0, HIGH * high | request)
        for high in (0, 1, 0xFFFFFFFF)
        for request in (0x5401, 0x5411, 0x5412, 0x5413, 0x541B, 0x541C, 0x541D, 0x5422, 0x5423, 0x5424, 0x80005412)
    ],
    "personality": [(0,), (8,), (0x20000,), (0x40000,), (0xFFFFFFFF,), (HIGH,), (HIGH | 8,), (HIGH - 2,)],
    "mknod": [(0, HIGH * high | kind << 12 | 0o644, 0) for high in (0, 1) for kind in range(16)],
    "mknodat": [(0, 0, HIGH * high | kind << 12 | 0o644, 0) for high in (0, 1) for kind in range(16)],
}
Policy = tuple[str, tuple[str, ...], tuple[str, ...], dict[str, bool]]
POLICIES: list[Policy] = [
    ("strict", (), (), {}),
    ("default", (), (), {}),
    ("default", (), (), {"chroot": True}),
    ("default", (), (), {"allow_ptrace": True}),
    ("default", ("settimeofday", "@numa", "socket:packet", "netlink:sock_diag"), ("@ipc", "kill", "socket:inet6"), {}),
    ("shell", (), ("clone", "ioctl"), {"chroot": True}),
]


def _compile(policy: Policy, architecture: str) -> bytes:
    preset, add, remove, flags = policy
    chroot, allow_ptrace = flags.get("chroot", False), flags.get("allow_ptrace", False)
    return compile_filter(preset, add, remove, architecture=architecture, chroot=chroot, allow_ptrace=allow_ptrace)


def policy_name(policy: object) -> str:
    return repr(policy) if isinstance(policy, tuple) else ""


def calls(architecture: str) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every number up to 600 with arguments that matter to it."""
    names = {number: name for name, number in numbers(architecture).items()}
    for number in range(600):
        for arguments in ARGUMENTS.get(names.get(number, ""), [()]):
            yield number, arguments


def conditions(selection: presets.Selection) -> dict[str, list[tuple[tuple[int, int, int], ...]]]:
    """By hand, not from the rules: when each conditional call is allowed, as alternatives of comparisons."""
    low = 0xFFFFFFFF
    plain = selection.families - {16}
    file_types = (0, 0o100000, 0o010000, 0o140000)
    alternatives: dict[str, list[tuple[tuple[int, int, int], ...]]] = {
        "clone": [((0, 0x7E020000, 0),)],
        "personality": [((0, low, 0),), ((0, low, low),)],
        "mknod": [((1, 0o170000, kind),) for kind in file_types],
        "mknodat": [((2, 0o170000, kind),) for kind in file_types],
        "socket": [((0, low, family),) for family in plain],
        "socketpair": [((0, low, family),) for family in selection.families],
    }
    if 16 in selection.families:
        alternatives["socket"] += [((0, low, 16), (2, low, protocol)) for protocol in selection.netlink]
    return alternatives


@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_verdicts_are_those_of_libseccomp(policy: Policy, oracle: ctypes.CDLL) -> None:
    architecture = os.uname().machine
    table = numbers(architecture)
    preset, add, remove, flags = policy
    selection = presets.select(preset, add, remove, **flags)
    conditional = conditions(selection)
    ours = bpf_machine.decode(_compile(policy, architecture))

    # What is allowed at all: everything else kills.
    allowed = [
        OracleRule(ALLOW, table[name], matches)
        for name in sorted(selection.calls & set(table) - {"ioctl"})
        for matches in conditional.get(name, [()])
    ]
    allowing = bpf_machine.decode(libseccomp.program(oracle, KILL_PROCESS, allowed))
    # How the rest is refused: one filter for calls without conditions, ioctl among them, as it is told what to refuse.
    refused_with = {
        name: EPERM if presets.group_of()[name].errno == "EPERM" else ENOSYS for name in set(table) - selection.calls
    }
    plain = [OracleRule(action, table[name]) for name, action in sorted(refused_with.items()) if action != ENOSYS]
    plain += [OracleRule(ALLOW, table[name]) for name in sorted(selection.calls & set(table)) if name != "ioctl"]
    if "ioctl" in selection.calls:
        requests = [request for _, request in ARGUMENTS["ioctl"] if request & 0xFFFFFFFF in (0x5412, 0x541C, 0x5423)]
        plain += [
            OracleRule(EPERM, table["ioctl"], ((1, 0xFFFFFFFF, request),))
            for request in sorted({request & 0xFFFFFFFF for request in requests})
        ]
    refusing = bpf_machine.decode(libseccomp.program(oracle, ENOSYS, plain))
    names = {number: name for name, number in table.items()}

    for number, arguments in calls(architecture):
        name = names.get(number, "")
        verdict = bpf_machine.run(ours, number, AUDIT_ARCH[architecture], arguments)
        if name == "ioctl" and "ioctl" in selection.calls:
            # libseccomp's default answers the requests that no rule names.
            theirs = bpf_machine.run(refusing, number, AUDIT_ARCH[architecture], arguments)
            assert verdict == (EPERM if theirs == EPERM else ALLOW), (name, arguments)
            continue
        is_allowed = bpf_machine.run(allowing, number, AUDIT_ARCH[architecture], arguments) == ALLOW
        assert (verdict == ALLOW) == is_allowed, (name, number, arguments)
        if not is_allowed and name not in selection.calls:
            assert verdict == bpf_machine.run(refusing, number, AUDIT_ARCH[architecture], arguments), (name, number)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("clone", (0x10000011,), "EPERM"),
        ("socket", (38, 5, 0), "EAFNOSUPPORT"),
        ("socketpair", (40, 1, 0), "EAFNOSUPPORT"),
        ("socket", (16, 3, 9), "EPROTONOSUPPORT"),
        ("personality", (8,), "EPERM"),
        ("mknodat", (0, 0, 0o020666, 0x0101), "EPERM"),
        ("ioctl", (0, 0x5412), "EPERM"),
        ("ioctl", (0, HIGH | 0x541C), "EPERM"),
        ("clone3", (), "ENOSYS"),
        ("fsopen", (), "ENOSYS"),
        ("mount", (), "EPERM"),
        ("chroot", (), "EPERM"),
    ],
)
def test_a_refusal_has_the_errno_that_its_callers_understand(
    architecture: str, call: str, arguments: tuple[int, ...], expected: str
) -> None:
    program = bpf_machine.decode(compile_filter("default", architecture=architecture))
    verdict = bpf_machine.run(program, numbers(architecture)[call], AUDIT_ARCH[architecture], arguments)
    assert verdict == errno_action(getattr(errno, expected))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_call_of_a_foreign_architecture_kills(architecture: str, mode: Mode) -> None:
    program = bpf_machine.decode(compile_filter("shell", architecture=architecture, mode=mode))
    foreign = {0x40000003, 0x40000028, *AUDIT_ARCH.values(), 0} - {AUDIT_ARCH[architecture]}  # i386, arm …
    for number, audit in itertools.product(range(600), foreign):
        assert bpf_machine.run(program, number, audit, ()) == KILL_PROCESS


@pytest.mark.parametrize("mode", get_args(Mode))
def test_every_x32_call_is_absent(mode: Mode) -> None:
    program = bpf_machine.decode(compile_filter("shell", architecture="x86_64", mode=mode))
    for number in (*range(0x40000000, 0x40000000 + 600), 0x7FFFFFFF, 0xC0000000, 0xFFFFFFFF):
        assert bpf_machine.run(program, number, AUDIT_ARCH["x86_64"], ()) == ENOSYS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_numbers_past_the_table_are_absent(architecture: str) -> None:
    program = bpf_machine.decode(compile_filter("shell", architecture=architecture))
    last = max(numbers(architecture).values())
    for number in (last + 1, last + 2, 1000, 0x3FFFFFFF, 0x80000000):
        assert bpf_machine.run(program, number, AUDIT_ARCH[architecture], ()) == ENOSYS


def test_log_and_trace_change_refusals_and_nothing_else() -> None:
    programs = {
        mode: bpf_machine.decode(compile_filter("default", architecture="x86_64", mode=mode))
        for mode in get_args(Mode)
    }
    for number, arguments in calls("x86_64"):
        enforced, logged, traced = (
            bpf_machine.run(programs[mode], number, AUDIT_ARCH["x86_64"], arguments) for mode in programs
        )
        if enforced == ALLOW:
            assert (logged, traced) == (ALLOW, ALLOW)
        else:
            assert (logged, traced) == (0x7FFC0000, 0x7FF00000 | enforced & 0xFFFF)


@pytest.mark.parametrize("preset", ["strict", "default", "shell"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_verdict_takes_few_steps_and_the_program_is_short(preset: str, architecture: str) -> None:
    program = bpf_machine.decode(compile_filter(preset, architecture=architecture))
    assert len(program) < 200
    # Depth of the search for at most 64 ranges, and the six instructions before it and after it.
    steps = [_steps(program, number, AUDIT_ARCH[architecture]) for number in range(500)]
    assert max(steps) <= 6 + 6 + 10


def _steps(program: list[tuple[int, int, int, int]], number: int, architecture: int) -> int:
    counted = _Counted(program)
    bpf_machine.run(counted, number, architecture, ())
    return counted.reads


class _Counted(list[tuple[int, int, int, int]]):
    reads = 0

    def __getitem__(self, place: object) -> tuple[int, int, int, int]:  # type: ignore[override]
        self.reads += 1
        return super().__getitem__(place)  # type: ignore[call-overload,no-any-return]


def test_the_preset_none_is_no_filter() -> None:
    assert compile_filter("none", architecture="x86_64") == b""
    with pytest.raises(SpecError, match="where the preset `none` allows them all"):
        compile_filter("none", ["mount"], architecture="x86_64")


def test_the_same_policy_gives_the_same_bytes_whatever_the_order() -> None:
    one = compile_filter("default", ["@numa", "settimeofday"], ["kill", "@ipc"], architecture="x86_64")
    other = compile_filter("default", ["settimeofday", "@numa"], ["@ipc", "kill"], architecture="x86_64")
    assert one == other


def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(HostError, match="architecture `riscv64`"):
        compile_filter("default", architecture="riscv64")


def never_calls() -> list[str]:
    return [call for group in presets.groups().values() if group.never for call in group.calls]


def test_the_walls_own_list_is_never_allowed_by_a_preset() -> None:
    required = {
        "mount", "umount2", "pivot_root", "fsopen", "fsconfig", "fsmount", "fspick", "open_tree", "move_mount",
        "mount_setattr", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "keyctl", "add_key",
        "request_key", "bpf", "perf_event_open", "io_uring_setup", "io_uring_enter", "io_uring_register",
        "userfaultfd", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load",
        "open_by_handle_at", "setns", "unshare", "clone3",
    }  # fmt: skip
    assert required <= set(never_calls())
    for preset in presets.presets():
        assert presets.select(preset).calls & set(never_calls()) == frozenset()


def test_default_allows_what_services_were_seen_to_need() -> None:
    lines = Path(__file__).with_name("service_calls.txt").read_text().splitlines()
    needed = [line.split()[0] for line in lines if not line.startswith("#")]
    assert len(needed) > 100
    refused = [verdict.name for verdict in explain_all(needed, "default", chroot=True) if verdict.outcome == "refused"]
    assert refused == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_allows_the_calls_behind_the_functions_of_libc(architecture: str) -> None:
    program = bpf_machine.decode(compile_filter("default", architecture=architecture))
    behind = {
        "kill", "tgkill", "rt_sigqueueinfo", "clock_gettime", "nanosleep", "timer_create", "timerfd_create",
        "signalfd4",
        "inotify_init1", "waitid", "execveat", "mremap", "mlock", "msync", "memfd_create", "copy_file_range", "splice",
        "linkat", "symlinkat", "renameat2", "mkdirat", "utimensat", "truncate", "fallocate", "preadv2", "getxattr",
        "setxattr", "shmget", "semop", "msgsnd", "mq_open", "io_submit", "sched_setaffinity", "sched_setscheduler",
        "setresgid", "fchownat", "getpgid", "setpgid", "getsid", "getitimer", "times", "getrlimit", "pidfd_open",
        "pidfd_send_signal", "openat2", "epoll_pwait2", "membarrier", "landlock_restrict_self", "seccomp",
    }  # fmt: skip
    table = numbers(architecture)
    assert {
        name for name in behind if bpf_machine.run(program, table[name], AUDIT_ARCH[architecture], ()) != ALLOW
    } == set()


@pytest.mark.parametrize("call", ["mount", "ptrace", "bpf", "io_uring_setup", "setns", "@keyring", "clone3"])
def test_what_is_never_allowed_cannot_be_added_and_the_reason_is_told(call: str) -> None:
    with pytest.raises(SpecError) as caught:
        compile_filter("default", [call], architecture="x86_64")
    group = presets.groups()[call[1:]] if call.startswith("@") else presets.group_of()[call]
    assert caught.value.message == f"`policy.syscalls.add` cannot hold `{call}`: {group.about}"
    assert "`[\"vm\"]`" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("add", "remove", "message", "hint"),
    [
        (["exceve"], [], "`policy.syscalls.add` holds `exceve`, which is no system call, group or socket family",
         "did you mean `execve`?"),
        ([], ["@tim"], "`policy.syscalls.remove` holds `@tim`, which is no system call, group or socket family",
         "did you mean `@time`?"),
        (["socket:vsock"], [],
         "`policy.syscalls.add` holds `socket:vsock`, which is no system call, group or socket family",
         "did you mean `socket:can`?"),
        (["mbind"], ["mbind"], "`policy.syscalls` both adds and removes `mbind`", "keep one of the two"),
        ([], ["execve"], "`policy.syscalls.remove` cannot hold `execve`: without it no service can be started",
         "leave it out"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_an_error_with_the_cure(add: list[str], remove: list[str], message: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        compile_filter("default", add, remove, architecture="x86_64")
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_wrong_preset_is_an_error() -> None:
    with pytest.raises(SpecError, match="there is no system call preset `lax`"):
        compile_filter("lax", architecture="x86_64")


def test_a_call_of_another_architecture_is_a_word_that_changes_nothing() -> None:
    assert compile_filter("strict", remove=["open"], architecture="aarch64") == compile_filter(
        "strict", architecture="aarch64"
    )


@pytest.mark.parametrize("preset", ["strict", "default", "shell"])
def test_the_explanation_is_what_the_filter_does(preset: str) -> None:
    program = bpf_machine.decode(compile_filter(preset, ["settimeofday"], ["kill"], architecture="x86_64"))
    table = numbers("x86_64")
    for verdict in explain_all(sorted(table), preset, ["settimeofday"], ["kill"]):
        given = {
            bpf_machine.run(program, table[verdict.name], AUDIT_ARCH["x86_64"], arguments)
            for arguments in ARGUMENTS.get(verdict.name, [()])
        }
        refusals = {errno_action(getattr(errno, name)) for name in verdict.errnos}
        match verdict.outcome:
            case "allowed":
                assert given == {ALLOW}, verdict
            case "conditional":
                assert ALLOW in given, verdict
                assert given - {ALLOW} <= refusals, verdict
                assert len(given) > 1, verdict
            case "refused":
                assert given == refusals, verdict


def test_the_explanation_names_the_line_to_add_where_there_is_one() -> None:
    assert explain("settimeofday").cure == 'policy.syscalls.add = ["settimeofday"]'
    assert explain("mount").cure == ""
    assert explain("read").cure == ""
    assert explain("mount") == Verdict(
        name="mount", outcome="refused", errnos=("EPERM",), group="mount", never=True,
        why="mounting undoes the read-only root, the masks and the nosuid flags",
    )  # fmt: skip
    assert explain("not_a_call").errnos == ("ENOSYS",)
    assert explain("mount", "none").outcome == "allowed"


def test_following_the_cure_allows_the_call() -> None:
    for verdict in explain_all(numbers("x86_64"), "default"):
        if verdict.cure:
            assert explain(verdict.name, "default", [verdict.name]).outcome != "refused"


def test_far_jumps_reach_their_targets_in_a_long_program() -> None:
    # A chain of 900 comparisons, each to its own return: no target of a front instruction is within a byte's reach.
    program = Assembler()
    place = program.give(1)
    for value in reversed(range(900)):
        place = program.test("==", value, then=program.give(1000 + value % 7), otherwise=place)
    program.load(0, then=place)
    instructions = [tuple(instruction) for instruction in program.instructions()]
    assert bpf_machine.decode(program.encode()) == instructions
    for number in (0, 1, 255, 256, 257, 500, 899):
        assert bpf_machine.run(instructions, number, 0, ()) == 1000 + number % 7  # type: ignore[arg-type]
    assert bpf_machine.run(instructions, 900, 0, ()) == 1  # type: ignore[arg-type]


def test_a_far_place_that_is_no_return_is_reached_over_a_jump() -> None:
    program = Assembler()
    target = program.load(16, then=program.give(7))
    place = target
    for value in range(600):
        place = program.test("==", value, then=target, otherwise=place)
    program.load(0, then=place)
    instructions = [tuple(instruction) for instruction in program.instructions()]
    for number in (0, 3, 599, 600, 10_000):
        assert bpf_machine.run(instructions, number, 0, ()) == 7  # type: ignore[arg-type]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("distance", range(250, 262))
def test_two_targets_at_the_edge_of_reach_are_both_reached(distance: int, swapped: bool) -> None:
    program = Assembler()
    targets = [program.give(1), program.give(2)]
    for _ in range(distance):
        program.load(0, then=len(program.instructions()))
    then, otherwise = reversed(targets) if swapped else targets
    program.load(0, then=program.test("==", 9, then=then, otherwise=otherwise))
    instructions = bpf_machine.decode(program.encode())
    answers = [bpf_machine.run(instructions, number, 0, ()) for number in (9, 8)]
    assert answers == ([2, 1] if swapped else [1, 2])


def test_a_program_longer_than_the_kernel_takes_is_refused() -> None:
    program = Assembler()
    place = program.give(0)
    for _ in range(4097):
        place = program.load(0, then=place)
    with pytest.raises(ValueError, match="4098 instructions are more than the 4096"):
        program.instructions()
