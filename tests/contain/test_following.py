"""`stockade logs` of a service that writes all the time, and what carries a command's bytes on the command line."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import Builder

from stockade import Jail, contain
from stockade.cli import running
from stockade.contain import starting

COPY = "from stockade.cli import console; console.copy("


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def copied(environment: dict[str, str]) -> Iterator[list[int]]:
    """Descriptors of terminals whose programs are ended with the test."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def on_terminal(pids: list[int], pieces: str) -> int:
    """What shows `pieces` as `console.copy` does on a terminal, from whose descriptor it can be read."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        os.execv(sys.executable, [sys.executable, "-c", f"{COPY}{pieces})"])
    pids.append(pid)
    return master


def shown(master: int, wanted: bytes) -> bytes:
    found = b""
    while wanted not in found and select.select([master], [], [], 20)[0]:
        try:
            found += os.read(master, 4096)
        except OSError:
            break
    return found


def test_a_terminal_is_shown_what_has_no_end(copied: list[int]) -> None:
    assert b"line\r\n" in shown(on_terminal(copied, r"iter(lambda: b'line\n', b'')"), b"line\r\n")


def test_characters_and_ends_of_lines_may_come_in_two_pieces(copied: list[int]) -> None:
    master = on_terminal(copied, r"[b'caf\xc3', b'\xa9\r', b'\n\r', b'x\r', b'\r\n', b'\r']")
    assert shown(master, b"x\\r\\r\n\\r") == "café\r\n\\rx\\r\r\n\\r".encode()


def test_following_ends_when_nobody_reads_it_any_more(jail: Builder, environment: dict[str, str]) -> None:
    jail("test", {"service": {"command": ["/bin/sh", "-c", "echo once; sleep 600"]}})
    with contain.launch("test", detach=True):
        follower = subprocess.Popen(
            [sys.executable, "-m", "stockade", "logs", "--follow", "test"], stdout=subprocess.PIPE, env=environment
        )
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"once\n"
        follower.stdout.close()
        try:
            assert follower.wait(20) == 141
        finally:
            follower.kill()
            follower.wait()


def test_who_reads_too_slowly_is_told_of_the_gap(
    jail: Builder, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads until far more was written than all files of the log hold together."""
    monkeypatch.setattr(starting, "_LOG_BYTES", 100_000)
    jail("test", {"service": {"command": ["/bin/sh", "-c", "seq 3000; read line; seq 3001 600000"]}})
    reader, writer = os.pipe()
    service = contain.launch("test", detach=True, stdin=reader)
    os.close(reader)
    command = [sys.executable, "-m", "stockade", "logs", "--follow", "test"]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    try:
        assert follower.stdout is not None
        first = follower.stdout.readline()
        assert first == b"1\n"
        os.write(writer, b"\n")
        assert service.wait(60) == 0
        rest, errors = follower.communicate(timeout=60)
    finally:
        os.close(writer)
        follower.kill()
        follower.wait()
        service.close()
    told = b"note: the log was written faster than it was read: lines may be missing here"
    assert set(errors.splitlines()) == {told}
    lines = (first + rest).splitlines()
    assert lines[-1] == b"600000"
    assert len(lines) < 600_000


def test_standard_output_that_does_not_block_gets_the_whole_log(jail: Builder, environment: dict[str, str]) -> None:
    jail("test", {"service": {"command": ["/bin/seq", "100000"]}})
    with contain.launch("test", detach=True) as service:
        assert service.wait(20) == 0
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    logs = subprocess.Popen([sys.executable, "-m", "stockade", "logs", "test"], stdout=writer, env=environment)
    try:
        while select.select([], [writer], [], 0)[1] and logs.poll() is None:
            select.select([], [], [], 0.01)
        os.close(writer)
        with open(reader, "rb") as file:
            assert file.read().split() == [b"%d" % number for number in range(1, 100001)]
        assert logs.wait(20) == 0
    finally:
        logs.kill()
        logs.wait()


def test_a_command_in_a_running_jail_ends_though_what_it_left_has_its_output_open(jail: Builder) -> None:
    jail("test", {"service": {"command": ["/bin/sleep", "600"]}})
    with contain.launch("test", detach=True):
        done = Jail("test").execute(["sh", "-c", "(sleep 15; echo late) & seq 9000; exit 3"])
    assert (done.status, done.stdout.split()[-1:]) == (3, [b"9000"])


def test_a_signal_for_a_jail_that_has_just_ended_does_not_lose_its_status() -> None:
    process = subprocess.Popen(["true"])
    process.wait()

    class Ended:
        init_pid = pid = process.pid
        memory_kills = 0

        def wait(self) -> int:
            os.kill(os.getpid(), signal.SIGTERM)
            return 7

        def close(self) -> None:
            pass

    assert running.wait(Ended()) == 7  # type: ignore[arg-type]
