"""An ordinary user's view, in a mount namespace whose /etc gives that user an account and, or not, a range of ids."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
LIBRARIES = [path for path in sys.path if path.endswith("site-packages")]
Run = Callable[..., Any]

BECOME = """
import os, sys
from stockade.kernel.mount import MS_PRIVATE, MS_REC, mount
from stockade.kernel.namespaces import CLONE_NEWNS, unshare
unshare(CLONE_NEWNS)
mount(None, "/", None, MS_REC | MS_PRIVATE)
mount("t", "/mnt", "tmpfs")
os.makedirs("/mnt/upper"); os.makedirs("/mnt/work")
mount("o", "/etc", "overlay", 0, "lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work")
def add(path, line):
    with open(path, "a") as file:
        file.write(line + chr(10))
add("/etc/passwd", "walter:x:1234:1234::/srv/walter:/bin/sh")
add("/etc/group", "walter:x:1234:")
for name in ("/etc/subuid", "/etc/subgid"):
    os.truncate(name, 0) if os.path.exists(name) else None
    if sys.argv[1] == "range":
        add(name, "walter:300000:65536")
mount("t", "/srv", "tmpfs")
os.mkdir("/srv/walter"); os.chown("/srv/walter", 1234, 1234)
os.setgroups([]); os.setresgid(1234, 1234, 1234); os.setresuid(1234, 1234, 1234)
os.environ["HOME"] = "/srv/walter"
"""

COMMON = """
import json, os, sys
from stockade import observe
from stockade.errors import StockadeError
from stockade.observe.exercise import client
from stockade.records.seed import Seed
from stockade.records.spec import Exercise, Ready, Service, Spec
def show(value):
    os.write(1, json.dumps(value).encode())
"""


@pytest.fixture(params=["range", "no range"])
def ids(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def as_walter(as_root: None, strace: None) -> Run:
    if shutil.which("newuidmap") is None:
        pytest.skip("newuidmap is not installed: `apt-get install uidmap`")

    def run(code: str, *, ids: str = "range", before: str = "") -> Any:
        """What `code` shows, run as the user; `before` is run as root, in the user's mount namespace."""
        become = BECOME.replace("os.setgroups", f"{before}\nos.setgroups", 1)
        done = subprocess.run(
            [sys.executable, "-B", "-c", become + COMMON + textwrap.dedent(code), ids],
            env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join([str(SOURCE), *LIBRARIES]), "LC_ALL": "C.UTF-8"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if "PermissionError" in done.stderr and str(SOURCE) in done.stderr and "No module" in done.stderr:
            pytest.skip(f"an ordinary user cannot read `{SOURCE}`")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_program_is_observed(as_walter: Run, ids: str) -> None:
    found = as_walter(
        """
        script = "id -u; echo x > own; cat own; cat /etc/debian_version; cat /etc/shadow"
        spec = Spec(name="x", service=Service(command=("sh", "-c", script), directory="/srv/walter"))
        seen = observe.outside(spec, seeds=(), substitutions={}, identity=observe.Identity(1234, 1234))
        accesses = [[a.operation, a.path, a.error] for a in seen.trace.accesses]
        show([seen.status, seen.log, accesses, os.path.exists("/srv/walter/own")])
        """,
        ids=ids,
    )
    status, log, accesses, left = found
    assert status == 1
    assert log.startswith("1234\nx\n") and "/etc/shadow: Permission denied" in log
    assert ["create", "/srv/walter/own", ""] in accesses
    assert ["read", "/etc/debian_version", ""] in accesses
    assert ["read", "/etc/shadow", "EACCES"] in accesses
    assert left is False


def test_seeds_are_seen_below_directories_that_the_user_may_not_write(as_walter: Run, ids: str) -> None:
    found = as_walter(
        """
        seeds = [
            Seed(path="/etc/ssl/deep/new", content=b"deep", mode=0o644),
            Seed(path="/etc/hostname", content=b"changed", mode=0o600),
            Seed(path="/var/run/x", content=b"run", mode=0o644),
            Seed(path="/etc/alternatives", type="directory", mode=0o711),
        ]
        with observe.View.open(seeds=seeds) as view:
            script = (
                "cat /etc/ssl/deep/new /run/x; "
                "stat -c %a /etc/ssl /etc/alternatives /etc/ssl/deep; ls /etc/ssl"
            )
            out = client(view)(["sh", "-c", script], b"", 10)
            show([out.status, out.stdout.decode(), view.exists("/etc/passwd")])
        """,
        ids=ids,
    )
    status, output, passwd = found
    assert status == 0 and passwd
    mode = f"{os.stat('/etc/ssl').st_mode & 0o7777:o}"
    assert output.splitlines()[:3] == [f"deeprun{mode}", "711", "755"]
    assert set(output.splitlines()[3:]) == {*os.listdir("/etc/ssl"), "deep"}


def test_a_server_with_clients_is_observed(as_walter: Run, ids: str) -> None:
    found = as_walter(
        """
        # With a range a client is the view's root, as a client of root's is; without one there is only the one id.
        client_id = "0" if sys.argv[1] == "range" else "1234"
        code = (
            "import http.server as h, socketserver\\n"
            "socketserver.TCPServer(('127.0.0.1', 80), h.SimpleHTTPRequestHandler).serve_forever()"
        )
        client_code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1/hostname').read())"
        spec = Spec(
            name="x",
            service=Service(command=("/usr/bin/python3", "-c", code), directory="/etc", ready=Ready(tcp=80)),
            exercises=(
                Exercise(command=("/usr/bin/python3", "-c", client_code)),
                Exercise(command=("id", "-u"), stdout=f"^{client_id}$"),
            ),
        )
        seen = observe.outside(spec, seeds=(), substitutions={}, identity=observe.Identity(1234, 1234))
        opened = [a.path for a in seen.trace.accesses if a.operation == "read"]
        show([[r.passed for r in seen.exercises], opened])
        """,
        ids=ids,
    )
    assert found[0] == [True, True]
    assert "/etc/hostname" in found[1]


def test_a_seed_wins_over_a_file_that_is_a_mount_point(as_walter: Run, ids: str) -> None:
    """/etc/hosts and the like in a container, whose own content then must not be seen."""
    found = as_walter(
        """
        with observe.View.open(seeds=[Seed(path="/etc/passwd", content=b"seeded", mode=0o644)]) as view:
            out = client(view)(["cat", "/etc/passwd"], b"", 10)
            show([out.status, out.stdout.decode()])
        """,
        ids=ids,
        before='mount("/etc/passwd", "/etc/passwd", None, 4096)',
    )
    assert found == [0, "seeded"]


def test_a_seeded_directory_replaces_one_that_the_user_may_not_read(as_walter: Run) -> None:
    """A daemon's queue, in which it must be able to make, rename and remove files."""
    found = as_walter(
        """
        seeds = [
            Seed(path=f"/media/queue/{name}", type="directory", mode=0o700, uid=33, gid=33) for name in ("new", "old")
        ]
        with observe.View.open(seeds=seeds) as view:
            script = "cd /media/queue; cat open; touch new/x && mv new/x old/y; ls *"
            out = client(view)(["setpriv", "--reuid=33", "--regid=33", "--clear-groups", "sh", "-c", script], b"", 10)
            show([out.stdout.decode(), out.stderr.decode()])
        """,
        before=(
            'mount("t", "/media", "tmpfs"); os.mkdir("/media/queue"); '
            'open("/media/queue/open", "w").write("shown\\n")\n'
            'for name in ("new", "old"): os.mkdir(f"/media/queue/{name}", 0o700); '
            'open(f"/media/queue/{name}/of-the-host", "w").close()'
        ),
    )
    assert found == ["shown\nopen\n\nnew:\n\nold:\ny\n", ""]


def test_with_a_range_a_service_changes_its_ids_and_its_descriptors_stay_visible(as_walter: Run) -> None:
    code = (
        "import os; os.setgroups([5]); os.setgid(33); os.setuid(33); "
        "d = os.open('/usr', 0); os.stat('bin', dir_fd=d); os.fchdir(d); os.stat('lib')"
    )
    found = as_walter(
        f"""
        service = Service(command=("/usr/bin/python3", "-c", {code!r}))
        spec = Spec(name="x", service=service)
        seen = observe.outside(spec, seeds=(), substitutions={{}}, identity=observe.Identity())
        looked = [a.path for a in seen.trace.accesses if a.operation in ("stat", "chdir")]
        show([seen.status, seen.trace.uids, seen.trace.gids, looked])
        """
    )
    status, uids, gids, looked = found
    assert (status, uids, gids) == (0, [33], [5, 33])
    assert {"/usr/bin", "/usr/lib", "/usr"} <= set(looked)


def test_root_directory_of_a_view_belongs_to_its_root(as_walter: Run) -> None:
    found = as_walter(
        """
        with observe.View.open() as view:
            out = client(view)(["stat", "-c", "%u %a", "/", "/etc", "/run", "/tmp", "/dev"], b"", 10)
            show(out.stdout.decode().splitlines())
        """
    )
    assert found == ["0 755", "0 755", "0 755", "0 1777", "0 755"]


def test_host_without_user_namespaces_gets_the_cure(as_walter: Run) -> None:
    found = as_walter(
        """
        from stockade.kernel.namespaces import refusal
        import pathlib, tempfile
        with tempfile.TemporaryDirectory() as place:
            sysctl = pathlib.Path(place, "kernel"); sysctl.mkdir()
            (sysctl / "apparmor_restrict_unprivileged_userns").write_text("1")
            show(refusal(1, proc_sys=pathlib.Path(place)))
        """
    )
    assert found.startswith("as root: `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`")


def test_missing_newuidmap_is_named(as_walter: Run) -> None:
    found = as_walter(
        """
        os.environ["PATH"] = "/nonexistent"
        try:
            observe.View.open()
        except StockadeError as error:
            show([type(error).__name__, error.message, error.hint])
        """
    )
    assert found == [
        "HostError",
        "`newuidmap` is not installed, and without it a range of ids cannot be used",
        "install it: `apt-get install uidmap`",
    ]


JAIL = """
import ctypes, os, sys
from stockade.kernel.namespaces import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUSER, loopback_up, unshare
unshare(CLONE_NEWUSER)
print("unshared", flush=True)
sys.stdin.readline()
os.setgroups([]); os.setresgid(0, 0, 0); os.setresuid(0, 0, 0)
unshare(CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC)
loopback_up()
# As the warden does: what has changed its ids can be traced by its user only while it is dumpable.
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
print("at the gate", flush=True)
sys.stdin.readline()
os.execv("/usr/bin/python3", ["python3", "-uc", sys.argv[1]])
"""

SERVICE = """
import os, socket, sys
server = socket.create_server(("127.0.0.1", 4242))
os.setgid(33); os.setuid(33)
usr = os.open("/usr", 0); os.stat("bin", dir_fd=usr)
print("up")
while True:
    server.accept()[0].send(b"hello")
"""


def test_a_jail_of_the_users_own_is_joined_and_traced(as_walter: Run) -> None:
    """Its user namespace does not map the caller's own id, and its service changes its id."""
    found = as_walter(
        f"""
        import subprocess, sys
        jail = subprocess.Popen(
            [sys.executable, "-c", {JAIL!r}, {SERVICE!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert jail.stdout.readline() == b"unshared\\n"
        for command in ("newuidmap", "newgidmap"):
            subprocess.run([command, str(jail.pid), "0", "300000", "65536"], check=True)
        jail.stdin.write(b"mapped\\n")
        assert jail.stdout.readline() == b"at the gate\\n"
        client_code = "import socket; print(socket.create_connection(('127.0.0.1', 4242)).recv(9).decode())"
        spec = Spec(
            name="x",
            service=Service(command=("/usr/bin/python3",), ready=Ready(log="up"), stop_timeout_s=2),
            exercises=(
                Exercise(command=("/usr/bin/python3", "-c", client_code), stdout="hello"),
                Exercise(command=("cat", "/etc/only-here"), stdout="^x$"),
            ),
        )
        said = []
        def release(sockets):
            jail.stdin.write(b"go\\n")
            said.append(jail.stdout.readline().decode())
        seen = observe.inside(
            spec, pid=jail.pid, init_pid=1, release=release, alive=lambda: jail.poll() is None,
            log=lambda: "".join(said), run_inside=None, substitutions={{}}, as_uid0_of=jail.pid,
            client_seeds=[Seed(path="/etc/only-here", content=b"x", mode=0o600)],
        )
        jail.kill(); jail.wait()
        trace = seen.trace
        looked = [a.path for a in trace.accesses if a.operation == "stat"]
        show([str(seen.failure), [[r.passed, r.reason, r.stderr] for r in seen.exercises], trace.uids, looked])
        """
    )
    failure, exercises, uids, looked = found
    assert (failure, exercises) == ("None", [[True, "", ""], [True, "", ""]])
    assert uids == [33]
    assert "/usr/bin" in looked


def test_a_jail_without_a_root_of_its_own_is_traced_by_its_user(as_walter: Run) -> None:
    found = as_walter(
        """
        from stockade.observe.parse import Recorded, parse, read
        from stockade.observe.tracer import Tracer
        with observe.View.open() as view:
            out, gate = os.pipe()
            process = view.spawn(["cat", "/etc/debian_version"], environment={"PATH": "/bin"}, gate=out, services=False)
            with process, Tracer.attach(
                process.pid, directory=view.scratch, prefix="t", as_uid0_of=process.pid
            ) as tracer:
                os.write(gate, b"g")
                ended = tracer.wait(10)
            recorded = [Recorded("t", process.pid)]
            trace = parse(read(view.scratch, recorded), recorded)
            show([ended, [a.path for a in trace.accesses if a.operation == "read"]])
        """,
        ids="no range",
    )
    ended, opened = found
    assert ended is True
    assert "/etc/debian_version" in opened


def test_a_service_writes_where_only_root_may_and_the_host_keeps_what_it_has(as_walter: Run) -> None:
    found = as_walter(
        """
        script = "set -e; mkdir /srv/kept/new; echo x >>/srv/kept/log; cat /srv/kept/log /srv/kept/old"
        spec = Spec(name="x", service=Service(command=("sh", "-c", script)))
        seen = observe.outside(spec, seeds=(), substitutions={}, identity=observe.Identity())
        made = [a.path for a in seen.trace.accesses if a.operation in ("mkdir", "create") and not a.error]
        show([seen.status, seen.log, made, sorted(os.listdir("/srv/kept"))])
        """,
        before=(
            "os.mkdir('/srv/kept', 0o755); open('/srv/kept/old', 'w').write('old\\n'); "
            "open('/srv/kept/log', 'w').write('secret'); os.chmod('/srv/kept/log', 0o600)"
        ),
    )
    status, log, made, left = found
    # The log is nobody else's to read: the service appends to an empty one.
    assert (status, log) == (0, "x\nold\n")
    assert {"/srv/kept/new", "/srv/kept/log"} <= set(made)
    assert left == ["log", "old"]


def test_a_failure_that_no_stand_in_cures_is_told_once_it_is_sure(as_walter: Run) -> None:
    found = as_walter(
        """
        script = "mkdir /srv/kept/new; sleep 100"
        exercise = Exercise(command=("false",), timeout_s=5)
        spec = Spec(name="x", service=Service(command=("sh", "-c", script)), exercises=(exercise,))
        steps = []
        try:
            observe.outside(
                spec, seeds=(), substitutions={}, identity=observe.Identity(), progress=steps.append
            )
        except StockadeError as error:
            show([error.message, [step for step in steps if step.startswith("once more")]])
        """,
        before="os.mkdir('/srv/kept', 0o755)",
    )
    message, again = found
    assert "does not work outside a jail either" in message
    assert again == ["once more, with what this user may not write to as copies: `/srv/kept`"]


def test_what_only_root_may_read_is_named(as_walter: Run) -> None:
    found = as_walter(
        """
        script = "cat /srv/kept/key /srv/none; cat /srv/open; exit 3"
        exercise = Exercise(command=("true",))
        spec = Spec(name="x", service=Service(command=("sh", "-c", script)), exercises=(exercise,))
        try:
            observe.outside(spec, seeds=(), substitutions={}, identity=observe.Identity())
        except StockadeError as error:
            show(error.hint)
        """,
        before="os.mkdir('/srv/kept', 0o700); open('/srv/kept/key', 'w'); open('/srv/open', 'w')",
    )
    assert found.endswith("; on this host you may not read `/srv/kept`")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("test -w /etc/debian_version", None), ("echo x >>/srv/shown/open", None), ("cat /srv/shown/open", None),
        ("/srv/shown/open", "execute `/srv/shown/open`"), ("cat /srv/shown/key", "read `/srv/shown/key`"),
        ("ls /srv/shown/passed", "read `/srv/shown/passed`"), ("cd /srv/shown/seen", "enter `/srv/shown/seen`"),
        ("test -e /srv/shown/seen/x", "read `/srv/shown/seen`"),
    ],
)  # fmt: skip
def test_only_what_the_user_may_not_do_is_told_as_refused(as_walter: Run, script: str, said: str | None) -> None:
    found = as_walter(
        f"""
        service = Service(command=("sh", "-c", {script!r} + " || exit 3; exit 4"))
        spec = Spec(name="x", service=service, exercises=(Exercise(command=("true",)),))
        try:
            observe.outside(spec, seeds=(), substitutions={{}}, identity=observe.Identity(1234, 1234))
        except StockadeError as error:
            show(error.hint)
        """,
        ids="no range",
        before=(
            'os.makedirs("/srv/shown/passed"); os.mkdir("/srv/shown/seen")\n'
            'for name in ("open", "key"): open(f"/srv/shown/{name}", "w").close()\n'
            'os.chmod("/srv/shown/key", 0o600); os.chmod("/srv/shown/passed", 0o711)\n'
            'os.chmod("/srv/shown/seen", 0o744)'
        ),
    )
    assert found.partition("on this host you may not ")[2] == (said or "")
