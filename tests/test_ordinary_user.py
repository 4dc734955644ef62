"""The whole way as an ordinary user: the command line as that user types it, real services, real clients.

The user exists only in private mount namespaces, whose /etc gives an account and, or not, a range of ids.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
LIBRARIES = [path for path in sys.path if path.endswith("site-packages")]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UID = 4711
FIRST = 400000
COUNT = 65536
IDS = {UID, *range(FIRST, FIRST + COUNT)}
CURE = (
    "as root: `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 ulla` "
    "(any 65536 ids that nobody else has)"
)
Done = subprocess.CompletedProcess[str]

# The user's home is /mnt: a view and a jail have a /tmp of their own.
BECOME = """
for name in passwd group subuid subgid; do mount --bind "$PLACE/etc/$name" "/etc/$name"; done
mount --bind "$PLACE/home" /mnt
mount -t tmpfs none /dev/net
mknod -m 666 /dev/net/tun c 10 200
eval "$PREPARE"
cd /mnt
exec $UNDER setpriv --reuid 4711 --regid 4711 --clear-groups --inh-caps=-all "$@"
"""

# A user namespace in which every id is itself and one kind of namespace can no longer be made.
FORBIDDING = """
import os, sys
from stockade.kernel.namespaces import CLONE_NEWUSER, unshare
ready_out, ready_in = os.pipe()
mapped_out, mapped_in = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(mapped_in)
    unshare(CLONE_NEWUSER)
    os.write(ready_in, b"x")
    os.read(mapped_out, 1)
    with open(f"/proc/sys/user/max_{sys.argv[1]}_namespaces", "w") as file:
        file.write("0")
    os.execvp(sys.argv[2], sys.argv[2:])
os.read(ready_out, 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{pid}/{name}", "w") as file:
        file.write("0 0 4294967295")
os.close(mapped_in)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


class User:
    """An ordinary user with `count` subordinate ids, and the command line as that user has it."""

    def __init__(self, place: Path, *, count: int) -> None:
        self.place = place
        self.home = place / "home"
        self.jails = self.home / "stockade/state/jails"
        (place / "etc").mkdir()
        place.chmod(0o755)
        self.home.mkdir(mode=0o700)
        os.chown(self.home, UID, UID)
        accounts = {"passwd": f"ulla:x:{UID}:{UID}::/mnt:/bin/sh\n", "group": f"ulla:x:{UID}:\n"}
        for name, line in accounts.items():
            (place / "etc" / name).write_text(Path(f"/etc/{name}").read_text() + line)
        for name in ("subuid", "subgid"):
            (place / "etc" / name).write_text(f"ulla:{FIRST}:{count}\n" if count else "")
        (place / "forbidding.py").write_text(FORBIDDING)

    def command(self, words: Sequence[str], *, prepare: str = "", forbid: str = "") -> tuple[list[str], dict[str, str]]:
        """The command that executes `words` as the user, and its environment.

        `prepare` is a script of root's, run where /etc is already the user's; `forbid` a kind of namespace.
        """
        environment = {
            "PATH": PATH,
            "HOME": "/mnt",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": os.pathsep.join([str(SOURCE), *LIBRARIES]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "STOCKADE_HOME": "/mnt/stockade",
            "PLACE": str(self.place),
            "PREPARE": prepare,
            "UNDER": f"{sys.executable} {self.place}/forbidding.py {forbid}" if forbid else "",
        }
        return ["unshare", "--mount", "--propagation", "private", "sh", "-euc", BECOME, "sh", *words], environment

    def run(self, *words: str, prepare: str = "", forbid: str = "", timeout_s: float = 120) -> Done:
        """Run `stockade WORDS` to its end."""
        command, environment = self.command(
            [sys.executable, "-m", "stockade", *words], prepare=prepare, forbid=forbid
        )
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip

    def good(self, *words: str, prepare: str = "") -> str:
        """Standard output of `stockade WORDS`, which must succeed."""
        done = self.run(*words, prepare=prepare)
        assert done.returncode == 0, f"`stockade {' '.join(words)}`: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def refused(self, *words: str, prepare: str = "", forbid: str = "") -> tuple[str, str]:
        """Message and hint of `stockade WORDS`, which must fail as a command that knows why."""
        done = self.run(*words, prepare=prepare, forbid=forbid)
        assert done.returncode == 1, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        found = re.search(r"^error: (.*)\n(?:.*\n)*?hint: (.*)$", done.stderr, re.MULTILINE)
        assert found is not None, done.stderr
        return found[1], found[2]

    def report(self, *words: str) -> dict[str, Any]:
        """The JSON that `stockade WORDS` writes."""
        found: dict[str, Any] = json.loads(self.good(*words, "--json"))
        return found

    def publish(self, name: str, published: str) -> None:
        """Write the spec `name`: the recipe of that name, with another port of the host's."""
        path = self.home / f"stockade/config/{name}.toml"
        self.good("new", name)
        text, count = re.subn(r"(?m)^publish = \[[^]]*\]$", f'publish = ["{published}"]', path.read_text())
        assert count == 1
        path.write_text(text)

    def site(self) -> Path:
        """A directory of the user's with one page."""
        site = self.home / "site"
        site.mkdir()
        (site / "index.html").write_text("a page of hers\n")
        for path in (site, site / "index.html"):
            os.chown(path, UID, UID)
        return site

    def foreign_files(self) -> list[str]:
        """Paths in the home that belong to anybody but the user."""
        paths = [os.path.join(top, name) for top, *names in os.walk(self.home) for name in [*names[0], *names[1]]]
        return [path for path in paths if os.lstat(path).st_uid != UID]


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[int], User]]:
    if os.geteuid() != 0:
        pytest.skip("run as root: the ordinary user is made in a private mount namespace")
    for program, package in (("strace", "strace"), ("newuidmap", "uidmap"), ("pasta", "passt"), ("curl", "curl")):
        if shutil.which(program, path=PATH) is None:
            pytest.skip(f"`{program}` is not installed: `apt-get install {package}`")
    places = []

    def make(count: int) -> User:
        # Not below pytest's own directories, which are root's alone.
        place = Path(tempfile.mkdtemp(prefix="stockade-ordinary-"))
        places.append(place)
        return User(place, count=count)

    yield make
    left = _until(lambda: not processes(), 5) or processes()
    for place in places:
        shutil.rmtree(place)
    assert left is True, f"processes of the user are left: {left}"


@pytest.fixture
def user(made: Callable[[int], User]) -> User:
    return made(COUNT)


@pytest.fixture
def single(made: Callable[[int], User]) -> User:
    return made(0)


def processes() -> dict[int, str]:
    """Names, by pid, of what runs with ids of the user's."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and process.stat().st_uid in IDS:
                found[int(process.name)] = (process / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _client(*words: str) -> Done:
    return subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20, check=False)


def _needs(program: str, package: str) -> None:
    if shutil.which(program, path=PATH) is None:
        pytest.skip(f"`{program}` is not installed: `apt-get install {package}`")


@pytest.mark.slow
def test_sshd_is_built_started_logged_into_and_removed(user: User) -> None:
    _needs("sshd", "openssh-server")
    port = _free_port()
    user.publish("sshd", f"127.0.0.1:{port}:22")
    built = user.report("build", "sshd")
    assert built["exercises"] and all(exercise["passed"] for exercise in built["exercises"])
    user.good("start", "sshd")
    try:
        key = user.place / "key"
        key.write_bytes((user.jails / "sshd/secrets/guest-key/value").read_bytes())
        key.chmod(0o600)
        options = ["-F", "none", "-n", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]
        options += ["-o", "UserKnownHostsFile=/dev/null", "-i", str(key), "-p", str(port)]
        login = _client("ssh", *options, "guest@127.0.0.1", "id -un; cat /proc/self/uid_map")
        assert login.stdout.split() == ["guest", "0", str(FIRST), str(COUNT)], login.stderr
    finally:
        user.good("stop", "sshd")
    assert _client("ssh", *options, "guest@127.0.0.1", "true").returncode == 255
    assert user.foreign_files()
    user.good("rm", "--force", "sshd")
    assert user.foreign_files() == []
    assert not (user.jails / "sshd").exists()


@pytest.mark.slow
def test_nginx_serves_a_client_of_the_hosts(user: User) -> None:
    _needs("nginx", "nginx-light")
    port = _free_port()
    user.publish("nginx", f"127.0.0.1:{port}:80")
    user.good("build", "nginx")
    user.good("start", "nginx")
    try:
        answer = _client("curl", "-sS", "--fail", f"http://127.0.0.1:{port}/")
        assert "Served from a jail" in answer.stdout, answer.stderr
    finally:
        user.good("stop", "nginx")


@pytest.mark.slow
def test_every_recipe_is_built_and_passes_its_exercises_inside(user: User) -> None:
    programs = {
        "apache2": "apache2", "basic": "bash", "honeypot": "telnetd", "named": "named", "nginx": "nginx",
        "postfix": "postfix", "sshd": "sshd",
        "telnetd": "inetutils-inetd", "vsftpd": "vsftpd",
    }  # fmt: skip
    recipes = {recipe["name"] for recipe in user.report("recipes")["recipes"]}
    assert recipes == set(programs)
    failed = {}
    for name in sorted(recipes):
        if shutil.which(programs[name], path=PATH) is None:
            continue
        done = user.run("build", name)
        if done.returncode != 0:
            failed[name] = done.stderr
    assert failed == {}


def test_the_shell_of_basic_is_an_account_of_the_range(user: User) -> None:
    user.good("build", "basic")
    assert user.good("run", "basic", "--", "/bin/bash", "-c", "id -un; cat /proc/self/uid_map").split() == [
        "guest", "0", str(FIRST), str(COUNT),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_program_without_a_recipe_is_root_of_a_range_and_nobody_outside(user: User) -> None:
    port = _free_port()
    user.site()
    user.good(
        "new", "web", "--tcp", "8000", "--exercise", "curl -sS --fail http://127.0.0.1:8000/index.html",
        "--", "/usr/bin/python3", "-m", "http.server", "8000", "--directory", "/mnt/site",
    )  # fmt: skip
    spec = user.home / "stockade/config/web.toml"
    spec.write_text(f'{spec.read_text()}\n[network]\nmode = "private"\npublish = ["127.0.0.1:{port}:8000"]\n')
    user.good("build", "web")
    user.good("start", "web")
    try:
        answer = _client("curl", "-sS", "--fail", f"http://127.0.0.1:{port}/index.html")
        assert answer.stdout == "a page of hers\n", answer.stderr
        servers = [pid for pid, name in processes().items() if name == "python3"]
        assert FIRST in {os.stat(f"/proc/{pid}").st_uid for pid in servers}
    finally:
        user.good("stop", "web")


def test_a_script_that_a_program_makes_for_itself_alone_runs(user: User) -> None:
    make = "cd /tmp && printf '#!/bin/sh\necho made\n' > script && chmod 700 script && exec ./script"
    user.good("new", "maker", "--", "/usr/bin/sh", "-c", make)
    user.good("build", "maker")
    assert user.good("run", "maker") == "made\n"


@pytest.mark.slow
def test_with_one_id_a_server_a_database_and_a_tool_are_built_and_run(single: User) -> None:
    _needs("redis-server", "redis-server")
    _needs("nginx", "nginx-light")
    single.site()
    page, database = _free_port(), _free_port()
    serve = ["/usr/bin/python3", "-m", "http.server", "8000", "--directory", "/mnt/site"]
    single.good("new", "web", "--tcp", "8000", "--exercise", "curl -sSf http://127.0.0.1:8000/index.html", "--", *serve)
    single.good(
        "new", "cache", "--tcp", "6379", "--exercise", "redis-cli ping", "--", "redis-server", "--save", ""
    )  # fmt: skip
    for name, publish in (("web", f"127.0.0.1:{page}:8000"), ("cache", f"127.0.0.1:{database}:6379")):
        spec = single.home / f"stockade/config/{name}.toml"
        assert 'user = "ulla"' in spec.read_text()
        spec.write_text(f'{spec.read_text()}\n[network]\nmode = "private"\npublish = ["{publish}"]\n')
        single.good("build", name)
        single.good("start", name)
    try:
        assert _client("curl", "-sSf", f"http://127.0.0.1:{page}/index.html").stdout == "a page of hers\n"
        assert {os.stat(f"/proc/{pid}").st_uid for pid in processes()} == {UID}
        with socket.create_connection(("127.0.0.1", database), timeout=10) as client:
            client.sendall(b"PING\r\n")
            assert client.recv(64) == b"+PONG\r\n"
    finally:
        for name in ("web", "cache"):
            single.good("stop", name)
    single.good("new", "count", "--", "wc", "-l", "/etc/passwd")
    single.good("build", "count")
    assert re.fullmatch(r"[0-9]+ /etc/passwd\n", single.good("run", "count"))
    single.good("build", "nginx")
    assert single.foreign_files() == []


def test_with_one_id_a_service_of_roots_is_refused_before_anything_runs(single: User) -> None:
    message, hint = single.refused("build", "sshd")
    assert message == (
        "the service runs as root, and the jail has only one id: that of the caller, who must not be root inside"
    )
    assert hint == f"{CURE}; or name another `service.user`"


def test_with_one_id_an_exercise_that_wants_two_tells_the_cure(single: User) -> None:
    message, hint = single.refused("build", "basic")
    assert message.startswith("exercise `a listing with owners and times` does not work outside a jail either: ")
    assert hint.endswith(f"; where several ids are needed, you need a range of them: {CURE}")


@pytest.mark.slow
def test_nginx_as_debian_has_it_is_built_though_its_directories_are_roots(user: User) -> None:
    """It makes directories in /var/lib/nginx and writes logs in /var/log/nginx, where this user may do neither."""
    _needs("nginx", "nginx-light")
    directories = ("/var/lib/nginx", "/var/log/nginx")
    before = {path: sorted(os.listdir(path)) for path in directories}
    exercise = "curl --silent --fail http://127.0.0.1/"
    user.good("new", "web", "--tcp", "80", "--exercise", exercise, "--", "nginx", "-g", "daemon off;")
    report = user.report("build", "web")
    assert [line["passed"] for line in report["exercises"]] == [True]
    assert report["proposal"]["capabilities"] == ["chown", "setgid", "setuid"]
    user.good("start", "web")
    user.good("stop", "web")
    assert {path: sorted(os.listdir(path)) for path in directories} == before


@pytest.mark.slow
def test_a_jail_of_roots_is_built_again_from_its_lock(user: User) -> None:
    _needs("sshd", "openssh-server")
    home = user.place / "root"
    environment = {"PATH": PATH, "PYTHONPATH": str(SOURCE), "HOME": str(home), "STOCKADE_HOME": str(home)}
    subprocess.run(
        [sys.executable, "-m", "stockade", "build", "sshd"],
        env=environment, capture_output=True, timeout=120, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lock = (home / "state/jails/sshd/current/lock.json").read_bytes()
    (user.place / "sshd.lock").write_bytes(lock)
    built = user.report("build", "sshd", "--lock", str(user.place / "sshd.lock"))
    assert built["exercises"] and all(exercise["passed"] for exercise in built["exercises"])
    again = json.loads((user.jails / "sshd/current/lock.json").read_bytes())
    assert again["entries"] == json.loads(lock)["entries"]
    assert again["capabilities"] == json.loads(lock)["capabilities"]


def test_what_fails_outside_for_a_user_points_to_the_lock(user: User) -> None:
    user.good("new", "keeper", "--exercise", "cat /etc/gshadow", "--", "sleep", "100")
    message, hint = user.refused("build", "keeper")
    assert message == (
        "exercise `cat /etc/gshadow` does not work outside a jail either: it ended with status 1, not 0"
    )
    assert hint.endswith(
        "where root's rights over this host are needed, build it as root, and then here from that jail's lock: "
        "`stockade build keeper --lock FILE`"
    )


@pytest.mark.slow
def test_a_build_that_was_killed_is_swept_by_the_next_command(user: User) -> None:
    user.good("build", "basic")
    command, environment = user.command([sys.executable, "-m", "stockade", "build", "basic"])
    generations = user.jails / "basic/generations"

    def half_made() -> list[Path]:
        return [path for path in generations.iterdir() if path.name.startswith(".building-")]

    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as building:
        try:
            assert _until(lambda: any((path / "rootfs").exists() for path in half_made()), 30)
        finally:
            # unshare, sh, setpriv: each has executed the next, so this is Stockade itself.
            building.send_signal(signal.SIGKILL)
    assert half_made()
    assert _until(lambda: not processes(), 5), processes()
    assert user.good("run", "basic", "--", "/bin/bash", "-c", "echo still usable") == "still usable\n"
    user.good("build", "basic")
    assert half_made() == []
    assert user.report("status", "basic")["generations"][-1]["current"] is True


def test_doctor_tells_what_a_user_with_a_range_has(user: User) -> None:
    features = {feature["name"]: feature for feature in user.report("doctor")["host"]["features"]}
    assert features["id range"]["seen"] == f"{COUNT} ids from {FIRST}"
    assert features["id range"]["state"] == "present"
    assert features["overlay"]["state"] == "present"


def test_doctor_tells_a_user_without_a_range_what_it_costs(single: User) -> None:
    features = {feature["name"]: feature for feature in single.report("doctor")["host"]["features"]}
    assert features["id range"]["state"] == "absent"
    assert features["id range"]["cost"] == "jails have one user id, and no root inside"
    assert features["id range"]["cure"] == CURE


NO_USER_NAMESPACES = "as root: `sysctl -w user.max_user_namespaces=15000`"


@pytest.mark.parametrize("count", [COUNT, 0])
def test_host_without_user_namespaces_is_told_the_cure(made: Callable[[int], User], count: int) -> None:
    message, hint = made(count).refused("build", "basic", forbid="user")
    assert message == "this host refuses user namespaces to user `ulla`: the limit on their number is reached"
    assert hint == NO_USER_NAMESPACES


def test_host_without_mount_namespaces_is_told_the_limit(user: User) -> None:
    message, hint = user.refused("build", "basic", forbid="mnt")
    assert message == "this host refuses the namespaces that a view is made of: the limit on their number is reached"
    assert hint == "a limit on the number of namespaces is reached (`/proc/sys/user/max_*_namespaces`)"


def test_doctor_finds_the_missing_user_namespaces(user: User) -> None:
    done = user.run("doctor", forbid="user")
    assert done.returncode == 1
    assert f"user namespaces: no jail can be started\n  cure: {NO_USER_NAMESPACES}\n" in done.stdout
    assert "error: nothing works without user namespaces" in done.stderr


@pytest.mark.parametrize(
    ("program", "message", "hint"),
    [
        (
            "strace",
            "`strace` is not installed, and nothing can be observed without it",
            "install it: `apt-get install strace`",
        ),
        (
            "newuidmap",
            "`newuidmap` is not installed, and without it a range of ids cannot be used",
            "install it: `apt-get install uidmap`",
        ),
    ],
)
def test_missing_program_is_named_with_its_package(user: User, program: str, message: str, hint: str) -> None:
    hidden = f"mount --bind /dev/null {shutil.which(program, path=PATH)}"
    assert user.refused("build", "basic", prepare=hidden) == (message, hint)


def test_host_whose_overlays_are_nested_too_deeply_is_told(user: User) -> None:
    """The kernel's FILESYSTEM_MAX_STACK_DEPTH is 2: nothing can be laid over an overlay over an overlay."""
    stack = """
    mount -t tmpfs none /media
    mkdir /media/u1 /media/w1 /media/m1 /media/u2 /media/w2
    umount /etc/passwd /etc/group /etc/subuid /etc/subgid
    mount -t overlay -o lowerdir=/etc,upperdir=/media/u1,workdir=/media/w1 none /media/m1
    cp "$PLACE"/etc/* /media/m1/
    mount -t overlay -o lowerdir=/media/m1,upperdir=/media/u2,workdir=/media/w2 none /etc
    """
    message, hint = user.refused("build", "basic", prepare=stack)
    assert message == "cannot make a view of the host: overlay: Invalid argument on `/etc`"
    assert hint == "the file system cannot be the lower layer of an overlay; `dmesg` says why"


def test_home_on_which_nothing_can_be_executed_is_named(user: User) -> None:
    noexec = "mount -o remount,bind,noexec /mnt"
    assert user.refused("build", "basic", prepare=noexec) == (
        "`/mnt/stockade/state/jails/basic` lies on a mount with the option `noexec`, "
        "and a jail's programs are executed from there",
        "set `STOCKADE_HOME` to a directory on another file system, or remount that one with `exec`",
    )


def test_a_build_needs_nothing_of_the_hosts_tmp(user: User) -> None:
    """A /tmp on which nothing can be executed, and where the user may not write."""
    if any(str(path).startswith("/tmp/") for path in (sys.executable, Path(__file__))):
        pytest.skip("this test hides /tmp, and runs from there: check Stockade out in another place")
    user.good("build", "basic", prepare="mount -t tmpfs -o noexec,nosuid,nodev,mode=0755 none /tmp")
