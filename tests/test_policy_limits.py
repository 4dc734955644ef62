"""Why was it blocked, by a limit or by Landlock? Real programs that run into them, and the line that lifts it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import policyjail
import pytest
from policyjail import Home, python, spec

from stockade.kernel import cgroups, landlock, loop

pytestmark = pytest.mark.skipif(bool(policyjail.UNABLE), reason=policyjail.UNABLE)

LIMITED = spec(
    "limited", "",
    "[limits]",
    'memory = "48M"', "processes = 6", "open_files = 16", 'file_size = "64K"',
    '[directories."/tmp"]',
    'size = "256K"', "inodes = 20",
    '[directories."/data"]',
    'kind = "volume"', 'size = "8M"',
)  # fmt: skip


class Reached(NamedTuple):
    """`code` runs into a limit: a refusal of `what` by `error`, for `reason`, lifted by `toml`."""

    code: str
    what: str
    error: str
    reason: str
    toml: str


REACHED = {
    "open-files": Reached(
        "kept = [os.open('/', os.O_RDONLY) for _ in range(20)]", "openat `/`", "EMFILE", "`open_files = 16` is reached",
        "[limits]\nopen_files = 32",
    ),
    "file-size": Reached(
        "os.write(os.open('/tmp/file', os.O_WRONLY | os.O_CREAT), bytes(65536)) and os.write(3, b'more')",
        "write", "EFBIG", '`file_size = "64K"` is reached', '[limits]\nfile_size = "128K"',
    ),
    "processes": Reached(
        "children = [subprocess.Popen(['/usr/bin/python3', '-c', 'input()'], stdin=-1) for _ in range(8)]",
        "vfork", "EAGAIN", "`processes = 6` is reached", "[limits]\nprocesses = 12",
    ),
    "memory": Reached(
        "held = bytearray(64 << 20)", "a process", "SIGKILL",
        '`memory = "48M"` is reached: the kernel ended the process that asked for more', '[limits]\nmemory = "96M"',
    ),
    "full": Reached(
        "for number in range(5): open(f'/tmp/{number}', 'wb').write(bytes(60_000))", "write", "ENOSPC",
        "`/tmp` is full: it has 256K",
        '[directories]\n"/tmp" = { mode = "0755", owner = "root", size = "512K", inodes = 20 }',
    ),
    "inodes": Reached(
        "for number in range(30): open(f'/tmp/{number}', 'w')", "openat `/tmp/19`", "ENOSPC",
        "`/tmp` has no room for more than 20 files",
        '[directories]\n"/tmp" = { mode = "0755", owner = "root", size = "256K", inodes = 40 }',
    ),
    "full-volume": Reached(
        "for number in range(180): open(f'/data/{number}', 'wb').write(bytes(50_000))", "write", "ENOSPC",
        "`/data` is full: it has 8M",
        '[directories]\n"/data" = { mode = "0755", owner = "root", kind = "volume", size = "16M" }',
    ),
    "inodes-of-a-volume": Reached(
        "for number in range(1500): open(f'/data/{number}', 'w')", "openat", "ENOSPC",
        "`/data` has no room for more than 1024 files",
        '[directories]\n"/data" = { mode = "0755", owner = "root", kind = "volume", size = "8M", inodes = 2048 }',
    ),
}  # fmt: skip
NEEDS = {"memory": "memory", "processes": "pids"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("home"))
    home.build("limited", LIMITED)
    yield home
    home.output("rm", "--force", "limited")


@pytest.mark.parametrize("case", REACHED)
def test_limit_that_was_reached_is_named_with_the_line_that_gives_more(case: str, home: Home) -> None:
    if NEEDS.get(case, "memory") not in cgroups.layout().controllers:
        pytest.skip(f"the controller `{NEEDS[case]}` cannot be used here: `stockade doctor` says why")
    if case.endswith("volume") and loop.lacking(root=True):
        pytest.skip(f"{loop.lacking(root=True)}: `stockade doctor` has the cure")
    given = REACHED[case]
    report = home.why("limited", python(given.code))
    assert (report["works"], report["works_with_lines"]) == (False, True), report
    refusal = report["refusals"][0]  # Python tries clone(2) after vfork(2)
    assert {other["reason"] for other in report["refusals"]} == {given.reason}
    assert (refusal["what"].partition(" `/data/")[0], refusal["wall"]) == (given.what, "limit")
    assert refusal["error"] == given.error
    assert (refusal["reason"], refusal["confirmed"]) == (given.reason, True)
    assert report["toml"] == given.toml


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("kept = [os.open('/', os.O_RDONLY) for _ in range(40)]", "`open_files = 16` is reached; `open_files = 32`"),
        (
            "for number in range(60): open(f'/tmp/{number}', 'w')",
            '`/tmp` has no room for more than 20 files; `"/tmp" = { mode = "0755", owner = "root", size = "256K", '
            "inodes = 40 }`",
        ),
    ],
    ids=["open-files", "inodes"],
)  # fmt: skip
def test_limit_of_which_twice_as_much_is_reached_too_is_said_to_want_more(code: str, reason: str, home: Home) -> None:
    report = home.why("limited", python(code))
    assert (report["works"], report["works_with_lines"], report["runs"], report["toml"]) == (False, False, 2, "")
    [refusal] = report["refusals"]
    assert refusal["reason"] == f"{reason} was tried, and is not enough"


def test_child_that_is_killed_for_want_of_memory_is_told_though_its_parent_goes_on(home: Home) -> None:
    if "memory" not in cgroups.layout().controllers:
        pytest.skip("the controller `memory` cannot be used here: `stockade doctor` says why")
    child = python("held = bytearray(64 << 20)")
    report = home.why("limited", python(f"print(subprocess.run({child!r}).returncode)"))
    assert report["works"]
    [refusal] = report["refusals"]
    assert (refusal["what"], refusal["wall"], refusal["error"]) == ("a process", "limit", "SIGKILL")
    assert report["toml"] == '[limits]\nmemory = "96M"'


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "child = subprocess.Popen(['/usr/bin/python3', '-c', 'input()'], stdin=-1)\nchild.kill()\nchild.wait()",
        "signal.pidfd_send_signal(os.pidfd_open(os.getpid()), signal.SIGKILL)",
        "subprocess.Popen(['/usr/bin/python3', '-c', 'input()'], stdin=-1)\nos._exit(0)",
    ],
    ids=["itself", "child", "pidfd", "left-behind"],
)
def test_process_that_was_killed_by_another_is_not_said_to_want_memory(code: str, home: Home) -> None:
    assert home.why("limited", python(code))["refusals"] == []


@pytest.mark.slow
def test_service_that_has_to_be_killed_at_its_stop_is_not_said_to_want_memory(tmp_path: Path) -> None:
    home = Home(tmp_path)
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\nsignal.pause()"
    text = spec("stubborn", code, 'ready = { log = "up" }', "stop_timeout_s = 0.5", "[limits]", 'memory = "48M"')
    home.build("stubborn", text)
    report = json.loads(home.output("why", "stubborn", "--json"))
    assert (report["works"], report["refusals"]) == (True, [])
    home.output("rm", "--force", "stubborn")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the machine code is x86_64's")
def test_call_of_a_foreign_architecture_is_named_and_never_allowed(home: Home) -> None:
    # mov eax, 20 (getpid of i386); int 0x80; ret
    code = (
        "_libc.mmap.restype = ctypes.c_void_p\nmemory = _libc.mmap(None, 4096, 7, 0x22, -1, 0)\n"
        "ctypes.memmove(memory, b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3', 8)\nctypes.CFUNCTYPE(ctypes.c_int)(memory)()"
    )
    report = home.why("limited", python(code))
    [refusal] = report["refusals"]
    assert (refusal["wall"], refusal["error"], refusal["never"]) == ("filter", "SIGSYS", True)
    assert "foreign architecture" in refusal["reason"]


@pytest.mark.slow
@pytest.mark.skipif(landlock.abi() < 6, reason="this kernel's Landlock does not know abstract sockets: it needs ABI 6")
def test_abstract_socket_of_the_host_that_landlock_keeps_away_is_named_with_its_line(tmp_path: Path) -> None:
    home, name = Home(tmp_path), f"stockade-test-{os.getpid()}"
    code = python(f"s = socket.socket(socket.AF_UNIX)\ns.settimeout(0.5)\ns.connect('\\0{name}')\nprint(s.recv(9))")
    text = spec("outward", "", "[network]", 'mode = "host"', "[policy]", "capabilities = []")
    home.build("outward", text)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen()
        assert "PermissionError" in home.run("run", "outward", "--", *code).stderr
        report = home.why("outward", code)
        [refusal] = report["refusals"]
        assert (refusal["what"], refusal["wall"]) == (f"connect to `@{name}`", "landlock")
        assert report["toml"] == "[policy]\nlandlock = false"
        home.build("outward", f"{text}landlock = false\n")
        assert "TimeoutError" in home.run("run", "outward", "--", *code).stderr  # connected: nobody says anything
    home.output("rm", "--force", "outward")
