from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from samples import closure_of_tree, no_package, spec

from stockade import places
from stockade.build.generations import Store
from stockade.build.making import build
from stockade.build.verify import verify
from stockade.errors import BuildError, StateError
from stockade.records.closure import Closure

SOURCE = Path(__file__).resolve().parents[2] / "src"

pytestmark = pytest.mark.usefixtures("home", "as_root")


@pytest.fixture
def closure(tmp_path: Path) -> Closure:
    """A few hundred files, so that a build takes long enough to be hit."""
    for directory in range(20):
        below = tmp_path / f"source/d{directory}"
        below.mkdir(parents=True)
        for number in range(20):
            (below / f"f{number}").write_bytes(os.urandom(3000))
    return closure_of_tree(tmp_path / "source")


def run(closure: Closure) -> None:
    build(closure, spec(), store=Store("sample"), secrets={}, package_of=no_package)


def builder(closure: Closure, *, interruptible: bool = False) -> int:
    """Pid of a process that builds; it exits with 0, 3 when it was interrupted, 4 when another one builds."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler if interruptible else signal.SIG_IGN)
        run(closure)
        status = 0
    except KeyboardInterrupt:
        status = 3
    except StateError:
        status = 4
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Exit status of a process, which is killed when it does not end in time."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("a build did not end within 30 s")


def leftovers() -> list[str]:
    found = [*os.listdir(places.jail("sample")), *os.listdir(places.jail("sample") / "generations")]
    return [name for name in found if name.startswith(".")]


def duration_s(closure: Closure) -> float:
    start = time.monotonic()
    assert ended(builder(closure)) == 0
    return time.monotonic() - start


def sound() -> None:
    """Nothing half-made is there, and the current generation is whole."""
    assert leftovers() == []
    current = Store("sample").current()
    assert current is not None
    assert verify(current.rootfs, current.lock) == ()


@pytest.mark.slow
def test_a_build_killed_at_any_moment_leaves_the_jail_usable(closure: Closure) -> None:
    longest_s = duration_s(closure)
    chance = random.Random(1)
    rounds = killed = halves = 0
    while rounds < 20 or (rounds < 200 and (killed < 6 or halves < 3)):
        rounds += 1
        pid = builder(closure)
        time.sleep(chance.uniform(0, longest_s))
        os.kill(pid, signal.SIGKILL)
        killed += ended(pid) == -signal.SIGKILL
        halves += bool(leftovers())
        current = Store("sample").current()
        assert current is not None
        assert verify(current.rootfs, current.lock) == ()
        Store("sample").sweep()
        sound()
        for number in Store("sample").generations():
            generation = Store("sample").generation(number)
            assert verify(generation.rootfs, generation.lock) == ()
    assert killed >= 6
    assert halves >= 3
    before = Store("sample").current_number()
    run(closure)
    assert Store("sample").current_number() != before
    sound()


def test_an_interrupted_build_leaves_nothing_behind(closure: Closure) -> None:
    longest_s = duration_s(closure)
    chance = random.Random(2)
    rounds = interrupted = 0
    while rounds < 10 or (rounds < 100 and interrupted < 4):
        rounds += 1
        pid = builder(closure, interruptible=True)
        time.sleep(chance.uniform(0.005, longest_s))
        os.kill(pid, signal.SIGINT)
        interrupted += ended(pid) == 3
        sound()
    assert interrupted >= 4


def test_of_builds_at_the_same_time_one_wins_and_the_rest_say_so(closure: Closure) -> None:
    run(closure)
    statuses = [ended(pid) for pid in [builder(closure) for _ in range(4)]]
    assert set(statuses) == {0, 4}
    assert Store("sample").generations() == tuple(range(1, 2 + statuses.count(0)))[-3:]
    sound()


FULL_DISK = """
import json, sys
from pathlib import Path
from samples import closure_of_tree, no_package, spec
from stockade.build.making import build
from stockade.build.generations import Store
from stockade.build.verify import verify
from stockade.errors import BuildError

def run(tree):
    build(closure_of_tree(Path(tree)), spec(), store=Store("sample"), secrets={}, package_of=no_package)

small, large = sys.argv[1:]
run(small)
messages = []
for _ in range(2):
    try:
        run(large)
    except BuildError as error:
        messages.append([error.message, error.hint])
current = Store("sample").current()
names = [path.name for path in (Store("sample").directory / "generations").iterdir()]
print(json.dumps([messages, verify(current.rootfs, current.lock), current.number, names]))
"""


@pytest.mark.parametrize("limit", ["size=2m", "nr_inodes=60"])
def test_a_full_disk_is_said_and_leaves_the_jail_usable(limit: str, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small/x").write_text("x")
    (tmp_path / "large").mkdir()
    for number in range(60):
        (tmp_path / f"large/{number}").write_bytes(os.urandom(100_000))
    home = tmp_path / "disk"
    home.mkdir()
    script = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
    done = subprocess.run(
        [
            "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", limit, home,
            sys.executable, "-c", FULL_DISK, tmp_path / "small", tmp_path / "large",
        ],
        env={**os.environ, "PYTHONPATH": f"{SOURCE}:{Path(__file__).parent}", "STOCKADE_HOME": str(home)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    messages, differences, number, names = json.loads(done.stdout)
    message = f"no space is left for the new root below `{home}/state/jails/sample`"
    assert messages == [[message, "free some and build again; the generation before is untouched"]] * 2
    assert (differences, number, names) == ([], 1, ["0001"])


def test_a_write_error_that_shows_only_at_the_end_is_no_success(
    closure: Closure, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(closure)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("stockade.build.generations.syncfs", fail)
    with pytest.raises(BuildError, match="cannot be made: .*Input/output error"):
        run(closure)
    assert Store("sample").current_number() == 1
    assert leftovers() == []
