"""The same walls for an ordinary user, with a range of subordinate ids and with the one own id."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import BUSYBOX
from ordinary import COUNT, FIRST, UID, home, python

BUILD = """
import json, os, subprocess, sys
from pathlib import Path
import msgspec
from conftest import make_lock, make_rootfs, output, PASSWD
from processes import exists, status, until
from stockade import contain, places
from stockade.build.lock import encode as encode_lock
from stockade.errors import StockadeError
from stockade.kernel import userns
from stockade.records.lock import LockDirectory
from stockade.records.spec import Spec

def build(spec, *, name="test", **lock):
    generation = places.jail(name) / "generations" / "0001"
    generation.mkdir(parents=True)
    ids = userns.subordinate()
    if ids is None:
        make_rootfs(generation / "rootfs")
    else:
        generation.chmod(0o777)
        userns.call(make_owned, str(generation / "rootfs"), ids=ids)
        generation.chmod(0o755)
    full = msgspec.convert({"name": name, "service": {"command": ["/bin/sleep", "100"], "user": "www"}} | spec, Spec)
    contain.install(full, make_lock(**lock), generation=generation)
    (generation / "lock.json").write_bytes(encode_lock(make_lock(**lock)))
    (generation.parent.parent / "current").symlink_to("generations/0001")
    return generation

def make_owned(path):
    make_rootfs(Path(path))
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            os.lchown(os.path.join(directory, name), 0, 0)
    os.chown(path, 0, 0)

def tell(**facts):
    print(json.dumps(facts))
"""


@pytest.fixture(params=["range", "single"])
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("run as root: the ordinary user is made in a private mount namespace")
    if not BUSYBOX.exists():
        pytest.skip("`apt-get install busybox-static`: the jails of these tests hold nothing else")
    if request.param == "range" and shutil.which("newuidmap") is None:
        pytest.skip("`apt-get install uidmap` brings newuidmap")
    with home(ranges=request.param == "range") as made:
        yield made


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["place"])


def facts(place: Path, code: str, *, under: Sequence[str] = ()) -> dict[str, object]:
    result = python(place, BUILD + code, under=under)
    assert result.returncode == 0, result.stderr
    found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_ids_are_the_callers_range_or_the_one_own_id(place: Path, kind: str) -> None:
    seen = facts(place, """
build({})
with contain.launch("test") as running:
    tell(map=Path(f"/proc/{running.pid}/uid_map").read_text().split(),
         gid_map=Path(f"/proc/{running.pid}/gid_map").read_text().split(),
         uid=status(running.pid)["Uid"].split(), init=status(running.init_pid)["Uid"].split(),
         groups=status(running.pid)["Groups"].split())
""")  # fmt: skip
    if kind == "range":
        assert seen["map"] == seen["gid_map"] == ["0", str(FIRST), str(COUNT)]
        assert seen["uid"] == [str(FIRST + 33)] * 4
        assert seen["init"] == [str(FIRST)] * 4
        assert seen["groups"] == [str(FIRST + 44)]
    else:
        assert seen["map"] == seen["gid_map"] == ["33", str(UID), "1"]
        assert seen["uid"] == seen["init"] == [str(UID)] * 4
        assert seen["groups"] == []


def test_walls_of_an_ordinary_users_jail(place: Path, kind: str) -> None:
    seen = facts(place, """
build({"policy": {"capabilities": ["net_bind_service"]}})
with contain.launch("test") as running:
    fields = ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp")
    own = {kind: os.readlink(f"/proc/{running.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
           for kind in ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup")}
    try:
        environment = Path(f"/proc/{running.init_pid}/environ").read_text()
    except PermissionError:
        environment = "refused"
    tell(status=[status(running.pid)[name] for name in fields], own=own, environment=environment,
         fds=output("test", "/bin/sh", "-c", "echo /proc/self/fd/*")[1].split(),
         mounts=Path(f"/proc/{running.pid}/mountinfo").read_text())
""")  # fmt: skip
    bit = f"{1 << 10:016x}"
    assert seen["status"] == [bit] * 5 + ["1", "2"]
    own = seen["own"]
    assert isinstance(own, dict) and all(own.values()), own
    assert seen["environment"] == "refused", "PID 1 can be looked into by the user that started it"
    # The fourth is the directory that the shell reads to expand the pattern.
    assert seen["fds"] == [f"/proc/self/fd/{number}" for number in range(4)]
    lines = [line.split() for line in str(seen["mounts"]).splitlines()]
    roots = [line for line in lines if line[4] == "/"]
    assert len(roots) == 1 and {"ro", "nosuid", "nodev"} <= set(roots[0][5].split(","))


def test_jail_of_an_ordinary_user_works(place: Path, kind: str) -> None:
    seen = facts(place, """
build({}, directories=(LockDirectory(path="/run", mode=0o755),
                       LockDirectory(path="/run/www", mode=0o750, uid=33, gid=33),
                       LockDirectory(path="/tmp", mode=0o1777),
                       LockDirectory(path="/var/lib/data", mode=0o755, uid=33, gid=33, volume="data")))
script = ("id -u; touch /tmp/x /run/www/x /dev/shm/x && echo made; cat /var/lib/data/seed;"
          "echo new > /var/lib/data/y; ls /proc/1/fd; touch /z")
code, out, err = output("test", "/bin/sh", "-c", script)
again = output("test", "/bin/cat", "/var/lib/data/y")
status_ = output("test", "/bin/sh", "-c", "exit 6")[0]
owner = os.stat(places.jail("test") / "volumes/data/y")
tell(out=out.splitlines(), err=err, again=again, status=status_, owner=owner.st_uid, mode=oct(owner.st_mode & 0o7777))
""")  # fmt: skip
    assert seen["out"] == ["33", "made", "from the rootfs"]
    assert "'/proc/1/fd': Permission denied" in str(seen["err"])
    assert "/z: Read-only file system" in str(seen["err"]) or "/z: Permission denied" in str(seen["err"])
    assert seen["again"] == [0, "new\n", ""]
    assert seen["status"] == 6
    assert seen["owner"] == (FIRST + 33 if kind == "range" else UID)


def test_size_of_an_ordinary_users_volume_is_not_kept_and_that_is_said(place: Path, kind: str) -> None:
    seen = facts(place, """
lock = {"directories": (LockDirectory(path="/run", mode=0o755), LockDirectory(path="/tmp", mode=0o1777),
        LockDirectory(path="/var/lib/data", mode=0o755, uid=33, gid=33, volume="data", size=8 << 20))}
build({}, **lock)
code, out, err = output("test", "/bin/sh", "-c", "cat /var/lib/data/seed; echo kept > /var/lib/data/y")
missing, = contain.not_limited(make_lock(**lock), contain.for_jail("test"), asked=True)
again = output("test", "/bin/cat", "/var/lib/data/y")
tell(out=out, err=err, again=again, limit=missing.limit, reason=missing.reason, remedy=missing.remedy)
""")  # fmt: skip
    assert (seen["out"], seen["err"], seen["again"]) == ("from the rootfs\n", "", [0, "kept\n", ""])
    assert seen["limit"] == "size of the volume `/var/lib/data`"
    assert "for an ordinary user" in str(seen["reason"]) and "as root" in str(seen["remedy"])


def test_ordinary_user_starts_enters_and_stops(place: Path, kind: str) -> None:
    seen = facts(place, """
build({})
running = contain.launch("test", detach=True)
with contain.enter("test", ["/bin/sh", "-c", "id -u; kill -0 2 && echo reached; grep NoNewPrivs /proc/self/status"],
                   stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as command:
    entered = command.stdout.read().decode().split()
found = [jail.instance for jail in contain.running()]
status_ = contain.stop("test")
tell(entered=entered, found=found, status=status_, alive=exists(running.pid), left=os.listdir(places.run()))
""")  # fmt: skip
    assert seen["entered"] == ["33", "reached", "NoNewPrivs:", "1"]
    assert seen["found"] == ["test"]
    assert (seen["status"], seen["alive"], seen["left"]) == (143, False, [])


def test_strace_attaches_at_the_gate(place: Path, kind: str) -> None:
    seen = facts(place, """
build({"service": {"command": ["/bin/sh", "-c", "read x < /etc/passwd; echo $x"], "user": "www"}})
trace = Path(os.environ["STOCKADE_HOME"]) / "trace"
with contain.launch("test", gate=True, stdout=subprocess.PIPE) as running:
    options = ["-f", "-q", "-y", "-e", "trace=%file,execve", "-o", str(trace)]
    tracer = subprocess.Popen(["strace", *options, "-p", str(running.pid)])
    assert until(lambda: status(running.pid)["TracerPid"] == str(tracer.pid))
    running.release()
    code = running.wait(20)
    tracer.wait(20)
tell(code=code, trace=trace.read_text())
""")  # fmt: skip
    assert seen["code"] == 0
    assert 'execve("/bin/sh"' in str(seen["trace"])
    assert '"/etc/passwd"' in str(seen["trace"])


def test_launches_of_an_ordinary_user_leave_nothing_behind(place: Path, kind: str) -> None:
    seen = facts(place, """
build({})
before = (sorted(os.listdir("/proc/self/fd")), len(Path("/proc/self/mountinfo").read_text().splitlines()))
statuses = set()
for number in range(40):
    with contain.launch("test", argv=["/bin/true"]) as running:
        statuses.add(running.wait(20))
after = (sorted(os.listdir("/proc/self/fd")), len(Path("/proc/self/mountinfo").read_text().splitlines()))
tell(statuses=list(statuses), same=before == after, left=os.listdir(places.run()))
""")  # fmt: skip
    assert seen == {"statuses": [0], "same": True, "left": []}


def test_root_in_the_jail_needs_a_range(place: Path, kind: str) -> None:
    seen = facts(place, """
try:
    build({"service": {"command": ["/bin/sleep", "1"], "user": "root"}})
    code, out, _ = output("test", "/bin/id", "-u")
    tell(out=out)
except StockadeError as error:
    tell(error=str(error), hint=error.hint)
""")  # fmt: skip
    if kind == "range":
        assert seen == {"out": "0\n"}
    else:
        assert seen == {
            "error": "the service is to run as root, and the caller has no range of ids: root of the jail would be the "
            "caller",
            "hint": "name another user in `service.user`, or get a range: `stockade doctor` has the command",
        }


def test_terminal_of_an_ordinary_users_jail(place: Path, kind: str) -> None:
    seen = facts(place, """
import pty, select
build({})
pid, master = pty.fork()
if pid == 0:
    script = "tty; echo hi > $(tty); stat -c %U $(tty)"
    os._exit(contain.launch("test", argv=["/bin/sh", "-c", script], terminal=True).wait(20))
out = b""
while True:
    try:
        data = os.read(master, 4096)
    except OSError:
        break
    if not data:
        break
    out += data
tell(code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out=out.decode().split())
""")  # fmt: skip
    assert seen == {"code": 0, "out": ["/dev/pts/0", "hi", "www"]}
