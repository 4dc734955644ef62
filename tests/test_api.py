"""The Python interface, as a program uses it: real jails, input, output, time limits, threads, asyncio."""

from __future__ import annotations

import asyncio
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import stockade
from stockade import contain as walls
from stockade import contained
from stockade.contain import starting
from stockade.contain.communicate import PIPES, communicate
from stockade.errors import HostError, NotFoundError, StateError, UsageError
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


EIGHT = """
import os, time
for _ in range(3):
    os.fork()
print("up", flush=True)
time.sleep(60)
"""


def test_a_time_limit_ends_what_an_executed_command_has_started_and_nothing_else_in_the_jail(home: Path) -> None:
    jail = stockade.Jail("web")
    detached = "import os, time; os.fork() or time.sleep(60)"
    with jail.service() as running:
        jail.execute([SERVER[0], "-c", detached]).check()
        before = set(running.processes())
        assert len(before) == 3
        with pytest.raises(stockade.ProgramTimeoutError) as caught:
            jail.execute([SERVER[0], "-c", EIGHT], timeout_s=5)
        assert caught.value.stdout == b"up\n" * 8
        end = time.monotonic() + 5
        while set(running.processes()) != before and time.monotonic() < end:
            time.sleep(0.01)
        assert set(running.processes()) == before


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
def test_the_interface_is_typed_where_it_is_installed(tmp_path: Path) -> None:
    mypy = shutil.which("mypy", path=os.path.dirname(sys.executable))
    if mypy is None:
        pytest.skip("`pip install mypy` in the environment of the tests")
    script = tmp_path / "user.py"
    script.write_text(
        "import stockade\n"
        "result: stockade.Completed = stockade.run(['true'])\n"
        "text: str = result.stdout\n"
        "stockade.nothing_of_the_kind\n"
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], timeout=60, check=True)
    packages = next((tmp_path / "venv/lib").glob("python3*/site-packages"))
    shutil.copytree(SOURCE / "stockade", packages / "stockade", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [mypy, "--strict", "--python-executable", tmp_path / "venv/bin/python", "--config-file=", script],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env={**os.environ, "MYPY_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    said = [line.partition("error: ")[2] for line in done.stdout.splitlines()]
    assert said[:2] == [
        'Incompatible types in assignment (expression has type "bytes", variable has type "str")  [assignment]',
        'Module has no attribute "nothing_of_the_kind"  [attr-defined]',
    ], done.stdout


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """More open descriptors than select(2) can tell of."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("raise the hard limit of open files: `ulimit -Hn 4096`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < 1100:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_works_from_a_process_with_many_descriptors(tools: stockade.Jail, many_descriptors: None) -> None:
    assert tools.run(["/bin/cat"], data=b"in", timeout_s=30).stdout == b"in"
    with pytest.raises(stockade.ProgramTimeoutError):
        tools.run(["/bin/sleep", "60"], timeout_s=0.2)


def test_a_want_of_descriptors_is_told_and_leaves_none_open(tools: stockade.Jail) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = set(os.listdir("/proc/self/fd"))
    worked = failed = 0
    try:
        for room in range(40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + room, hard))
            try:
                worked += tools.run(["/bin/true"]).status == 0
            except (HostError, stockade.WallError) as error:
                failed += 1
                assert "too many open files" in str(error) and "`ulimit -n`" in (error.hint or "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert worked and failed
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1


def test_a_time_limit_may_be_as_long_as_one_likes(tools: stockade.Jail) -> None:
    for seconds in (1e12, float("inf")):
        assert tools.run(["/bin/sh", "-c", "sleep 0.1; echo x"], timeout_s=seconds).stdout == b"x\n"


def test_what_was_written_before_the_time_ran_out_is_told(tools: stockade.Jail) -> None:
    with pytest.raises(stockade.ProgramTimeoutError) as caught:
        tools.run(["/bin/sh", "-c", "echo out; echo err >&2; sleep 60"], timeout_s=3)
    assert (caught.value.stdout, caught.value.stderr) == (b"out\n", b"err\n")
    assert vars(pickle.loads(pickle.dumps(caught.value))) == vars(caught.value)


def test_arguments_that_are_too_long_are_told_as_such(tools: stockade.Jail) -> None:
    with pytest.raises(stockade.WallError, match="its arguments and environment are too long"):
        tools.run(["/bin/true", "x" * 200_000])


def test_a_result_can_be_pickled(tools: stockade.Jail) -> None:
    done = tools.run(["/bin/sh", "-c", "echo x; exit 3"])
    assert pickle.loads(pickle.dumps(done)) == done


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"command": "ls -l"}, "the command 'ls -l' is one string"),
        ({"command": []}, "no command was given"),
        ({"read": "/srv"}, "`read` is one path"),
        ({"write": Path("/srv")}, "`write` is one path"),
        ({"read": [""]}, "a path to open up is empty"),
        ({"network": "lan"}, "there is no network 'lan'"),
        ({"memory": "lots"}, "`memory='lots'` is no size"),
        ({"memory": 1 << 20}, "`memory=1048576` is no size"),
        ({"processes": 0}, "`processes=0` leaves nothing"),
        ({"cpus": -1}, "`cpus=-1` leaves nothing"),
    ],
)
def test_a_mistake_in_a_call_is_told(home: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        stockade.run(**{"command": ["/bin/true"], **wrong})
    assert str(caught.value).startswith(message)
    assert caught.value.hint


def test_no_two_launches_of_a_process_share_a_number() -> None:
    assert len({starting._serial() for _ in range(3000)}) == 3000


def test_asyncio_needs_none_of_the_loops_own_threads(tools: stockade.Jail) -> None:
    async def beside_a_busy_loop() -> bytes:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        done = threading.Event()
        busy = loop.run_in_executor(None, done.wait, 60)
        try:
            return (await asyncio.wait_for(tools.run_async(["/bin/cat"], data=b"x"), 30)).stdout
        finally:
            done.set()
            await busy

    assert asyncio.run(beside_a_busy_loop()) == b"x"


def test_cancelling_twice_while_it_starts_ends_the_jail_too(tools: stockade.Jail) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(tools.run_async(["/bin/sleep", "60"]))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = time.monotonic()
    asyncio.run(cancelled())
    assert time.monotonic() - before < 30


def test_threads_share_a_pool(home: Path) -> None:
    with stockade.Pool("tools", ["/bin/cat"], size=2) as pool, ThreadPoolExecutor(8) as threads:
        words = [str(number).encode() for number in range(24)]
        assert list(threads.map(lambda word: pool.run(data=word).stdout, words)) == words


def test_a_prepared_jail_that_was_ended_is_passed_over(home: Path) -> None:
    with stockade.Pool("tools", ["/bin/cat"], size=2) as pool:
        for jail in walls.running():
            walls.stop(jail.instance, timeout_s=0)
        assert pool.run(data=b"x", timeout_s=30).stdout == b"x"


def test_a_forked_child_has_a_pool_of_its_own(home: Path) -> None:
    """It lives on while its parent's jails are fed: its copies of their pipes must not keep the input open."""
    reader, writer = os.pipe()
    hold, release = os.pipe()
    with stockade.Pool("tools", ["/bin/cat"], size=2) as pool:
        child = os.fork()
        if child == 0:
            try:
                os.close(release)
                text = b"".join(pool.run(data=b"child", timeout_s=30).stdout for _ in range(3))
                pool.close()
                os.write(writer, text)
                os.read(hold, 1)
            finally:
                os._exit(0)
        os.close(hold)
        os.close(writer)
        try:
            assert os.read(reader, 100) == b"child" * 3
            assert len(walls.running()) == 2
            assert [pool.run(data=b"parent", timeout_s=30).stdout for _ in range(3)] == [b"parent"] * 3
        finally:
            os.close(release)
            os.waitpid(child, 0)
            os.close(reader)


def test_a_jail_that_nobody_refers_to_ends(home: Path) -> None:
    lost = walls.launch("tools", argv=["/bin/sleep", "60"])
    warden = lost.supervisor_pid
    del lost
    assert os.waitpid(warden, 0)[0] == warden


def test_a_root_that_a_command_runs_from_is_not_forgotten(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contained, "_KEPT", 1)
    command = ["/bin/sh", "-c", "read word; cat /etc/passwd"]
    with contained.start(command, contained.Options(network="host"), **PIPES) as running:
        for path in ("/usr/bin", "/usr/lib", "/usr/share"):
            assert stockade.run(["/bin/true"], read=[path]).status == 0
        output = communicate(running, b"go\n", timeout_s=30)
    assert output.stdout.startswith(b"root:"), output.stderr
    kept = [entry for entry in (home / "run/.contain").iterdir() if entry.name.startswith(".")]
    assert kept == []


def test_the_public_names_are_there_to_be_found() -> None:
    assert set(stockade.__all__) <= set(dir(stockade))
