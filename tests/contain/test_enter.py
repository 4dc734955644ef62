"""A command that enters a running jail is behind the same walls."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Builder
from processes import descriptors, exists, status, until

from stockade import contain
from stockade.errors import NotFoundError, WallError

NAMESPACES = ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup")
SERVICE = {
    "service": {"command": ["/bin/sleep", "100"], "user": "www"}, "policy": {"capabilities": ["net_bind_service"]},
}  # fmt: skip


def entered(*argv: str, **options: object) -> tuple[int, str]:
    with contain.enter(
        "test",
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,  # type: ignore[arg-type]
    ) as running:
        assert running.stdout is not None
        out = running.stdout.read().decode()
        return running.wait(20), out


def test_entered_command_has_the_services_walls(jail: Builder) -> None:
    jail(spec=SERVICE)
    with contain.launch("test") as service, contain.enter("test", ["/bin/sleep", "100"]) as command:
        for kind in NAMESPACES:
            assert os.readlink(f"/proc/{command.pid}/ns/{kind}") == os.readlink(f"/proc/{service.pid}/ns/{kind}"), kind
        for field in (
            "Uid",
            "Gid",
            "Groups",
            "CapInh",
            "CapPrm",
            "CapEff",
            "CapBnd",
            "CapAmb",
            "NoNewPrivs",
            "Seccomp",
        ):
            assert status(command.pid)[field] == status(service.pid)[field], field
        assert set(descriptors(command.pid)) == {0, 1, 2}
        assert Path(f"/proc/{command.pid}/environ").read_bytes() == Path(f"/proc/{service.pid}/environ").read_bytes()
        assert status(command.supervisor_pid)["NSpid"] == str(command.supervisor_pid), "the supervisor is seen inside"


def test_entered_command_sees_and_may_signal_the_service(jail: Builder) -> None:
    jail(spec=SERVICE)
    with contain.launch("test") as service:
        assert entered("/bin/kill", "-STOP", "2") == (0, "")
        assert until(lambda: status(service.pid)["State"].startswith("T"))
        assert entered("/bin/kill", "-CONT", "2") == (0, "")
        assert until(lambda: not status(service.pid)["State"].startswith("T"))


def test_status_user_directory_and_environment_of_an_entered_command(jail: Builder) -> None:
    jail()
    with contain.launch("test", argv=["/bin/sleep", "100"]):
        assert entered("/bin/sh", "-c", "exit 9")[0] == 9
        code, out = entered(
            "/bin/sh", "-c", "id -un; id -Gn; pwd; echo $X $HOME", user="www", directory="/tmp", environment={"X": "y"}
        )
        assert (code, out.splitlines()) == (0, ["www", "www logs", "/tmp", "y /var/lib/data"])


def test_entering_what_does_not_run_is_an_error(jail: Builder) -> None:
    jail()
    with pytest.raises(NotFoundError, match="jail `test` is not running"):
        contain.enter("test", ["/bin/true"])


def test_missing_program_is_127_for_an_entered_command_too(jail: Builder) -> None:
    jail()
    with contain.launch("test", argv=["/bin/sleep", "100"]), pytest.raises(WallError) as caught:
        contain.enter("test", ["/bin/nothing"])
    assert caught.value.exit_code == 127


def test_entered_command_ends_with_the_jail_and_with_its_starter(jail: Builder) -> None:
    jail()
    with contain.launch("test", argv=["/bin/sleep", "100"]) as service:
        first = contain.enter("test", ["/bin/sleep", "100"])
        os.kill(first.supervisor_pid, 9)
        assert until(lambda: not exists(first.pid))
        first.close()
        second = contain.enter("test", ["/bin/sleep", "100"])
        service.stop(timeout_s=1)
        assert second.wait(10) == 137
        second.close()


TERMINAL = """
import sys
from stockade import contain
if sys.argv[1] == "enter":
    with contain.launch("test", argv=["/bin/sleep", "100"], stdout=-3):
        sys.exit(contain.enter("test", sys.argv[2:], terminal=True).wait(30))
sys.exit(contain.launch("test", argv=sys.argv[2:], terminal=True).wait(30))
"""


def on_a_terminal(how: str, *argv: str, typed: bytes = b"", wait_for: bytes = b"") -> tuple[int, bytes]:
    """Status and output of a process that runs a command with a pty of the jail's own, itself on a pty."""
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", TERMINAL, how, *argv])
    out = b""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if wait_for and wait_for in out:
            os.write(master, typed)
            wait_for = b""
        if select.select([master], [], [], 0.1)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if not data:
                break
            out += data
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out


@pytest.mark.parametrize("how", ["launch", "enter"])
@pytest.mark.parametrize("user", ["root", "www"])
def test_terminal_is_of_the_jails_own_devpts(jail: Builder, how: str, user: str) -> None:
    jail(spec={"service": {"command": ["/bin/sh"], "user": user}})
    script = "tty; echo hello > $(tty); stat -c %U $(tty); stty size; ls /dev/pts"
    code, out = on_a_terminal(how, "/bin/sh", "-c", script)
    assert code == 0, out
    lines = out.split()
    assert lines[:3] == [b"/dev/pts/0", b"hello", user.encode()], out
    assert b"ptmx" in lines


def test_typed_text_and_interrupt_reach_the_jail(jail: Builder) -> None:
    jail()
    script = "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    code, out = on_a_terminal("launch", "/bin/sh", "-c", script, typed=b"\x03", wait_for=b"ready")
    assert (code, b"interrupted" in out) == (5, True), out
    script = "echo ready; read x; echo got-$x"
    code, out = on_a_terminal("launch", "/bin/sh", "-c", script, typed=b"word\n", wait_for=b"ready")
    assert (code, b"got-word" in out) == (0, True), out


def test_output_without_a_terminal_is_no_terminal(jail: Builder) -> None:
    jail()
    with contain.launch("test", argv=["/bin/sleep", "100"]):
        assert entered("/bin/tty") == (1, "not a tty\n")


def test_jail_goes_on_where_a_command_cannot_enter(jail: Builder, tmp_path: Path) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"]}})
    with contain.launch("test", detach=True) as running:
        with pytest.raises(WallError, match="launch step `plan` failed on"):
            contain.enter("test", ["/bin/true"], plan=tmp_path / "absent")
        assert contain.find("test").pid == running.pid


FORKING = """
n=0
while :; do
    n=$((n + 1))
    sleep 100 &
    sleep 0.01
    [ $n = 20 ] && echo many
done
"""


def test_a_command_that_is_killed_while_it_starts_others_leaves_none(jail: Builder) -> None:
    jail(spec={"limits": {"processes": 2000}})
    with contain.launch("test", argv=["/bin/sleep", "100"]) as service:
        command = contain.enter("test", ["/bin/sh", "-c", FORKING], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert command.stdout is not None and command.stdout.readline() == b"many\n"
        command.kill()
        command.close()
        found = contain.find("test").processes
        assert until(lambda: set(found()) == {service.init_pid, service.pid})
