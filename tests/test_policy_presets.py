"""The presets in real jails: what each refuses is seen to be let through without a filter."""

from __future__ import annotations

import errno
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import policyjail
import pytest
from policyjail import Home, python, spec

from stockade.kernel import presets
from stockade.kernel.seccomp import compile_filter
from stockade.kernel.syscalls import AUDIT_ARCH, host_architecture, numbers

sys.path.insert(0, str(Path(__file__).parent / "kernel"))
import bpf_machine

#: Attempts by the first preset that allows them, "" for none; numbers are those of x86_64.
ATTEMPTS = {
    "strict": {
        "getpid": "call(39)", "epoll": "call(291, 0)", "inet": "socket.socket(2, 1)", "unix": "socket.socket(1, 1)",
        "thread": "call(56, 0x11, 0, 0, 0, 0) or os._exit(0)", "landlock": "call(444, 0, 0, 1)",
    },
    "default": {
        "setresuid": "call(117, -1, -1, -1)", "chown": "os.chown('/tmp', -1, -1)",
        "fifo": "os.mkfifo('/tmp/fifo')", "getxattr": "os.listxattr('/tmp')", "semget": "call(64, 0, 1, 0o600)",
        "io_setup": "call(206, 1, ctypes.byref(ctypes.c_long(0)))", "setpriority": "os.setpriority(0, 0, 0)",
        "adjtimex": "call(159, b'\\0' * 208)", "netlink": "socket.socket(16, 3, 0)",
    },
    "shell": {
        "get_mempolicy": "call(239, 0, 0, 0, 0, 0)", "modify_ldt": "call(154, 0, b'\\0' * 16, 16)",
        "sysfs": "call(139, 3)", "sock_diag": "socket.socket(16, 3, 4)", "generic": "socket.socket(16, 3, 16)",
    },
    "": {
        "ptrace": "call(101, 0, 0, 0, 0)", "unshare": "call(272, 0x400)",
        "kcmp": "call(312, os.getpid(), os.getpid(), 0, 0, 0)",
        "keyctl": "call(250, 0, -3, 1)", "process_vm_readv": "call(310, os.getpid(), 0, 0, 0, 0, 0)",
        "personality": "call(135, 0x40000)", "userfaultfd": "call(323, 1)",
    },
}  # fmt: skip
ORDER = ("strict", "default", "shell")
REFUSALS = {"EPERM", "EAFNOSUPPORT", "EPROTONOSUPPORT"}

# Each attempt has a process of its own, for what it succeeds in.
CODE = """
found = {}
for name, attempt in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        try:
            eval(attempt)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[name] = errno.errorcode[status] if status > 0 else f'signal {-status}' if status else ''
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, str]]]:
    """What came of each attempt, by preset."""
    if policyjail.UNABLE:
        pytest.skip(policyjail.UNABLE)
    if host_architecture() != "x86_64":
        pytest.skip("the attempts are written with the numbers of x86_64")
    home = Home(tmp_path_factory.mktemp("home"))
    attempts = json.dumps({name: code for group in ATTEMPTS.values() for name, code in group.items()})
    found = {}
    for preset in (*ORDER, "none"):
        home.build("p", spec("p", "", "[policy]", "capabilities = []", f'syscalls = {{ preset = "{preset}" }}'))
        found[preset] = json.loads(home.output("run", "p", "--", *python(CODE), attempts))
    yield found
    home.output("rm", "--force", "p")


@pytest.mark.parametrize("preset", ORDER)
def test_preset_allows_its_own_and_the_narrower_ones_calls(preset: str, outcomes: dict[str, dict[str, str]]) -> None:
    allowed = {name for known in ORDER[: ORDER.index(preset) + 1] for name in ATTEMPTS[known]}
    assert {name: outcomes[preset][name] for name in allowed} == {name: outcomes["none"][name] for name in allowed}


@pytest.mark.parametrize("preset", ORDER)
def test_preset_refuses_what_passes_without_a_filter(preset: str, outcomes: dict[str, dict[str, str]]) -> None:
    wider = [*ORDER[ORDER.index(preset) + 1 :], ""]
    refused = {name for known in wider for name in ATTEMPTS[known]}
    assert {name for name in refused if outcomes[preset][name] not in REFUSALS} == set()
    assert {name for name in refused if outcomes["none"][name] in REFUSALS} == set()


def test_add_and_remove_are_in_force_in_the_jail(tmp_path: Path) -> None:
    if policyjail.UNABLE:
        pytest.skip(policyjail.UNABLE)
    home = Home(tmp_path)
    policy = 'syscalls = { preset = "default", add = ["@numa", "netlink:generic"], remove = ["@ipc", "socket:inet6"] }'
    home.build("p", spec("p", "", "[policy]", "capabilities = []", policy))
    attempts = {
        "get_mempolicy": "call(239, 0, 0, 0, 0, 0)", "generic": "socket.socket(16, 3, 16)",
        "semget": "call(64, 0, 1, 0o600)", "inet6": "socket.socket(10, 1)", "sock_diag": "socket.socket(16, 3, 4)",
    }  # fmt: skip
    found = json.loads(home.output("run", "p", "--", *python(CODE), json.dumps(attempts)))
    assert found == {
        "get_mempolicy": "", "generic": "", "semget": "EPERM", "inet6": "EAFNOSUPPORT", "sock_diag": "EPROTONOSUPPORT",
    }  # fmt: skip


@pytest.mark.parametrize("preset", ORDER)
@pytest.mark.parametrize("chroot", [False, True])
def test_the_answer_said_of_a_call_is_the_one_that_the_filter_gives(preset: str, chroot: bool) -> None:
    architecture = "x86_64"
    program = bpf_machine.decode(compile_filter(preset, architecture=architecture, chroot=chroot))
    selection = presets.select(preset, chroot=chroot)
    chance, judged = random.Random(3), 0
    interesting = [0, 1, 2, 3, 10, 16, 17, 40, 0x5412, 0x5401, 0x11, 0x10000011, 0o20000, 0o10000, 0xFFFFFFFF]
    for name, number in numbers(architecture).items():
        ruled = any(name in rule.calls for rule in presets.rules())
        for arguments in itertools.product(interesting, repeat=3) if ruled else [(0, 0, 0)]:
            if chance.random() < 0.8 and arguments != (0, 0, 0):
                continue
            result = bpf_machine.run(program, number, AUDIT_ARCH[architecture], arguments)
            answer = selection.answer(name, arguments)
            expected = 0x7FFF0000 if not answer else 0x00050000 | getattr(errno, answer)
            assert result == expected, (name, arguments, answer)
            judged += 1
    assert judged > 5000
