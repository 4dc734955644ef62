"""The warden outside of the jail: what careless callers and hostile services cannot make of it."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from conftest import BUSYBOX, Builder, make_lock, make_rootfs
from processes import children, cpu_ticks, exists, status, until

from stockade import contain, places
from stockade.contain import starting, wire
from stockade.contain.spawn import spawn
from stockade.contain.starting import log_path
from stockade.errors import WallError
from stockade.records.spec import Spec

SLEEPS = ["/bin/sleep", "100"]


def python(*lines: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def test_failed_exec_is_a_failed_launch_where_sockets_are_passed(jail: Builder) -> None:
    jail()
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(WallError, match="cannot execute"):
        contain.launch("test", argv=["/bin/nonesuch"], sockets=[listener.fileno()], stdin=subprocess.DEVNULL)


def test_caller_that_ignores_the_end_of_its_children_sees_the_jails_end(jail: Builder) -> None:
    jail()
    places.run().mkdir(mode=0o700)  # else `fast` leaves the launch to others
    ended = python(
        "import signal; from stockade.contain import fast; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "fast.run('test', ['/bin/sh', '-c', 'exit 7'])",
    )
    assert ended.returncode == 7, ended.stderr


def single_id(name: str) -> None:
    """A jail with one id, made by root."""
    generation = places.jail(name) / "generations" / "0001"
    make_rootfs(generation / "rootfs")
    spec = msgspec.convert({"name": name, "service": {"command": SLEEPS, "user": "www"}}, Spec)
    ids = contain.IdRange(first=4000, first_gid=4000, count=1, kind="single")
    contain.install(spec, make_lock(), generation=generation, ids=ids)
    (places.jail(name) / "current").symlink_to("generations/0001")
    for directory in (generation, *generation.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o111)


def test_roots_groups_do_not_enter_a_jail_with_one_id(home: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not BUSYBOX.exists():
        pytest.skip("run as root, with `apt-get install busybox-static`: only root has groups that may be given up")
    single_id("test")
    before = os.getgroups()
    os.setgroups([0, 42])
    try:
        with contain.launch("test") as service, contain.enter("test", SLEEPS) as command:
            assert (status(service.pid)["Groups"], status(command.pid)["Groups"]) == ("", "")
            assert status(command.pid)["Uid"].split() == ["4000"] * 4
    finally:
        os.setgroups(before)


def test_command_for_failures_is_not_executed_in_a_jail_that_was_entered(jail: Builder) -> None:
    generation = jail()
    with contain.launch("test", argv=SLEEPS) as running:
        target = os.pidfd_open(running.init_pid)
        reader, writer = os.pipe()
        try:
            pid = spawn(
                os.fspath(generation / "plan"),
                [
                    wire.record(wire.ENTER, target),
                    wire.text(wire.ARGV, "/bin/nonesuch"),
                    wire.text(wire.ON_FAILURE, "/bin/busybox", "echo", "ran inside"),
                ],
                streams=(0, writer, writer), inherit=(target,),
            )  # fmt: skip
        finally:
            os.close(target)
            os.close(writer)
        with open(reader, encoding="utf-8") as said:
            text = said.read()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 127
        assert "ran inside" not in text
        assert "step `exec` failed on `/bin/nonesuch`" in text


def test_log_goes_on_after_a_rotation_that_failed(jail: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_LOG_BYTES", 64)
    jail(spec={"service": {"command": ["/bin/sh", "-c", "while read line; do echo $line; done"]}})
    path = log_path("test")
    reader, writer = os.pipe()
    contain.launch("test", detach=True, stdin=reader).close()
    os.close(reader)
    with open(writer, "w", buffering=1) as typed:
        typed.write("before\n")
        assert until(lambda: "before" in path.read_text())
        aside = path.parent.with_name("aside")
        path.parent.rename(aside)
        try:
            typed.write("x" * 100 + "\n")
            assert until(lambda: not is_open(aside / path.name))
        finally:
            aside.rename(path.parent)
        typed.write("after\n")
        assert until(lambda: path.exists() and "after" in path.read_text())


def is_open(path: Path) -> bool:
    """Whether the jail's supervisor has the file open."""
    supervisor = contain.find("test").supervisor_pid
    links = [os.readlink(f"/proc/{supervisor}/fd/{name}") for name in os.listdir(f"/proc/{supervisor}/fd")]
    return os.fspath(path) in links


def test_log_that_may_not_grow_does_not_end_the_jail(jail: Builder) -> None:
    script = "dd if=/dev/zero bs=4096 count=256; echo x > /tmp/done; sleep 100"
    jail(spec={"service": {"command": ["/bin/sh", "-c", script]}})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limit[1]))
    try:
        contain.launch("test", detach=True).close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    running = contain.find("test")
    assert until(Path(f"/proc/{running.init_pid}/root/tmp/done").exists)
    assert exists(running.supervisor_pid)
    assert log_path("test").stat().st_size == 1 << 19


def test_forwarder_without_a_free_descriptor_waits_and_goes_on(jail: Builder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/var/lib/data"]
    # The second gate makes the number of free descriptors odd: a connection takes two.
    network = {"mode": "private", "publish": [f"{port}:80", f"{port}:80/udp"]}
    jail(spec={"service": {"command": command}, "network": network})
    started = python(
        "import resource; from stockade import contain; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
        "contain.launch('test', detach=True).close()",
    )
    assert started.returncode == 0, started.stderr
    forwarder = next(
        pid for pid in children(contain.find("test").supervisor_pid)
        if b"forward" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )  # fmt: skip
    clients = []
    try:
        for _ in range(40):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            clients.append(client)
        assert until(lambda: len(os.listdir(f"/proc/{forwarder}/fd")) == 64)
        time.sleep(0.5)
        before = cpu_ticks(forwarder)
        time.sleep(1)
        assert cpu_ticks(forwarder) - before < os.sysconf("SC_CLK_TCK") / 4
    finally:
        for client in clients:
            client.close()
    assert until(lambda: is_answered(port))


def is_answered(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(b"GET /seed HTTP/1.0\r\n\r\n")
            return b"".join(iter(lambda: client.recv(4096), b"")).endswith(b"from the rootfs\n")
    except OSError:
        return False


def test_followed_log_that_is_not_there_for_a_moment_is_followed_on(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", "while read line; do echo $line; done"]}})
    path, aside = log_path("test"), log_path("test").with_name("aside")
    reader, writer = os.pipe()
    contain.launch("test", detach=True, stdin=reader).close()
    os.close(reader)
    command = [sys.executable, "-m", "stockade", "logs", "--follow", "test"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        open(writer, "w", buffering=1) as typed,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as follower,
    ):
        assert follower.stdout is not None
        typed.write("before\n")
        assert follower.stdout.readline() == "before\n"
        path.rename(aside)
        time.sleep(1)  # several of its turns
        aside.rename(path)
        typed.write("after\n")
        assert follower.stdout.readline() == "after\n"
        typed.close()
        assert follower.wait(timeout=30) == 0
    assert b"".join(contain.logs("test")) == b"before\nafter\n"
