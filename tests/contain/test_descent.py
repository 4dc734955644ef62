"""The end of a process and its descendants, also of those whose main thread has ended before."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Builder
from processes import children, until

from stockade import contain
from stockade.contain import descent

#: Its main thread ends at once, another goes on.
PROGRAM = r"""
#include <pthread.h>
#include <unistd.h>
static void *rest(void *unused)
{
    for (;;)
        usleep(1000);
    return unused;
}
int main(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, rest, NULL) == 0)
        pthread_exit(NULL);
    return 1;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, static: a jail of these tests has no libraries."""
    place = tmp_path_factory.mktemp("threads") / "headless"
    subprocess.run(["cc", "-static", "-pthread", "-x", "c", "-", "-o", place], input=PROGRAM.encode(), timeout=60,
                   check=True)  # fmt: skip
    return place


def started(pid: int) -> tuple[int, int]:
    return pid, int(descent.stat(pid)[19])


def is_headless(pid: int) -> bool:
    return descent.stat(pid)[:1] == [b"Z"] and len(glob.glob(f"/proc/{pid}/task/*")) == 2


def is_over(pid: int) -> bool:
    """Whether no thread of it runs: its parent may not have asked for it yet."""
    return len(glob.glob(f"/proc/{pid}/task/*")) < 2


@pytest.fixture
def shell(program: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A shell with such a child."""
    with subprocess.Popen(["sh", "-c", f"{program} & wait"]) as process, contextlib.ExitStack() as ending:
        ending.callback(process.kill)
        assert until(lambda: any(map(is_headless, children(process.pid))))
        [child] = children(process.pid)
        descriptor = os.pidfd_open(child)
        ending.callback(os.close, descriptor)
        ending.callback(kill, descriptor)
        yield process


def kill(descriptor: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the test has ended it
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def test_descendant_whose_main_thread_has_ended_is_ended_too(shell: subprocess.Popen[bytes]) -> None:
    [child] = children(shell.pid)
    descent.end(started(shell.pid))
    assert shell.wait(20) == -signal.SIGKILL
    assert until(lambda: is_over(child))


def test_process_whose_main_thread_has_ended_is_at_rest_only_when_its_threads_are(
    shell: subprocess.Popen[bytes]
) -> None:
    [child] = map(started, children(shell.pid))
    assert not descent._at_rest(child)
    descent._send(child, signal.SIGSTOP)
    assert until(lambda: descent._at_rest(child))
    assert descent.stat(child[0])[0] == b"Z"


def test_process_with_a_number_that_was_anothers_is_not_touched(shell: subprocess.Popen[bytes]) -> None:
    [child] = children(shell.pid)
    number, ticks = started(shell.pid)
    descent.end((number, ticks - 1))
    assert shell.poll() is None and is_headless(child)


def test_entered_command_whose_main_thread_has_ended_is_killed(jail: Builder, program: Path) -> None:
    shutil.copy(program, jail() / "rootfs/bin")
    with contain.launch("test", argv=["/bin/sleep", "100"]) as service:
        command = contain.enter("test", ["/bin/headless"])
        assert until(lambda: is_headless(command.pid))
        command.interrupt()
        assert command.wait(20) == 137
        command.close()
        found = contain.find("test").processes
        assert until(lambda: set(found()) == {service.init_pid, service.pid})
