"""The Python interface, as a program uses it: real jails, input, output, time limits, threads, asyncio."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import stockade
from stockade import contain as walls
from stockade.errors import NotFoundError, StateError, UsageError
from stockade.records.spec import Exercise, Files, Ready, Service, Spec

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run as root: the jails get ids of their own")

SOURCE = Path(__file__).resolve().parents[1] / "src"
SERVER = ("/usr/bin/python3", "-m", "http.server", "--bind", "127.0.0.1", "8000")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Stockade home with two jails: `tools`, and `web` with a server."""
    directory = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOCKADE_HOME", str(directory))
        tools = Spec(
            name="tools", service=Service(command=("/bin/true",)),
            files=Files(programs=("true", "false", "cat", "sh", "sleep", "env", "id", "pwd", "head", "ls")),
        )  # fmt: skip
        stockade.Jail("tools").build(tools)
        web = Spec(
            name="web", service=Service(command=SERVER, user="nobody", directory="/srv", ready=Ready(tcp=8000)),
            files=Files(content={"/srv/index.html": "hello\n"}),
            exercises=(Exercise(command=("curl", "-fsS", "http://127.0.0.1:8000/"), stdout="hello"),),
        )  # fmt: skip
        stockade.Jail("web").build(web)
        yield directory
        for jail in walls.running():
            walls.stop(jail.instance, timeout_s=0.1)


@pytest.fixture
def tools(home: Path) -> stockade.Jail:
    return stockade.Jail("tools")


@pytest.fixture(autouse=True)
def nothing_is_left(home: Path) -> Iterator[None]:
    """No jail, descriptor, child or runtime directory stays after a test."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert [jail.instance for jail in walls.running()] == []
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # the one that lists
    assert [path.name for path in (home / "run").iterdir() if "@" in path.name] == []


def test_two_lines_run_a_command_behind_the_walls() -> None:
    result = stockade.run(["/usr/bin/python3", "-c", "import os; print(os.getpid(), os.path.exists('/etc/shadow'))"])
    assert result.check().stdout == b"2 False\n"


def test_input_output_and_status_are_the_commands(tools: stockade.Jail) -> None:
    result = tools.run(["/bin/sh", "-c", "cat; echo err >&2; exit 5"], data=b"given")
    assert (result.status, result.stdout, result.stderr) == (5, b"given", b"err\n")
    assert result.arguments == ("/bin/sh", "-c", "cat; echo err >&2; exit 5")


def test_a_megabyte_goes_through_in_both_directions(tools: stockade.Jail) -> None:
    data = os.urandom(1 << 20)
    assert tools.run(["/bin/cat"], data=data, timeout_s=20).stdout == data


def test_check_raises_a_fault_of_the_program(tools: stockade.Jail) -> None:
    with pytest.raises(stockade.ProgramError, match="ended with status 3") as caught:
        tools.run(["/bin/sh", "-c", "echo why >&2; exit 3"]).check()
    assert (caught.value.status, caught.value.hint) == (3, "it said: why")
    assert not isinstance(caught.value, stockade.WallError)


def test_a_program_that_is_missing_is_a_fault_of_the_walls(tools: stockade.Jail) -> None:
    with pytest.raises(stockade.WallError, match="cannot execute `/bin/nothing`") as caught:
        tools.run(["/bin/nothing"])
    assert caught.value.exit_code == 127


def test_a_jail_that_was_not_built_is_told(home: Path) -> None:
    with pytest.raises(NotFoundError, match="jail `nowhere` has not been built"):
        stockade.Jail("nowhere").run(["/bin/true"])


def test_a_time_limit_ends_everything(tools: stockade.Jail) -> None:
    before = time.monotonic()
    with pytest.raises(stockade.ProgramTimeoutError, match="did not end within 0.3 s"):
        tools.run(["/bin/sh", "-c", "sleep 60 & sleep 60"], timeout_s=0.3)
    assert time.monotonic() - before < 5


def test_what_was_written_before_the_time_ran_out_is_read_without_a_hang(tools: stockade.Jail) -> None:
    with pytest.raises(stockade.ProgramTimeoutError):
        tools.run(["/bin/sh", "-c", "head -c 300000 /dev/zero; sleep 60"], timeout_s=0.5)


def test_a_process_left_behind_does_not_keep_the_caller(tools: stockade.Jail) -> None:
    before = time.monotonic()
    assert tools.run(["/bin/sh", "-c", "sleep 60 & echo done"], timeout_s=20).stdout == b"done\n"
    assert time.monotonic() - before < 5


def test_environment_directory_and_user_are_as_asked(tools: stockade.Jail) -> None:
    result = tools.run(["/bin/sh", "-c", "pwd; echo $GIVEN; id -u"], environment={"GIVEN": "yes"}, directory="/tmp")
    assert result.stdout == b"/tmp\nyes\n0\n"


def test_a_service_lives_for_the_length_of_a_block(home: Path) -> None:
    with stockade.Jail("web").service() as running:
        command = ["nsenter", "--net", f"--target={running.init_pid}", "curl", "-fsS", "--retry", "20",
                   "--retry-connrefused", "--retry-delay", "0", "http://127.0.0.1:8000/"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout == "hello\n"
        with pytest.raises(StateError, match="jail `web` is already running"):
            stockade.Jail("web").start()
    assert walls.running() == ()


def test_a_service_ends_when_its_block_raises(home: Path) -> None:
    with pytest.raises(ZeroDivisionError), stockade.Jail("web").service():
        raise ZeroDivisionError
    assert walls.running() == ()


def test_execute_runs_behind_the_walls_of_the_service(home: Path) -> None:
    jail = stockade.Jail("web")
    with jail.service():
        script = "import os; print(os.getuid(), os.getpid() > 2, os.path.exists('/etc/hostname'))"
        assert jail.execute([SERVER[0], "-c", script]).check().stdout == b"65534 True False\n"
    with pytest.raises(NotFoundError):
        jail.execute([SERVER[0], "-c", script])


def test_many_threads_start_jails_at_once(tools: stockade.Jail) -> None:
    def one(number: int) -> bytes:
        return tools.run(["/bin/sh", "-c", f"echo {number}"], timeout_s=30).stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(24))) == [f"{number}\n".encode() for number in range(24)]


def test_it_works_from_a_process_of_a_gigabyte(home: Path) -> None:
    script = (
        "import stockade, sys\n"
        "held = bytearray(1 << 30)\n"
        "held[::4096] = b'x' * len(held[::4096])\n"
        "print(stockade.Jail('tools').run(['/bin/cat'], data=b'fine').stdout)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("b'fine'\n", "")


def test_asyncio_runs_jails_side_by_side(tools: stockade.Jail) -> None:
    async def together() -> list[bytes]:
        jobs = [tools.run_async(["/bin/sh", "-c", f"sleep 0.3; echo {number}"]) for number in range(4)]
        return [result.stdout for result in await asyncio.gather(*jobs)]

    before = time.monotonic()
    assert asyncio.run(together()) == [b"0\n", b"1\n", b"2\n", b"3\n"]
    assert time.monotonic() - before < 4 * 0.3 + 2


def test_cancelling_a_task_ends_its_jail(tools: stockade.Jail) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(stockade.run_async(["/bin/sleep", "60"]))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = time.monotonic()
    asyncio.run(cancelled())
    assert time.monotonic() - before < 10


def test_a_pool_gives_each_run_a_jail_of_its_own(home: Path) -> None:
    with stockade.Pool("tools", ["/bin/sh", "-c", "cat; ls /tmp; : > /tmp/mark"], size=2) as pool:
        assert [pool.run(data=text).stdout for text in (b"1", b"2", b"3")] == [b"1", b"2", b"3"]


def test_a_pool_that_was_not_used_leaves_nothing(home: Path) -> None:
    with stockade.Pool("tools", ["/bin/cat"], size=3):
        assert len(walls.running()) == 3
    with pytest.raises(UsageError, match="a pool of 0 jails"):
        stockade.Pool("tools", ["/bin/cat"], size=0)


@pytest.mark.parametrize("size", ["64M", "600M"])
def test_a_memory_limit_holds(size: str) -> None:
    script = "x = bytearray(200 << 20); x[::4096] = b'x' * len(x[::4096])"
    done = stockade.run(["/usr/bin/python3", "-c", script], memory=size, timeout_s=30)
    assert (done.status, done.memory_kills) == ((137, 1) if size == "64M" else (0, 0))
    if done.memory_kills:
        with pytest.raises(stockade.ProgramError) as caught:
            done.check()
        assert "for want of memory" in (caught.value.hint or "")


@pytest.mark.slow
def test_the_interface_is_typed(tmp_path: Path) -> None:
    mypy = shutil.which("mypy", path=os.path.dirname(sys.executable))
    if mypy is None:
        pytest.skip("`pip install mypy` in the environment of the tests")
    script = tmp_path / "user.py"
    script.write_text(
        "import stockade\n"
        "result: stockade.Completed = stockade.run(['true'])\n"
        "text: str = result.stdout\n"
    )
    done = subprocess.run(
        [mypy, "--strict", str(script)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "MYPYPATH": str(SOURCE), "MYPY_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.stdout.splitlines()[0].endswith(
        'error: Incompatible types in assignment (expression has type "bytes", variable has type "str")  [assignment]'
    )
