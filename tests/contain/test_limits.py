"""A jail at its limit hurts only itself: a neighbour answers every request meanwhile. Bounded by what is tested."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Builder, output
from processes import exists, until

from stockade import contain, places
from stockade.kernel import cgroups
from stockade.records.lock import LockDirectory

TMPFS = (LockDirectory(path="/run", mode=0o755), LockDirectory(path="/tmp", mode=0o1777))
VOLUME = LockDirectory(path="/var/lib/data", mode=0o755, volume="data")


def needs(controller: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        controller not in cgroups.layout().controllers,
        reason=f"the controller `{controller}` cannot be used here: `stockade doctor` says why",
    )


def groups(name: str) -> list[Path]:
    """Control groups of the jail `name` that are there, whichever version."""
    return sorted(
        path for top in set(cgroups.layout().controllers.values()) for path in Path(top).glob(f"stockade-{name}-*")
    )


class Neighbour:
    """A web server in a jail of its own, and a client that counts what it answers."""

    def __init__(self, jail: Builder) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        command = ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/var/lib/data"]
        network = {"mode": "private", "publish": [f"{self.port}:80"]}
        jail("neighbour", {"service": {"command": command}, "network": network})
        contain.launch("neighbour", detach=True).close()
        self.answered = 0
        self.failed: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask_on)

    def ask(self) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as client:
            client.sendall(b"GET /seed HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: client.recv(4096), b""))

    def _ask_on(self) -> None:
        while not self._ended.is_set():
            try:
                answer = self.ask()
            except OSError as error:
                self.failed.append(str(error))
                continue
            if answer.endswith(b"from the rootfs\n"):
                self.answered += 1
            else:
                self.failed.append(repr(answer))
            time.sleep(0.01)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """A block during which every request must be answered, and many are made."""
        assert until(lambda: self._is_up())
        self._thread.start()
        try:
            yield
            time.sleep(0.2)
        finally:
            self._ended.set()
            self._thread.join(30)
        assert self.failed == []
        assert self.answered > 10

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError):
            return self.ask().endswith(b"from the rootfs\n")
        return False


@pytest.fixture
def neighbour(jail: Builder) -> Neighbour:
    return Neighbour(jail)


@needs("pids")
def test_fork_bomb_stops_at_its_limit(jail: Builder, neighbour: Neighbour) -> None:
    # Each fork leaves something, or the bomb would burn out: a shell that cannot fork ends.
    bomb = "b() { b & sleep 100 & b; }; (b); exec sleep 100"
    jail(spec={"service": {"command": ["/bin/sh", "-c", bomb]}, "limits": {"processes": 40}})
    with neighbour.serving():
        contain.launch("test", detach=True).close()
        most = 0
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with contextlib.suppress(Exception):
                most = max(most, contain.find("test").usage().processes or 0)
            time.sleep(0.02)
        contain.stop("test", timeout_s=0.1)
    # A shell that cannot fork ends, so the height of it may pass between two looks; the sleeps stay.
    assert 10 <= most <= 41
    assert any("fork" in line for line in b"".join(contain.logs("test")).decode().splitlines())
    assert groups("test") == []


@needs("memory")
def test_memory_beyond_the_limit_ends_only_who_takes_it(jail: Builder, neighbour: Neighbour) -> None:
    jail(spec={"limits": {"memory": "16M"}})
    with neighbour.serving():
        code, _, _ = output("test", "/bin/dd", "if=/dev/zero", "of=/tmp/x", "bs=1M", "count=64")
        with contain.launch("test", argv=["/bin/dd", "if=/dev/zero", "of=/tmp/x", "bs=1M", "count=64"]) as running:
            assert running.wait(10) == 128 + signal.SIGKILL
            assert running.memory_kills == 1
    assert code == 128 + signal.SIGKILL
    assert output("test", "/bin/dd", "if=/dev/zero", "of=/tmp/x", "bs=1M", "count=8")[0] == 0
    assert groups("test") == []


@needs("memory")
def test_kill_at_the_memory_limit_is_told_in_the_log(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/busybox", "tail", "/dev/zero"]}, "limits": {"memory": "16M"}})
    contain.launch("test", detach=True).close()
    said = "the kernel killed 1 of the jail's processes for want of memory"
    end = time.monotonic() + 20
    while said not in b"".join(contain.logs("test")).decode() and time.monotonic() < end:
        time.sleep(0.05)
    assert said in b"".join(contain.logs("test")).decode()


@needs("cpu")
def test_cpu_time_is_what_the_limit_gives(jail: Builder, neighbour: Neighbour) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", "while :; do :; done"]}, "limits": {"cpus": 0.2}})
    with neighbour.serving():
        contain.launch("test", detach=True).close()
        before = contain.find("test").usage().cpu_seconds or 0
        time.sleep(2)
        used = (contain.find("test").usage().cpu_seconds or 0) - before
        contain.stop("test", timeout_s=0.1)
    assert 0.05 < used < 0.7, used


@pytest.mark.slow
@needs("blkio")
def test_direct_writes_are_as_slow_as_the_limit_says(jail: Builder) -> None:
    command = ["/bin/dd", "if=/dev/zero", "of=/var/lib/data/x", "bs=1M", "count=3", "oflag=direct"]
    seconds = {}
    for name, limits in (("free", {}), ("slow", {"io_write": "1M"})):
        generation = jail(name, {"limits": limits}, directories=(*TMPFS, VOLUME))
        if cgroups.disk_of(generation) is None:
            pytest.skip("this test's directory is on no single disk: set `--basetemp` to one that is")
        begun = time.monotonic()
        assert output(name, *command)[0] == 0
        seconds[name] = time.monotonic() - begun
    assert seconds["slow"] > 1.8 > seconds["free"], seconds


def test_least_number_of_open_files_does_not_hinder_the_launch(jail: Builder) -> None:
    jail(spec={"limits": {"open_files": 3}})
    assert output("test", "/bin/echo", "hi") == (0, "hi\n", "")


def test_descriptors_run_out_inside_only(jail: Builder, neighbour: Neighbour) -> None:
    jail(spec={"limits": {"open_files": 20}})
    script = 'n=3; while eval "exec $n< /dev/null"; do n=$((n+1)); test $n -lt 100 || break; done 2>/dev/null; echo $n'
    with neighbour.serving():
        code, out, err = output("test", "/bin/sh", "-c", f"({script}); ulimit -n")
    assert "20" in out.split(), (code, out, err)
    assert "100" not in out.split()


def test_full_tmpfs_is_full_inside_only(jail: Builder, neighbour: Neighbour) -> None:
    directories = {"/tmp": {"mode": "1777", "size": "1M", "inodes": 30}}
    jail(spec={"directories": directories}, directories=TMPFS)
    fill = "dd if=/dev/zero of=/tmp/x bs=64k count=100; rm -f /tmp/x; for n in $(seq 100); do touch /tmp/$n; done"
    with neighbour.serving():
        _, _, err = output("test", "/bin/sh", "-c", fill)
    assert err.count("No space left on device") >= 2
    assert os.statvfs(places.jail("test")).f_bavail > 0


def test_volume_on_a_file_system_of_its_own_has_its_size(jail: Builder) -> None:
    jail(directories=(*TMPFS, VOLUME))
    volume = places.jail("test") / "volumes/data"
    owner = volume.stat().st_uid
    # In a mount namespace of the test's own: nothing is mounted on the host.
    script = (
        f"mount -t tmpfs -o size=1m,uid={owner},gid={owner},mode=755 none {volume}\n"
        "exec \"$@\""
    )
    code = (
        "import subprocess, sys\nfrom stockade import contain\n"
        "with contain.launch('test', argv=['/bin/dd', 'if=/dev/zero', 'of=/var/lib/data/x', 'bs=1M', 'count=4'],"
        " stderr=subprocess.PIPE) as running:\n"
        "    print(running.stderr.read().decode(), running.wait(20))\n"
    )
    import sys

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script, "sh", sys.executable, "-c", code], capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert "No space left on device" in done.stdout
    assert done.stdout.split()[-1] == "1"


@needs("pids")
def test_instances_of_one_jail_share_no_group(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"]}, "limits": {"processes": 8, "memory": "32M"}})
    contain.launch("test", detach=True).close()
    with (
        contain.launch("test", argv=["/bin/sleep", "100"]) as first,
        contain.launch("test", argv=["/bin/sleep", "100"]) as second,
    ):
        members = [set(contain.find(one).cgroups) for one in ("test", first.instance, second.instance)]
        assert all(members)
        assert members[0] & members[1] == members[0] & members[2] == members[1] & members[2] == set()
        assert set(groups("test")) == {Path(path) for one in members for path in one}
        for one in ("test", first.instance, second.instance):
            assert contain.find(one).usage().processes == 2
    contain.stop("test", timeout_s=0.2)
    assert groups("test") == []


@needs("pids")
def test_command_that_enters_is_limited_with_the_jail(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"]}, "limits": {"processes": 8}})
    contain.launch("test", detach=True).close()
    with contain.enter("test", ["/bin/sleep", "100"]) as entered:
        assert contain.find("test").usage().processes == 3
        assert f"stockade-test-{contain.find('test').number}" in Path(f"/proc/{entered.pid}/cgroup").read_text()


@needs("pids")
def test_group_of_a_jail_whose_supervisor_was_killed_is_swept(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"]}, "limits": {"processes": 8}})
    with contain.launch("test") as running:
        os.kill(running.supervisor_pid, signal.SIGKILL)
        assert until(lambda: not exists(running.init_pid))
    assert groups("test") != []
    with contain.launch("test") as running:
        assert len(groups("test")) == len(contain.find("test").cgroups)
    assert groups("test") == []


@needs("pids")
def test_limits_of_a_further_life_are_those_of_the_first(jail: Builder) -> None:
    from stockade.contain import wire

    service = {"command": ["/bin/sleep", "100"], "restart": "always"}
    jail(spec={"service": service, "limits": {"processes": 8}})
    quick = wire.record(wire.RESTART, wire.RESTART_ALWAYS, 20, 20, 60_000)
    contain.launch("test", detach=True, records=[quick]).close()
    first = contain.find("test")
    os.kill(first.init_pid, signal.SIGKILL)
    assert until(lambda: contain.find("test").restarts == 1 and contain.find("test").init_pid != 0)
    assert contain.find("test").cgroups == first.cgroups
    assert until(lambda: contain.find("test").usage().processes == 2)
    [limit] = [Path(path, "pids.max") for path in first.cgroups if Path(path, "pids.max").exists()]
    assert limit.read_text() == "9\n"
    contain.stop("test", timeout_s=0.2)
    assert groups("test") == []
