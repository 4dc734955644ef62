"""Control groups of version 1 on this host, with real effect; every group made here is removed again."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from child import in_child

from stockade.kernel import cgroups
from stockade.kernel.cgroup_plan import plan
from stockade.records.policy import CgroupOperation, CgroupPlan, Usage
from stockade.records.spec import Limits

LAYOUT = cgroups.layout()

pytestmark = pytest.mark.skipif(
    LAYOUT.version != 1,
    reason=f"needs control groups of version 1 and root: {LAYOUT.reason or 'this host has version 2'}",
)


class Jail:
    """Control groups that a test makes and joins forked children to."""

    def __init__(self) -> None:
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.plans: list[CgroupPlan] = []

    def make(self, limits: Limits, *, disk: str | None = None) -> CgroupPlan:
        made = plan(limits, LAYOUT, self.name, disk=disk)
        self.plans.append(made)
        cgroups.carry_out(made.make)
        return made


def join(made: CgroupPlan) -> None:
    for path in made.join:
        Path(path).write_text("0")


@pytest.fixture
def jail() -> Iterator[Jail]:
    jail = Jail()
    yield jail
    for made in jail.plans:
        cgroups.carry_out(made.remove)
        assert not any(Path(directory).exists() for directory in made.directories.values())


def allocate(size: int) -> int:
    """Touch `size` bytes, page by page."""
    memory = bytearray(size)
    for place in range(0, size, 4096):
        memory[place] = 1
    return len(memory)


def test_memory_past_the_limit_kills_inside_and_nowhere_else(jail: Jail) -> None:
    made = jail.make(Limits(memory="32M"))

    def work(size: int) -> int:
        join(made)
        return allocate(size)

    with subprocess.Popen(["sleep", "60"]) as outside:
        try:
            assert in_child(lambda: work(8 << 20)) == 8 << 20
            assert in_child(lambda: work(128 << 20)) == ("signal", signal.SIGKILL)
            assert outside.poll() is None
        finally:
            outside.kill()
    assert (cgroups.usage(made.directories).oom_kills or 0) >= 1


def test_the_same_memory_is_given_where_no_limit_is_set(jail: Jail) -> None:
    made = jail.make(Limits())

    def work() -> int:
        join(made)
        return allocate(128 << 20)

    assert in_child(work) == 128 << 20
    assert cgroups.usage(made.directories).oom_kills == 0


@pytest.mark.parametrize(("limit", "expected"), [(4, 4), (None, 12)])
def test_a_fork_past_the_limit_is_refused_with_eagain(jail: Jail, limit: int | None, expected: int) -> None:
    made = jail.make(Limits(processes=limit))

    def work() -> tuple[int, int]:
        join(made)
        children: list[int] = []
        code = 0
        try:
            while len(children) < 12:
                pid = os.fork()
                if pid == 0:
                    signal.pause()
                children.append(pid)
        except OSError as failure:
            code = failure.errno or 0
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return len(children), code

    # The forking child stands for the jail's own PID 1, which does not count.
    assert in_child(work) == [expected, errno.EAGAIN if limit else 0]


def test_cpu_time_is_held_back_to_the_share(jail: Jail) -> None:
    made = jail.make(Limits(cpus=0.1))

    def work() -> float:
        join(made)
        end = time.monotonic() + 0.6
        before = time.process_time()
        while time.monotonic() < end:
            pass
        return time.process_time() - before

    # 0.06 s are due; a period of 0.1 s may begin before the first one ends, and the clock ticks coarsely.
    assert in_child(work) < 0.2


def test_direct_writes_are_held_back_to_the_rate(jail: Jail, tmp_path: Path) -> None:
    disk = cgroups.disk_of(tmp_path)
    if disk is None:
        pytest.skip("the temporary directory is on no disk")
    made = jail.make(Limits(io_write="1M"), disk=disk)
    assert [finding.limit for finding in made.not_limited] == ["io_write"]

    def work(*, limited: bool) -> float:
        import mmap

        if limited:
            join(made)
        block = mmap.mmap(-1, 256 << 10)  # aligned, as O_DIRECT demands
        descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        start = time.monotonic()
        for _ in range(4):
            os.write(descriptor, block)
        return time.monotonic() - start

    # The first quarter of the MiB may pass at once.
    assert in_child(lambda: work(limited=True)) > 0.6
    assert in_child(lambda: work(limited=False)) < 0.6


def test_usage_tells_memory_processes_and_cpu_time(jail: Jail) -> None:
    made = jail.make(Limits(memory="64M"))
    before = cgroups.usage(made.directories)
    assert (before.processes, before.oom_kills) == (0, 0)

    def work() -> list[float]:
        join(made)
        held = allocate(16 << 20)
        memory = bytearray(16 << 20)
        memory[::4096] = b"x" * len(memory[::4096])
        while time.process_time() < 0.05:
            pass
        now = cgroups.usage(made.directories)
        return [held, now.memory_bytes or 0, now.processes or 0, now.cpu_seconds or 0]

    _, memory, processes, seconds = in_child(work)
    assert 16 << 20 <= memory <= 64 << 20
    assert processes == 1
    assert 0.02 < seconds < 5


def test_usage_of_groups_that_are_gone_is_unknown() -> None:
    assert cgroups.usage({"memory": "/sys/fs/cgroup/memory/stockade-never-made"}) == Usage()
    assert cgroups.usage({}) == Usage()


def test_a_group_is_removed_as_soon_as_its_last_process_has_ended(jail: Jail) -> None:
    made = jail.make(Limits(processes=5))
    with subprocess.Popen(["sleep", "60"]) as inside:
        for path in made.join:
            Path(path).write_text(str(inside.pid))
        started = time.monotonic()
        with pytest.raises(OSError) as caught:
            cgroups.carry_out(made.remove)
        assert caught.value.errno == errno.EBUSY
        assert time.monotonic() - started < 5
        inside.kill()
        cgroups.carry_out(made.remove)
    assert not any(Path(directory).exists() for directory in made.directories.values())


def test_making_twice_and_removing_twice_is_no_error(jail: Jail) -> None:
    made = jail.make(Limits(memory="64M"))
    cgroups.carry_out(made.make)
    cgroups.carry_out(made.remove)
    cgroups.carry_out(made.remove)


def test_a_write_that_the_kernel_refuses_names_the_file(jail: Jail) -> None:
    made = jail.make(Limits(processes=5))
    path = f"{made.directories['pids']}/pids.max"
    with pytest.raises(OSError) as caught:
        cgroups.carry_out([CgroupOperation(kind="write", path=path, value="many")])
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, path)


def test_an_ordinary_user_has_none_here() -> None:
    def work() -> tuple[int, str]:
        os.setresuid(65534, 65534, 65534)
        found = cgroups.layout()
        return found.version, found.reason

    assert in_child(work) == [0, "control groups of version 1 cannot be handed to an ordinary user"]
