"""Resource limits: their values, and in force in a forked child."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
from child import in_child

from stockade.kernel.rlimits import rlimits
from stockade.records.policy import ResourceLimit
from stockade.records.spec import Limits


def apply(limits: Limits) -> None:
    for limit in rlimits(limits):
        resource.setrlimit(limit.resource, (limit.soft, limit.hard))


def test_a_spec_without_limits_forbids_core_dumps_alone() -> None:
    assert [(limit.name, limit.soft, limit.hard) for limit in rlimits(Limits())] == [("core", 1, 1)]


def test_each_limit_of_the_spec_has_its_resource() -> None:
    limits = Limits(open_files=64, file_size="3M", processes=9)
    assert rlimits(limits, processes=True) == (
        ResourceLimit(name="core", resource=resource.RLIMIT_CORE, soft=1, hard=1),
        ResourceLimit(name="fsize", resource=resource.RLIMIT_FSIZE, soft=3 << 20, hard=3 << 20),
        ResourceLimit(name="nofile", resource=resource.RLIMIT_NOFILE, soft=64, hard=64),
        ResourceLimit(name="nproc", resource=resource.RLIMIT_NPROC, soft=9, hard=9),
    )
    assert "nproc" not in [limit.name for limit in rlimits(limits)]


def test_a_descriptor_past_the_limit_is_refused() -> None:
    def work() -> tuple[int, int]:
        apply(Limits(open_files=20))
        opened = 0
        try:
            while opened < 100:
                os.open("/dev/null", os.O_RDONLY)
                opened += 1
        except OSError as failure:
            return opened, failure.errno or 0
        return opened, 0

    opened, code = in_child(work)
    assert code == errno.EMFILE
    assert opened < 20


def test_a_file_past_the_limit_is_refused(tmp_path: Path) -> None:
    def work() -> tuple[int, int]:
        apply(Limits(file_size="64K"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
        written = 0
        try:
            while written < 1 << 20:
                written += os.write(descriptor, b"x" * 4096)
        except OSError as failure:
            return written, failure.errno or 0
        return written, 0

    assert in_child(work) == [64 << 10, errno.EFBIG]


@pytest.mark.parametrize("walled", [True, False])
def test_a_crash_leaves_no_core_file_where_the_limit_is_set(tmp_path: Path, walled: bool) -> None:
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith("|"):
        pytest.skip("this host pipes core dumps into a program (kernel.core_pattern)")

    def work() -> None:
        os.chdir(tmp_path)
        if walled:
            apply(Limits())
        else:
            resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGQUIT)

    assert in_child(work) == ("signal", signal.SIGQUIT)
    assert (len(list(tmp_path.iterdir())) > 0) == (not walled)
