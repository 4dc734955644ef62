"""What is killed, missing or exhausted: a clear word, nothing lost, nothing left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from conftest import Builder
from processes import children, descriptors, exists, until, wardens

from stockade import contain, places
from stockade.build.generations import Store
from stockade.contain.starting import log_path
from stockade.errors import HostError, SpecError, StateError
from stockade.kernel import cgroups

WRITER = "i=0; while :; do i=$((i+1)); echo line $i; echo $i > /run/count; done"


def count(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/root/run/count").read_text() or 0)
    except (OSError, ValueError):
        return 0


def test_service_that_logs_outlives_a_killed_supervisor(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", WRITER]}})
    running = contain.launch("test", detach=True)
    assert until(lambda: count(running.init_pid) > 100)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    assert until(lambda: not exists(running.supervisor_pid))
    before = count(running.init_pid)
    # Far more than a pipe holds: without a reader the service would have got SIGPIPE, or would stand still.
    assert until(lambda: count(running.init_pid) > before + 20_000, seconds=60)
    found = contain.find("test")
    assert (found.pid, found.supervisor_pid) == (running.pid, 0)
    contain.stop("test", timeout_s=0.2)
    assert not exists(running.init_pid)
    assert list(places.run().iterdir()) == []
    running.close()


def test_signal_reaches_a_service_that_floods_its_log_without_a_supervisor(jail: Builder) -> None:
    """strace(1) delays each read, so that the pipe is full again before the next."""
    if shutil.which("strace") is None:
        pytest.skip("`apt-get install strace`: it slows the jail's first process down")
    jail(spec={"service": {"command": ["/bin/sh", "-c", "exec dd if=/dev/zero bs=1M"]}})
    running = contain.launch("test", detach=True)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    assert until(lambda: not exists(running.supervisor_pid))
    command = ["strace", "-p", str(running.init_pid), "-e", "trace=read", "-e", "inject=read:delay_enter=5000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            assert tracer.stderr is not None
            assert len(list(islice(tracer.stderr, 20))) == 20
            os.kill(running.init_pid, signal.SIGTERM)
            assert len(list(islice(tracer.stderr, 200))) < 200, "it reads on, and heeds no signal"
        finally:
            tracer.kill()
    assert not exists(running.init_pid)
    assert contain.running() == ()
    running.close()


def test_generation_of_a_jail_whose_supervisor_was_killed_is_not_pruned(jail: Builder) -> None:
    command = ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/var/lib/data"]
    generation = jail(spec={"service": {"command": command}, "network": {"mode": "private"}})
    running = contain.launch("test", detach=True)
    fetch = ["/bin/busybox", "wget", "-q", "-O", "-", "http://127.0.0.1/seed"]

    def served() -> str:
        with contain.enter("test", argv=fetch, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
            assert client.stdout is not None
            return client.stdout.read().decode()

    assert until(lambda: served() == "from the rootfs\n")
    os.kill(running.supervisor_pid, signal.SIGKILL)
    assert until(lambda: not exists(running.supervisor_pid))
    store = Store("test", keep=1)
    for _ in range(4):
        with store.new() as building:
            building.commit()
    assert store.generations() == (1, 5)
    assert served() == "from the rootfs\n"
    with pytest.raises(StateError, match="generation 1 of jail `test` is in use"):
        store.remove()
    contain.stop("test", timeout_s=1)
    assert store.prune(1) == (1,)
    assert not generation.exists()
    running.close()


def test_first_process_holds_one_end_of_a_pipe_one_socket_and_the_lock_of_its_generation(jail: Builder) -> None:
    generation = jail(spec={"service": {"command": ["/bin/sleep", "100"]}})
    contain.launch("test", detach=True).close()
    found = contain.find("test")
    assert until(lambda: len(descriptors(found.init_pid)) == 3)
    held = sorted(target.partition(":")[0] for target in descriptors(found.init_pid).values())
    assert held == [str(places.use(generation)), "pipe", "socket"]
    assert set(descriptors(found.pid).values()).isdisjoint(
        target for target in descriptors(found.init_pid).values() if target.startswith("socket")
    )


def test_log_is_whole_while_the_supervisor_lives(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", "seq 1 20000"]}})
    contain.launch("test", detach=True).close()
    assert until(lambda: contain.running() == ())
    assert b"".join(contain.logs("test")).decode().split() == [str(number) for number in range(1, 20001)]


def test_restarting_jail_whose_supervisor_was_killed_is_stopped(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"], "restart": "always"}})
    running = contain.launch("test", detach=True)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    assert until(lambda: not exists(running.supervisor_pid))
    assert contain.find("test").supervisor_pid == 0
    contain.stop("test", timeout_s=1)
    assert not exists(running.init_pid)
    assert (contain.running(), list(places.run().iterdir())) == ((), [])
    running.close()


def test_killed_first_process_leaves_nothing(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", "sleep 100 & sleep 100"]}})
    running = contain.launch("test", detach=True)
    assert until(lambda: len(contain.find("test").processes()) >= 3)
    inside = contain.find("test").processes()
    os.kill(running.init_pid, signal.SIGKILL)
    assert until(lambda: not any(exists(pid) for pid in (*inside, running.supervisor_pid)))
    assert contain.running() == ()
    assert [ended.status for ended in contain.ended()] == [128 + signal.SIGKILL]
    running.close()


def helpers(supervisor: int) -> list[int]:
    """Children of the supervisor that are not the jail's first process."""
    init = contain.find("test").init_pid
    return [pid for pid in children(supervisor) if pid != init]


def served(jail: Builder) -> tuple[contain.RunningJail, int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    command = ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/var/lib/data"]
    jail(spec={"service": {"command": command}, "network": {"mode": "private", "publish": [f"{port}:80"]}})
    contain.launch("test", detach=True).close()
    assert until(lambda: answers(port))
    return contain.find("test"), port


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(b"GET /seed HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: client.recv(4096), b"")).endswith(b"from the rootfs\n")
    except OSError:
        return False


def test_killed_network_helper_is_told_and_cured_by_a_restart(jail: Builder) -> None:
    found, port = served(jail)
    [helper] = helpers(found.supervisor_pid)
    assert not found.helper_lost
    os.kill(helper, signal.SIGKILL)
    assert until(lambda: contain.find("test").helper_lost)
    assert exists(found.pid)
    assert not answers(port)
    assert until(lambda: "network helper" in log_path("test").read_text())
    contain.stop("test")
    contain.launch("test", detach=True).close()
    assert until(lambda: answers(port))
    assert not contain.find("test").helper_lost


def test_port_is_free_once_the_jail_is_stopped(jail: Builder) -> None:
    found, port = served(jail)
    [helper] = helpers(found.supervisor_pid)
    contain.stop("test")
    assert not exists(helper)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_published_port_in_use_is_said_by_name(jail: Builder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        jail(spec={"network": {"mode": "private", "publish": [f"{port}:80"]}})
        said = rf"cannot publish 127.0.0.1 port {port}/tcp: Address already in use"
        with pytest.raises(HostError, match=said) as error:
            contain.launch("test", detach=True)
        assert error.value.hint is not None and f"sport = {port}" in error.value.hint
    assert (wardens(), contain.running()) == (set(), ())


def test_many_starts_at_once_give_one_jail(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"]}})
    outcomes: list[str] = []

    def start() -> None:
        try:
            contain.launch("test", detach=True).close()
            outcomes.append("started")
        except StateError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["jail `test` is already running"] * 7 + ["started"]
    assert len(contain.running()) == 1


@contextmanager
def few_processes(most: int) -> Iterator[Path]:
    """A control group of the test's own in which `most` processes can be."""
    top = cgroups.layout().controllers.get("pids")
    if top is None:
        pytest.skip("the controller `pids` cannot be used here: `stockade doctor` says why")
    group = Path(top) / f"stockade-tests-{os.getpid()}"
    group.mkdir()
    try:
        (group / "pids.max").write_text(str(most))
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


STARTER = """
import os, sys
from stockade import contain
from stockade.errors import StockadeError
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
try:
    with contain.launch("test", argv=["/bin/true"]) as running:
        print("status", running.wait(20))
except StockadeError as error:
    print(error.message, "|", error.hint)
print("left", [jail.instance for jail in contain.running()])
"""


def test_host_without_a_free_process_is_said_and_nothing_is_left(jail: Builder) -> None:
    jail(spec={"network": {"mode": "private", "publish": []}})
    said = []
    for most in range(1, 8):
        with few_processes(most) as group:
            done = subprocess.run(
                [sys.executable, "-c", STARTER, str(group)], capture_output=True, text=True, timeout=60, check=False
            )
        assert done.returncode == 0, done.stderr
        first, left = done.stdout.splitlines()
        assert left == "left []"
        assert list(places.run().glob("*/state")) == []
        said.append(first)
    assert said[-1] == "status 0"
    failed = [line for line in said if not line.startswith("status")]
    assert len(failed) >= 2
    assert all("no further process" in line or "EAGAIN" in line for line in failed), failed
    assert all(not line.endswith("| None") for line in failed), failed


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"memory": "0"}, "`limits.memory` is `0`"), ({"memory": "4K"}, "`limits.memory` is `4K`"),
        ({"memory": "99999999T"}, "`limits.memory` is `99999999T`"),
        ({"processes": 99_999_999}, "more than the 4194304 that a kernel can have"),
        ({"cpus": 0.0001}, "`limits.cpus` is `0.0001`"), ({"cpus": 1e9}, "`limits.cpus` is `1000000000.0`"),
        ({"io_read": "0"}, "`limits.io_read` is `0`"),
    ],
)  # fmt: skip
def test_limit_that_no_kernel_takes_is_refused_by_name(jail: Builder, limits: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said) as error:
        jail(spec={"limits": limits})
    assert error.value.hint


def test_thousand_file_descriptors_of_the_caller_do_not_reach_the_jail(jail: Builder) -> None:
    jail()
    kept = [os.open("/", os.O_RDONLY) for _ in range(300)]
    try:
        with contain.launch("test", argv=["/bin/ls", "/proc/self/fd"], stdout=-1) as running:
            assert running.stdout is not None
            assert len(running.stdout.read().split()) == 4
    finally:
        for descriptor in kept:
            os.close(descriptor)


def test_starter_killed_at_any_moment_leaves_no_jail(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"]}})
    code = "from stockade import contain\nprint('now', flush=True)\ncontain.launch('test').wait()\n"
    for turn in range(8):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as starter:
            assert starter.stdout is not None
            starter.stdout.readline()
            time.sleep(turn * 0.004)
            starter.kill()
        assert until(lambda: contain.running() == ())
    contain.launch("test", detach=True).close()
    contain.stop("test", timeout_s=0.2)
    assert list(places.run().iterdir()) == []
