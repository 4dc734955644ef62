"""The terminal that a jail has of its own, and who carries bytes between it and the caller's standard streams."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from conftest import Builder, output
from processes import cpu_ticks, until

from stockade import contain
from stockade.contain.communicate import communicate

PIPE = subprocess.PIPE
RUN = "import sys; from stockade.contain import fast; fast.run('test', sys.argv[1:], terminal=True)"


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose writer does not block, as one that the caller shares with a program that wants it so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def read_to_end(descriptor: int) -> bytes:
    """What comes out of a pty until nobody writes to it any more (EIO)."""
    found = b""
    try:
        while piece := os.read(descriptor, 1 << 16):
            found += piece
    except OSError:
        pass
    return found


def test_output_of_a_command_that_ends_before_its_supervisor_looks(jail: Builder) -> None:
    if shutil.which("strace") is None:
        pytest.skip("`apt-get install strace`: it holds the supervisor up")
    jail()
    output("test", "true")  # makes what `fast` needs
    master, slave = pty.openpty()
    delayed = ["strace", "-o", os.devnull, "-e", "trace=poll", "-e", "inject=poll:delay_enter=300000"]
    process = subprocess.Popen(
        [*delayed, sys.executable, "-c", RUN, "echo", "hello"], stdin=slave, stdout=slave, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(slave)
    assert read_to_end(master) == b"hello\r\n"
    assert process.wait(20) == 0
    os.close(master)


def test_a_terminal_that_nobody_has_open_is_opened_anew(jail: Builder) -> None:
    jail()
    late = "exec </dev/null >/dev/null 2>&1; sleep 0.3; seq 20000 >/dev/tty"
    with contain.launch(
        "test", argv=["sh", "-c", late], terminal=True, stdin=subprocess.DEVNULL, stdout=PIPE
    ) as jailed:
        heard = communicate(jailed, timeout_s=20)
        assert (heard.status, heard.stdout.split()[-1:]) == (0, [b"20000"])


def test_standard_output_that_does_not_block_gets_every_byte(jail: Builder, full_pipe: tuple[int, int]) -> None:
    jail()
    reader, writer = full_pipe
    with contain.launch(
        "test", argv=["seq", "60000"], terminal=True, stdin=subprocess.DEVNULL, stdout=writer
    ) as jailed:
        assert until(lambda: not select.select([], [writer], [], 0)[1])  # it is full
        found = b""
        while not found.endswith(b"60000\r\n") and select.select([reader], [], [], 10)[0]:
            found += os.read(reader, 1 << 14)
        assert found.split() == [b"%d" % number for number in range(1, 60001)]
        assert jailed.wait(20) == 0


def test_a_terminal_hangs_up_when_nobody_reads_it(jail: Builder) -> None:
    jail()
    with contain.launch(
        "test", argv=["seq", "10000000"], terminal=True, stdin=subprocess.DEVNULL, stdout=PIPE
    ) as jailed:
        assert jailed.stdout is not None
        jailed.stdout.read(1)
        jailed.stdout.close()
        assert jailed.wait(20) == 129


def test_input_without_a_newline_at_its_end_ends(jail: Builder) -> None:
    jail()
    with contain.launch(
        "test", argv=["sh", "-c", "stty -echo; echo ready; cat"], terminal=True, stdin=PIPE, stdout=PIPE
    ) as jailed:
        assert jailed.stdin is not None and jailed.stdout is not None
        assert jailed.stdout.read(7) == b"ready\r\n"
        heard = communicate(jailed, b"abc", timeout_s=20)
        assert (heard.status, heard.stdout) == (0, b"abc")


def test_input_that_has_ended_and_is_not_taken_costs_no_processor(jail: Builder) -> None:
    jail()
    with contain.launch(
        "test", argv=["sh", "-c", "stty raw -echo; echo ready; sleep 60"], terminal=True, stdin=PIPE, stdout=PIPE
    ) as jailed:
        assert jailed.stdin is not None and jailed.stdout is not None
        assert jailed.stdout.read(6) == b"ready\n"
        os.set_blocking(jailed.stdin.fileno(), False)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:  # until terminal, supervisor and pipe are full
            if jailed.stdin.write(b"x" * 4096) is not None:
                end = time.monotonic() + 0.3
        jailed.stdin.close()
        before = cpu_ticks(jailed.supervisor_pid)
        time.sleep(1)
        assert cpu_ticks(jailed.supervisor_pid) - before < 20


def test_a_terminal_is_raw_again_when_a_stopped_command_goes_on(jail: Builder) -> None:
    jail()
    output("test", "true")  # makes what `fast` needs
    master, slave = pty.openpty()
    cooked = termios.tcgetattr(slave)
    process = subprocess.Popen(
        ["setsid", "--ctty", sys.executable, "-c", RUN, "sh", "-c", "echo ready; cat"], stdin=slave, stdout=slave,
        stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip

    def is_raw() -> bool:
        return not int(termios.tcgetattr(slave)[3]) & termios.ICANON

    try:
        assert until(is_raw)
        process.send_signal(signal.SIGSTOP)
        termios.tcsetattr(slave, termios.TCSANOW, cooked)  # as the shell does
        process.send_signal(signal.SIGCONT)
        assert until(is_raw)
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)
