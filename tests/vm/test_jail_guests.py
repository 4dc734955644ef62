"""Built jails as guests, behind each set of walls, reached by real clients; and what stands around UML."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from conftest import MEMORY, NewGuest
from guest_processes import of_guest, wait_gone

from stockade import machines, places, specfile, workflow
from stockade.cli import machinelife
from stockade.records.publish import Published
from stockade.vm import control, images, record, store
from stockade.vm.consolelog import ConsoleLog
from stockade.vm.start import stop

pytestmark = pytest.mark.slow

WALLS = [("vm",), ("jail", "vm"), ("jail", "vm", "jail")]


@pytest.fixture(scope="module")
def jails(home: Path) -> Iterator[None]:
    """nginx and sshd, built once."""
    if os.geteuid() != 0:
        pytest.skip("services with several accounts are built by root: run the tests as root")
    for name in ("nginx", "sshd"):
        workflow.build(specfile.load(specfile.recipe(name)))
    yield
    for name in images.names():
        if images.load(name).origin == "jail":
            images.remove(name, [])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(command: list[str], seconds: float = 15.0) -> subprocess.CompletedProcess[str]:
    end = time.monotonic() + seconds
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode == 0 or time.monotonic() > end:
            return done
        time.sleep(0.02)


@pytest.mark.parametrize("walls", WALLS, ids=",".join)
def test_nginx_answers_from_behind_each_set_of_walls_and_ends_well(jails: None, walls: tuple[str, ...]) -> None:
    port = free_port()
    started = machines.start_jail(
        "nginx", walls, memory=MEMORY, publish=[Published(address="127.0.0.1", port=port, target=80)], leash=False
    )
    started.close()
    try:
        done = wait_for(["curl", "-sS", "-f", "-m", "5", "-i", f"http://127.0.0.1:{port}/"])
        assert done.returncode == 0, done.stderr
        assert "Served from a jail" in done.stdout
        users = control.execute(started.name, ["@read", "/proc/1/comm"])
        assert users[1] == b"init\n"
        last = stop(started.name)
        assert (last["cause"], last["status"]) == ("halted", 0)
    finally:
        machines.discard(started.name)


@pytest.mark.parametrize("walls", WALLS, ids=",".join)
def test_service_runs_in_the_guest_as_nobody_who_is_root(jails: None, walls: tuple[str, ...]) -> None:
    port = free_port()
    started = machines.start_jail(
        "nginx", walls, memory=MEMORY, publish=[Published(address="127.0.0.1", port=port, target=80)], leash=False
    )
    started.close()
    try:
        assert (
            wait_for(["curl", "-sS", "-f", "-m", "5", "-o", "/dev/null", f"http://127.0.0.1:{port}/"]).returncode == 0
        )
        found = 0
        status, listing, _ = control.execute(started.name, ["@list", "/proc"])
        assert status == 0
        for word in listing.decode("utf-8", "replace").split("\0"):
            pid = word.rpartition("/")[2]
            if not pid.isdecimal() or word.split(" ")[-1] != f"/proc/{pid}":
                continue
            code, text, _ = control.execute(started.name, ["@read", f"/proc/{pid}/status"])
            lines = dict(line.split(":\t", 1) for line in text.decode().splitlines() if ":\t" in line)
            if code or lines.get("Name") != "nginx":
                continue
            found += 1
            assert lines["Uid"].split()[0] != "0"
            assert (lines["CapEff"], lines["NoNewPrivs"], lines["Seccomp"]) == ("0" * 16, "1", "2")
            inner = walls[-1] == "jail" and len(walls) > 1
            assert (len(lines["NSpid"].split()) == 2) == inner
        assert found >= 2
    finally:
        machines.discard(started.name)


@pytest.mark.parametrize("walls", WALLS, ids=",".join)
def test_sshd_lets_its_client_in_from_behind_each_set_of_walls(jails: None, walls: tuple[str, ...]) -> None:
    port = free_port()
    started = machines.start_jail(
        "sshd", walls, memory=MEMORY, publish=[Published(address="127.0.0.1", port=port, target=22)], leash=False
    )
    started.close()
    try:
        key = _client_key()
        done = wait_for(
            ["ssh", "-F", "none", "-p", str(port), "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o",
             "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=5",
             f"{_user()}@127.0.0.1",
             "echo in the guest; exit 5 || true"],
            seconds=1.0,
        )  # fmt: skip
        end = time.monotonic() + 15
        while done.returncode == 255 and time.monotonic() < end:
            time.sleep(0.1)
            done = subprocess.run(done.args, capture_output=True, text=True, timeout=20, check=False)
        assert (done.returncode, done.stdout) == (5, "in the guest\n"), done.stderr
    finally:
        machines.discard(started.name)


def _client_key() -> Path:
    spec = specfile.load(specfile.recipe("sshd"))
    name = next(name for name, secret in spec.secrets.items() if secret.kind == "ssh-key" and secret.client)
    return places.jail("sshd") / "secrets" / name / "value"


def _user() -> str:
    spec = specfile.load(specfile.recipe("sshd"))
    return next(account.name for account in spec.accounts if account.home and account.name not in ("sshd", "root"))


def test_uml_in_its_jail_has_an_empty_network_no_capability_a_filter_and_its_own_files_alone(
    new_guest: NewGuest,
) -> None:
    guest = new_guest(walls=("jail", "vm"))
    machines.start_guest(guest.name).close()
    status = control.request(guest.name, "status")
    pid = status["processes"][-1]
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert lines["Uid"].split() == [str(guest.uid)] * 4
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert lines[name] == "0" * 16
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")
    for name in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
        assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name
    root = Path(f"/proc/{pid}/root")
    assert set(os.listdir(root)) <= {"bin", "dev", "etc", "lib", "lib64", "run", "tmp", "usr", "vm"}
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    options = {fields[1]: fields[3].split(",") for fields in mounts}
    assert "ro" in options["/"]
    assert "ro" in options["/vm/base"]
    assert "/proc" not in options
    assert {"nosuid", "nodev"} <= set(options["/vm"])
    assert len(os.listdir(root / "usr/bin")) == 1


# What whoever has taken UML's process over would try. Run in the same jail: same user, namespaces, filter.
_ATTEMPTS = {
    "a file of the host": "cat /etc/shadow",
    "root's files": "ls /root",
    "the base of its disk": "echo x > /vm/base",
    "its own program": "echo x >> /usr/bin/linux.uml",
    "a device": "mknod /vm/disk b 259 0",
    "a mount": "mount -t tmpfs none /vm",
    "another user": "setpriv --reuid 0 true",
    "a namespace": "unshare -r true",
    "the network": "echo | nc -w 2 127.0.0.1 22",
    "other processes": "kill -9 1",
    "the host's name": "hostname taken",
}


@pytest.mark.parametrize("attempt", _ATTEMPTS)
def test_whoever_takes_uml_over_stays_in_its_jail(new_guest: NewGuest, attempt: str) -> None:
    guest = new_guest(walls=("jail", "vm"))
    machines.start_guest(guest.name).close()
    machine = store.machine(guest.name)
    stop(guest.name)
    (machine / "tools").mkdir()
    subprocess.run(["install", "-m", "755", "/bin/busybox", str(machine / "tools/busybox")], check=True, timeout=10)
    script = f"import sys; sys.argv = ['', {guest.name!r}, {_ATTEMPTS[attempt]!r}]\n" + _INSIDE
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "began" in done.stdout, done.stderr
    assert "got through" not in done.stdout
    assert not (machine / "disk").exists()


_INSIDE = """
import os, sys
from pathlib import Path
from msgspec.structs import replace
from stockade.contain import wire
from stockade.contain.compile import compile_plan
from stockade.contain.encoding import encode
from stockade.contain.spawn import spawn
from stockade.records.launch import Bind
from stockade.records.spec import Syscalls
from stockade.vm import kernels, store, walls
name, command = sys.argv[1:]
guest, kernel = store.load(name), kernels.find()
machine = os.path.realpath(store.machine(name))
generation, lock = walls.jail_of(kernel)
spec = walls.specification(kernel, memory=guest.memory)
# A shell makes more calls than UML: its filter is not what is tried here.
spec = replace(spec, policy=replace(spec.policy, syscalls=Syscalls(preset="default")))
tools = Bind(source=f"{machine}/tools", target="/vm/tools", own=True)
plan = compile_plan(
    spec, lock, generation=generation, volumes=Path("/nonexistent"), ids=walls.ids_of(guest), allow_ptrace=True,
    extra=(*walls.directories(Path(machine)), tools),
)
Path(machine, "plan").write_bytes(encode(plan))
records = [
    wire.text(wire.BASE, os.fspath(generation)),
    wire.text(wire.ARGV, "/vm/tools/busybox", "sh", "-c", f"echo began; {command} && echo got through"),
    wire.record(wire.LIFELINE),
]
pid = spawn(f"{machine}/plan", records, streams=(0, 1, 2), inherit=(), wrapper=())
os.waitpid(pid, 0)
"""


def test_guest_in_a_jail_cannot_have_more_processes_than_its_limit(new_guest: NewGuest) -> None:
    guest = new_guest(walls=("jail", "vm"))
    machines.start_guest(guest.name).close()
    pids = of_guest(guest.name)
    with control.Session(guest.name, ["sh", "-c", "f() { f | f & }; f; sleep 30"]):
        time.sleep(1.0)
    machines.discard(guest.name)
    assert wait_gone(pids) == []


def test_followed_console_of_a_machine_is_whole_when_it_is_put_aside_and_a_gap_is_told(
    jails: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = store.create("nginx", machines.image_of_jail("nginx"), jail="nginx")
    path = places.guest(guest.name) / "console.log"
    log = ConsoleLog(str(path), 4)
    runs = True
    monkeypatch.setattr(control, "is_running", lambda name: runs)
    try:
        log.write(b"1\n")
        pieces = machinelife.followed("nginx", older=True)
        assert next(pieces) == b"1\n"
        log.write(b"2\n")
        log.write(b"3\n")  # puts 1 and 2 aside
        assert next(pieces) == b"2\n"
        assert next(pieces) == b"3\n"
        assert capsys.readouterr().err == ""
        log.write(b"4\n")
        for text in (b"5\n", b"6\n", b"7\n", b"8\n", b"9\n"):
            log.write(text)
        assert next(pieces) == b"4\n" and "lines may be missing here" not in capsys.readouterr().err
        runs = False
        assert list(pieces) == [b"7\n8\n", b"9\n"]
        assert capsys.readouterr().err.splitlines() == [
            "note: the log was written faster than it was read: lines may be missing here"
        ]
    finally:
        log.close()
        store.remove(guest.name)


def test_what_a_killed_run_leaves_is_gone_with_the_next_command_and_its_record_is_kept(jails: None) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def stockade(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "stockade", *words], capture_output=True, text=True, timeout=30, check=True,
            env=environment,
        )  # fmt: skip

    kept = store.create("kept", machines.image_of_jail("nginx"))
    child = subprocess.Popen(
        [sys.executable, "-m", "stockade", "run", "nginx", "--walls", "vm", "--publish", f"{free_port()}:80"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    try:
        assert child.stdout is not None and child.stdout.readline()
        [name] = set(store.names()) - {kept.name}
        pids = of_guest(name)
        (places.guest(name) / record.NAME).write_bytes(b"what was typed")
        store.save(msgspec.structs.replace(store.load(name), record=True))
        assert name in stockade("guest", "list").stdout
    finally:
        child.kill()
        child.communicate(timeout=20)
    assert wait_gone(pids, 60) == []
    end = time.monotonic() + 20
    while name in stockade("guest", "list").stdout and time.monotonic() < end:
        time.sleep(0.1)
    assert store.names() == [kept.name]
    [found] = places.records().glob(f"nginx-*-{name}.log")
    assert found.read_bytes() == b"what was typed"
    found.unlink()
    store.remove(kept.name)


def test_run_with_walls_is_in_the_foreground_and_passes_the_status_on(jails: None) -> None:
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-m", "stockade", "run", "nginx", "--walls", "jail,vm,jail", "--publish", f"{port}:80"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert (
            wait_for(["curl", "-sS", "-f", "-m", "5", "-o", "/dev/null", f"http://127.0.0.1:{port}/"]).returncode == 0
        )
        child.send_signal(signal.SIGTERM)
        output, errors = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0, errors
    assert "nginx" in output
    assert store.names() == []
