"""A host short of memory, while a jail starts and while it runs: a clear word, and nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Builder
from processes import until, wardens

from stockade import contain, places
from stockade.contain.starting import log_path
from stockade.errors import WallError
from stockade.kernel import cgroups
from stockade.records.lock import LockDirectory

#: Becomes the command after the number with that many KiB of address space: a static program that needs little itself.
LIMITER = """
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>
extern char **environ;
int main(int argc, char **argv)
{
    const rlim_t bytes = argc > 2 ? strtoul(argv[1], NULL, 10) << 10 : 0;
    const struct rlimit limit = {bytes, bytes};
    if (setrlimit(RLIMIT_AS, &limit) == 0)
        execve(argv[2], argv + 2, environ);
    return 125;
}
"""


@pytest.fixture(scope="module")
def limiter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("`apt-get install gcc libc6-dev` compiles the program that limits the warden")
    place = tmp_path_factory.mktemp("limiter")
    (place / "limiter.c").write_text(LIMITER)
    command = ["gcc", "-static", "-o", str(place / "limiter"), str(place / "limiter.c")]
    subprocess.run(command, check=True, timeout=60)
    return place / "limiter"


def attempt(generation: Path, limiter: Path, kibibytes: int) -> str:
    """What comes of a launch by a warden that has so much address space: "works", or what is said."""
    words = (os.fsencode(limiter), b"%d" % kibibytes)
    (generation / "wrapper").write_bytes(b"\0".join(words))
    try:
        with contain.launch("test", argv=["/bin/true"]) as running:
            assert running.wait(20) == 0
            return "works"
    except WallError as error:
        assert error.hint
        return error.message


def test_warden_short_of_memory_is_said_and_leaves_nothing(
    jail: Builder, limiter: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    generation = jail(spec={"network": {"mode": "private"}})
    too_few, enough = 64, 64 * 1024
    said = []
    while enough - too_few > 4:
        middle = (too_few + enough) // 2
        outcome = attempt(generation, limiter, middle)
        assert (contain.running(), wardens(), list(places.run().iterdir())) == ((), set(), []), middle
        if outcome == "works":
            enough = middle
        else:
            too_few = middle
            said.append(outcome)
    # Too few for the program itself, then for the plan that it reads.
    assert said[0].startswith("the warden was ended by SIG")
    assert said[-1] == "the warden ended before the service was started"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == said.count(said[-1])
    assert {line.rpartition(": ")[2] for line in lines} == {"Out of memory"}
    assert attempt(generation, limiter, 64 * 1024) == "works"


@contextmanager
def little_memory(kibibytes: int) -> Iterator[Path]:
    """A control group of the test's own whose processes can have so much memory together."""
    layout = cgroups.layout()
    top = layout.controllers.get("memory")
    if top is None:
        pytest.skip("the controller `memory` cannot be used here: `stockade doctor` says why")
    group = Path(top) / f"stockade-tests-{os.getpid()}"
    group.mkdir()
    try:
        files = ("memory.limit_in_bytes",) if layout.version == 1 else ("memory.max", "memory.swap.max")
        for file, value in zip(files, (kibibytes << 10, 0), strict=False):
            (group / file).write_text(str(value))
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        assert until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def start(group: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python that joins the control group once everything is imported."""
    head = (
        "import sys\nfrom stockade import contain\nfrom stockade.contain import starting, failures, registry\n"
        "from stockade.errors import StockadeError\nopen(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + code, str(group)], capture_output=True, text=True, timeout=60, check=False
    )


STARTER = """
try:
    with contain.launch("test", argv=["/bin/true"]) as running:
        print("status", running.wait(20))
except StockadeError as error:
    print(error.message, "|", error.hint)
"""


def test_host_out_of_memory_while_a_jail_starts_leaves_nothing(jail: Builder) -> None:
    """The kernel kills whom it wants: the starter, which is the largest. The next start finds nothing in its way."""
    jail(spec={"network": {"mode": "private"}})
    outcomes = set()
    for kibibytes in (64, 256, 512, 32 * 1024):
        with little_memory(kibibytes) as group:
            done = start(group, STARTER)
            outcomes.add(done.stdout.strip() or f"signal {-done.returncode}")
            assert until(lambda: contain.running() == ())
            assert until(lambda: not (group / "cgroup.procs").read_text())
        contain.launch("test", argv=["/bin/true"]).close()
        assert list(places.run().iterdir()) == []
    assert outcomes == {"signal 9", "status 0"}


def join_on_launch(generation: Path, group: Path) -> None:
    """Have the warden, and so the jail, begin in that control group."""
    words = ("/bin/busybox", "sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', os.fspath(group))
    (generation / "wrapper").write_bytes(b"\0".join(map(os.fsencode, words)))


@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
def test_warden_that_is_killed_for_want_of_memory_is_said_and_leaves_nothing(jail: Builder, *, detach: bool) -> None:
    generation = jail(spec={"network": {"mode": "private"}})
    said = []
    for kibibytes in (*range(128, 1024, 64), 32 * 1024):
        with little_memory(kibibytes) as group:
            join_on_launch(generation, group)
            try:
                with contain.launch("test", argv=["/bin/sleep", "100"], detach=detach) as running:
                    running.kill()
                    said.append("started")
            except WallError as error:
                assert error.hint is not None
                assert "no memory is left" in f"{error.message} {error.hint}", (error.message, error.hint)
                said.append(error.message)
            assert (contain.running(), wardens()) == ((), set()), kibibytes
            assert until(lambda: not (group / "cgroup.procs").read_text())
    assert said[0].startswith("the warden was ")
    assert said[-1] == "started"


def test_service_that_is_killed_for_want_of_the_hosts_memory_is_told_and_restarted(jail: Builder) -> None:
    once = "touch /var/lib/data/once; exec /bin/busybox tail /dev/zero"
    script = f"test -e /var/lib/data/once || {{ {once}; }}; exec sleep 100"
    service = {"command": ["/bin/sh", "-c", script], "restart": "on-failure"}
    volume = LockDirectory(path="/var/lib/data", mode=0o755, volume="data")
    generation = jail(spec={"service": service}, directories=(volume,))
    with little_memory(16 * 1024) as group:
        join_on_launch(generation, group)
        contain.launch("test", detach=True).close()
        assert until(lambda: contain.find("test").restarts == 1 and contain.find("test").pid != 0)
        assert "the service's life ended (signal 9); restart 1" in log_path("test").read_text()
        contain.stop("test", timeout_s=0.2)
        assert (contain.running(), list(places.run().iterdir())) == ((), [])
