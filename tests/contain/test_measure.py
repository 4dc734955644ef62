"""What a jail uses, by its control groups and without."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stockade.contain import descent, measure


@pytest.fixture
def family() -> object:
    """A process with a child of a second thread, and a grandchild."""
    code = (
        "import subprocess, threading, time\n"
        "def start(): subprocess.Popen(['sh', '-c', 'sleep 100 & wait']); time.sleep(100)\n"
        "threading.Thread(target=start, daemon=True).start(); time.sleep(0.3)\n"
        "print('up', flush=True); time.sleep(100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    os.killpg(process.pid, 9)
    process.wait(10)
    process.stdout.close()


def test_children_of_every_thread_are_members(family: int) -> None:
    assert len(measure.members(family)) == 3
    assert measure.members(family)[0] == family


def test_both_ways_to_find_members_agree(family: int) -> None:
    assert set(measure.members(family)) == {family, *descent._by_parent(family)}


def test_without_groups_usage_is_summed_over_processes() -> None:
    used = measure.usage((), (os.getpid(),))
    assert used.processes == 1
    assert used.cpu_seconds == pytest.approx(sum(os.times()[:4]), abs=0.5)
    assert used.memory_bytes is not None and 5 << 20 < used.memory_bytes < 2 << 30


def test_process_that_is_gone_uses_nothing() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait(10)
    used = measure.usage((), (process.pid,))
    assert (used.memory_bytes, used.cpu_seconds) == (None, None)
