"""start, stop, ps, logs, exec, list, rm and run of a jail with a machine among its walls, as a user types them."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from commandline import Done

import stockade
from stockade.errors import StateError
from stockade.records import report as reports

SPEC = """
name = "box"
walls = ["jail", "vm", "jail"]
record = {record}

[service]
command = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/srv"]
user = "www-data"
ready = {{ tcp = 8080 }}

[network]
mode = "private"
publish = ["127.0.0.1:{port}:8080"]

[files]
programs = ["busybox", "sh"]
content = {{ "/srv/index.html" = "from the machine" }}
"""

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Box:
    """A home with the jail `box`."""

    def __init__(self, directory: Path, *, record: bool) -> None:
        self.directory = directory
        self.port = free_port()
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(directory),
            "LC_ALL": "C.UTF-8", "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"),
            "STOCKADE_HOME": str(directory),
        }  # fmt: skip
        (directory / "config").mkdir(parents=True)
        text = SPEC.format(port=self.port, record=str(record).lower())
        (directory / "config/box.toml").write_text(text)

    def run(self, *words: str) -> Done:
        return subprocess.run(
            [sys.executable, "-m", "stockade", *words], env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def good(self, *words: str) -> Done:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done

    def page(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/index.html", timeout=5) as answer:
            return str(answer.read().decode())

    def guests(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.directory / "state/guests") if not name.startswith("."))
        except FileNotFoundError:
            return []


@pytest.fixture(params=[False], ids=[""])
def box(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Box]:
    for program, package in (("linux.uml", "user-mode-linux"), ("mke2fs", "e2fsprogs"), ("strace", "strace"),
                             ("slirp4netns", "slirp4netns"), ("busybox", "busybox-static")):  # fmt: skip
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"`apt-get install {package}`: a machine of a jail needs `{program}`")
    if os.geteuid() != 0:
        pytest.skip("run as root: the jail's service has an account of its own")
    made = Box(tmp_path / "home", record=request.param)
    made.good("build", "box")
    yield made
    for name in made.guests():
        made.run("guest", "rm", "--force", name)
    assert made.guests() == []


def test_life_of_a_jail_with_a_machine_goes_by_the_verbs_of_every_jail(box: Box) -> None:
    started = box.good("start", "box")
    assert re.match(rf"box: running behind jail,vm,jail, pid \d+, on 127\.0\.0\.1:{box.port}$", started.stdout.strip())
    assert box.page() == "from the machine", "start returns when the service answers"

    line = msgspec.json.decode(box.good("ps", "--json").stdout, type=reports.PsReport).jails[0]
    assert (line.name, line.state, line.generation, line.walls) == ("box", "running", 1, ("jail", "vm", "jail"))
    assert line.ports == (f"127.0.0.1:{box.port}:8080/tcp",)
    assert os.readlink(f"/proc/{line.pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    listed = msgspec.json.decode(box.good("list", "--json").stdout, type=reports.ListReport)
    assert {jail.name: jail.running for jail in listed.jails}["box"]
    status = msgspec.json.decode(box.good("status", "box", "--json").stdout, type=reports.StatusReport)
    assert status.running is not None
    assert status.running.pid == line.pid
    assert "guest is up" in box.good("logs", "box").stdout

    again = box.run("start", "box")
    assert (again.returncode, "jail `box` is running" in again.stderr) == (1, True)
    entered = box.run("exec", "box", "--", "sh")
    assert (entered.returncode, "`stockade guest exec box -- COMMAND`" in entered.stderr) == (125, True)
    removed = box.run("rm", "--force", "box")
    assert (removed.returncode, "`stockade stop box` first" in removed.stderr) == (1, True)

    assert "box: stopped" in box.good("stop", "box").stderr
    assert json.loads(box.good("ps", "--json").stdout)["jails"] == []
    assert not os.path.exists(f"/proc/{line.pid}")
    assert box.run("stop", "box").returncode == 1
    box.good("rm", "--force", "box")
    assert box.guests() == []


def test_machine_keeps_its_disk_from_start_to_start_and_is_not_mixed_with_another_generation(box: Box) -> None:
    box.good("start", "box")
    box.good("guest", "exec", "box", "--", "/bin/busybox", "sh", "-c", "echo kept > /srv/kept")
    box.good("stop", "box")
    box.good("start", "box")
    kept = box.good("guest", "exec", "box", "--", "/bin/busybox", "cat", "/srv/kept")
    assert kept.stdout == "kept\n"
    box.good("stop", "box")
    box.good("build", "box")
    refused = box.run("start", "box")
    assert refused.returncode == 1
    assert "was made of generation 1" in refused.stderr
    assert "`stockade guest rm box`" in refused.stderr
    box.good("guest", "rm", "--force", "box")
    box.good("start", "box")
    assert box.page() == "from the machine"


@pytest.mark.parametrize("option", (("--listen", "8081"), ("--ephemeral",)), ids=lambda words: words[0])
def test_what_a_machine_cannot_be_given_is_refused_with_what_to_do(box: Box, option: tuple[str, ...]) -> None:
    done = box.run("start", "box", *option)
    assert (done.returncode, "hint: " in done.stderr, box.guests()) == (2, True, [])


def test_command_runs_in_the_machine_in_the_services_place(box: Box) -> None:
    box.good("start", "box")  # its port is taken then
    script = 'echo "$1 $(/bin/busybox id -u) $(/bin/busybox uname -r)"; /bin/busybox id -u >&2; exit 7'
    done = box.run("run", "box", "--env", "WORD=x", "--", "/bin/sh", "-c", script, "sh", "said")
    assert done.returncode == 7
    said, uid, release = done.stdout.split()
    assert (said, uid != "0") == ("said", True)
    assert release != os.uname().release, "the kernel is the machine's"
    assert uid in done.stderr.splitlines()
    assert box.guests() == ["box"]


def test_command_that_is_not_in_the_machine_ends_with_127(box: Box) -> None:
    assert box.run("run", "box", "--", "/bin/nothing").returncode == 127
    assert box.guests() == []


def test_boot_that_is_told_to_end_leaves_no_machine(box: Box) -> None:
    box.good("image", "create", "looked-at", "--jail", "box")
    command = [sys.executable, "-m", "stockade", "boot", "looked-at"]
    with subprocess.Popen(
        command, env=box.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        try:
            end = time.monotonic() + 60
            while '"running"' not in box.good("guest", "list", "--json").stdout:
                assert child.poll() is None and time.monotonic() < end
            child.terminate()
            assert child.wait(timeout=60) == 143
        finally:
            child.kill()
    assert box.guests() == []


def test_boot_joins_the_terminal_with_the_console(box: Box) -> None:
    text = (box.directory / "config/box.toml").read_text()
    command = 'command = ["/bin/sh", "-c", "while read word; do echo got $word; done"]'
    text = re.sub(r"(?m)^(command|ready) = .*\n", "", text).replace("[service]", f"[service]\n{command}")
    (box.directory / "config/box.toml").write_text(text)
    box.good("build", "box", "--no-verify")
    box.good("image", "create", "asks", "--jail", "box")
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "stockade", "boot", "asks"], env=box.environment, stdin=theirs, stdout=theirs,
        stderr=theirs,
    ) as child:  # fmt: skip
        os.close(theirs)
        try:
            said = b""
            end = time.monotonic() + 60
            while b"got hello" not in said:
                # What is typed before the terminal is raw is lost.
                os.write(ours, b"hello\n")
                if select.select([ours], [], [], 0.5)[0]:
                    said += os.read(ours, 4096)
                assert time.monotonic() < end, said
            os.write(ours, b"\x1d")
            assert child.wait(timeout=60) == 0
        finally:
            child.kill()
            os.close(ours)
    assert box.guests() == []


@pytest.mark.parametrize("box", [True], indirect=True, ids=["recorded"])
def test_what_was_recorded_of_a_machine_that_is_gone_stays_and_is_told(box: Box) -> None:
    done = box.good("run", "box", "--", "/bin/busybox", "id")
    assert box.guests() == []
    place = re.search(r"is kept in `([^`]+)`", done.stderr)
    assert place is not None, done.stderr
    text = Path(place[1]).read_text(errors="replace")
    assert "type=EXECVE" in text
    assert 'a0="/bin/busybox" a1="id"' in text
    assert Path(place[1]).stat().st_mode & 0o077 == 0
    assert box.good("guest", "record", place[1]).stdout == text


def test_jail_is_not_started_without_its_machine_from_a_program_either(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOCKADE_HOME", str(box.directory))
    for start in (stockade.Jail("box").start, lambda: stockade.Jail("box").run(["/bin/sh", "-c", "true"])):
        with pytest.raises(StateError, match="`box` has a machine among its walls"):
            start()


def test_guest_of_a_jail_gets_the_walls_of_its_spec(box: Box) -> None:
    made = box.good("guest", "create", "other", "--jail", "box", "--network", "none")
    assert "walls jail,vm,jail" in made.stdout
    assert "other: up after" in box.good("guest", "start", "other").stderr, "no network, and none of the spec's ports"
