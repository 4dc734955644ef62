"""`start` returns once the service is ready, and leaves nothing of one that never is. With real jails."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import clihome
import pytest

from stockade.doctor import examine

pytestmark = pytest.mark.skipif(
    bool(examine().missing),
    reason=f"this host lacks {', '.join(feature.name for feature in examine().missing)}: see `stockade doctor`",
)


class Home(clihome.Home):
    """A home, and jails in it that are built without observing: what they need is named."""

    def build(self, name: str, script: str, more: str = "", *, programs: str = '"sh", "sleep", "touch"') -> None:
        self.write(
            name,
            f'name = "{name}"\n[service]\ncommand = ["/bin/sh", "-c", {json.dumps(script)}]\n{more}\n'
            f'[files]\nprograms = [{programs}]\n[directories."/tmp"]\nmode = "1777"\n'
        )
        self.good("build", name, "--no-observe", "--no-verify")

    def rootfs(self, name: str) -> Path:
        return self.directory / f"state/jails/{name}/current/rootfs"

    def ps(self, *words: str) -> dict[str, list[dict[str, object]]]:
        report: dict[str, list[dict[str, object]]] = json.loads(self.good("ps", "--json", *words).stdout)
        return report


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    for jail in home.ps()["jails"]:
        home.run("stop", str(jail["instance"]), "--timeout", "0")
    for path in (tmp_path / "state/jails").glob("[a-z]*"):
        home.run("rm", "--force", path.name)


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number: int = taken.getsockname()[1]
        return number


def test_start_returns_when_the_condition_holds_and_not_before(home: Home) -> None:
    home.build("late", "sleep 1; touch /tmp/up; exec sleep 100", 'ready = { file = "/tmp/up" }')
    began = time.monotonic()
    home.good("start", "late")
    took = time.monotonic() - began
    assert 1.0 <= took < 5
    [jail] = home.ps()["jails"]
    assert Path(f"/proc/{jail['pid']}/root/tmp/up").exists()


def test_start_that_does_not_wait_returns_at_once(home: Home) -> None:
    home.build("late", "sleep 20; touch /tmp/up; exec sleep 100", 'ready = { file = "/tmp/up", timeout_s = 30 }')
    began = time.monotonic()
    home.good("start", "late", "--no-wait")
    assert time.monotonic() - began < 5
    assert [jail["name"] for jail in home.ps()["jails"]] == ["late"]


def test_service_that_is_always_busy_and_listens_nowhere_is_started_all_the_same(home: Home) -> None:
    home.build("busy", "while :; do :; done", "ready = { timeout_s = 1 }")
    home.good("start", "busy")
    assert [jail["state"] for jail in home.ps()["jails"]] == ["running"]


def test_service_that_is_never_ready_is_stopped_with_its_last_words(home: Home) -> None:
    home.build("never", "echo cannot find my configuration; exec sleep 100", "ready = { tcp = 81, timeout_s = 1 }")
    done = home.run("start", "never")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the service was not ready within 1 s: waited until TCP port 81 is listened to" in done.stderr
    assert "cannot find my configuration" in done.stderr
    assert "\nhint: " in done.stderr
    assert home.ps("--all") == {"report": "ps", "version": 1, "jails": [], "ended": []}


@pytest.mark.parametrize(
    ("script", "ready"),
    [
        ("echo up and running; exec sleep 100", 'log = "up and"'),
        ("exec sleep 100", 'command = ["test", "-d", "/run/stockade/root/tmp"]'),
    ],
)  # fmt: skip
def test_log_and_command_tell_when_it_is_ready(home: Home, script: str, ready: str) -> None:
    home.build("told", script, f"ready = {{ {ready}, timeout_s = 10 }}")
    home.good("start", "told")


def test_link_in_the_jail_does_not_make_a_file_of_the_host_count(home: Home) -> None:
    script = "cd /tmp; mkdir a; ln -s /etc/passwd.of.nobody x; ln -s ../../../../../../../boot a/b; exec sleep 100"
    home.build(
        "link", script, 'ready = { file = "/tmp/a/b", timeout_s = 1 }', programs='"sh", "sleep", "mkdir", "ln"'
    )
    assert Path("/boot").exists()
    done = home.run("start", "link")
    assert "was not ready within 1 s" in done.stderr


def test_service_that_fails_until_it_works_is_waited_for(home: Home) -> None:
    script = "if test -e /data/tried; then touch /tmp/up; exec sleep 100; fi; touch /data/tried; exit 1"
    more = (
        'ready = { file = "/tmp/up", timeout_s = 20 }\nrestart = "on-failure"\n'
        '[directories."/data"]\nkind = "volume"'
    )
    home.build("second", script, more)
    home.good("start", "second")
    [jail] = home.ps()["jails"]
    assert (jail["restarts"], jail["state"]) == (1, "running")


def test_service_that_always_fails_is_stopped_when_the_time_is_up(home: Home) -> None:
    home.build("fails", "echo no; exit 1", 'ready = { file = "/tmp/up", timeout_s = 2 }\nrestart = "always"')
    began = time.monotonic()
    done = home.run("start", "fails")
    assert time.monotonic() - began < 8
    assert done.returncode == 1
    assert "ended again and again" in done.stderr
    assert home.ps()["jails"] == []


def test_interrupted_start_leaves_no_jail(home: Home) -> None:
    home.build("late", "exec sleep 100", 'ready = { file = "/tmp/up", timeout_s = 30 }')
    with subprocess.Popen([*home.command, "start", "late"], env=home.environment, stderr=subprocess.PIPE) as child:
        end = time.monotonic() + 20
        while not home.ps()["jails"] and time.monotonic() < end:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=30)
        assert child.returncode == 130
    assert home.ps()["jails"] == []


def test_ps_tells_memory_cpu_processes_and_how_it_stands(home: Home) -> None:
    script = "i=0; while test $i -lt 60000; do i=$((i+1)); done; sleep 100 & exec sleep 100"
    home.build("busy", script, 'restart = "always"')
    home.good("start", "busy")
    time.sleep(0.8)
    [jail] = home.ps()["jails"]
    assert (jail["state"], jail["restarts"], jail["supervised"], jail["helper_lost"]) == ("running", 0, True, False)
    assert jail["processes"] == 3
    assert 0.01 < float(str(jail["cpu_s"])) < 30
    assert 50_000 < int(str(jail["memory"])) < 50_000_000
    assert 0.5 < float(str(jail["uptime_s"])) < 60
    heading = home.good("ps").stdout.splitlines()[0].split()
    assert heading == ["NAME", "PID", "GENERATION", "STATE", "PROCESSES", "MEMORY", "CPU", "RESTARTS", "UP", "PORTS"]


def test_status_of_what_ended_is_kept_until_the_next_start(home: Home) -> None:
    home.build("brief", "sleep 1; exit 7")
    home.good("start", "brief")
    end = time.monotonic() + 20
    while home.ps()["jails"] and time.monotonic() < end:
        time.sleep(0.05)
    [ended] = home.ps("--all")["ended"]
    assert (ended["name"], ended["status"], ended["restarts"]) == ("brief", 7, 0)
    assert json.loads(home.good("status", "brief", "--json").stdout)["ended"]["status"] == 7
    assert "not running, ended with status 7 on 20" in home.good("status", "brief").stdout
    assert "ended, status 7" in home.good("ps", "--all").stdout
    home.good("start", "brief")
    assert home.ps("--all")["ended"] == []


def tamper_content(rootfs: Path) -> str:
    with open(rootfs / "etc/passwd", "a", encoding="utf-8") as file:
        file.write("toor::0:0::/:/bin/sh\n")
    return "| /etc/passwd: digest is "


def tamper_mode(rootfs: Path) -> str:
    os.chmod(rootfs / "etc/passwd", 0o666)
    return "| /etc/passwd: mode is 0666, was 0444"


def add_file(rootfs: Path) -> str:
    (rootfs / "etc/ld.so.preload").write_text("/tmp/x.so\n")
    return "| /etc/ld.so.preload: extra"


def remove_file(rootfs: Path) -> str:
    (rootfs / "etc/group").unlink()
    return "| /etc/group: missing"


@pytest.mark.skipif(os.geteuid() != 0, reason="run as root: the rootfs of a user's jail belongs to other ids")
@pytest.mark.parametrize("change", [tamper_content, tamper_mode, add_file, remove_file])
def test_changed_rootfs_is_refused_with_the_list(home: Home, change: object) -> None:
    home.build("plain", "exec sleep 100")
    home.good("start", "plain", "--verify")
    home.good("stop", "plain")
    said = change(home.rootfs("plain"))  # type: ignore[operator]
    for words in (("start", "plain", "--verify"), ("run", "plain", "--verify", "--", "sh", "-c", "exit 0")):
        done = home.run(*words)
        assert done.returncode == (1 if words[0] == "start" else 125)
        assert done.stderr.startswith("error: 1 paths of `")
        assert said in done.stderr
        assert "hint: look at them, then build the jail again, or `stockade rollback`" in done.stderr
    assert home.ps()["jails"] == []


def test_ephemeral_start_changes_no_volume(home: Home) -> None:
    home.build("keeps", "touch /data/$$; touch /tmp/up; exec sleep 100",
               'ready = { file = "/tmp/up" }\n[directories."/data"]\nkind = "volume"')  # fmt: skip
    volume = home.directory / "state/jails/keeps/volumes/data"
    home.good("start", "keeps", "--ephemeral")
    home.good("stop", "keeps")
    assert list(volume.iterdir()) == []
    home.good("start", "keeps")
    assert len(list(volume.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="run as root: the service is another user")
def test_home_of_a_system_account_is_the_hosts_and_empty(home: Home) -> None:
    where = pwd.getpwnam("daemon").pw_dir
    assert any(Path(where).iterdir())
    home.build("homely", 'cd "$HOME" && pwd && echo *', 'user = "daemon"', programs='"sh"')
    assert home.good("run", "homely", "--", "sh", "-c", 'cd "$HOME" && pwd && echo *').stdout == f"{where}\n*\n"


def test_volume_survives_rebuild_and_rollback(home: Home) -> None:
    more = '[directories."/data"]\nkind = "volume"'
    home.build("keeps", "exec sleep 100", more)
    home.good("run", "keeps", "--", "touch", "/data/kept")
    home.build("keeps", "exec sleep 200", more)
    home.good("run", "keeps", "--", "sh", "-c", "test -e /data/kept")
    home.good("rollback", "keeps")
    home.good("run", "keeps", "--", "sh", "-c", "test -e /data/kept")


def test_generation_that_runs_outlives_builds_and_cannot_be_removed(home: Home) -> None:
    home.build("old", "exec sleep 100")
    home.good("start", "old")
    for number in range(5):
        home.build("old", f"exec sleep 1{number}")
    generations = home.directory / "state/jails/old/generations"
    assert sorted(path.name for path in generations.iterdir()) == ["0001", "0004", "0005", "0006"]
    home.good("exec", "old", "--", "sh", "-c", "exit 0")
    done = home.run("rm", "--force", "old")
    assert done.stderr == "error: jail `old` is running\nhint: `stockade stop old` first\n"
    assert (generations / "0001/rootfs").exists()


SERVER = """
import os, socket
assert os.environ["LISTEN_FDS"] == "1" and os.environ["LISTEN_PID"] == str(os.getpid())
server = socket.socket(fileno=3)
while True:
    client, _ = server.accept()
    client.sendall(b"from inside\\n")
    client.close()
"""


def ask(number: int) -> bytes:
    with socket.create_connection(("127.0.0.1", number), timeout=10) as client:
        return client.recv(100)


@pytest.fixture
def listener(home: Home) -> Home:
    python = "/usr/bin/python3"
    if not os.path.exists(python):
        pytest.skip("`apt-get install python3-minimal`: the service of these tests is a Python program")
    (home.directory / "config/served.toml").write_text(
        f'name = "served"\n[service]\ncommand = ["{python}", "-I", "-S", "-c", {json.dumps(SERVER)}]\n'
        f'ready = {{ tcp = 4242 }}\nuser = "nobody"\n[files]\nprograms = ["{python}"]\n'
        'include = ["/usr/lib/python3.11"]\n[policy]\ncapabilities = []\n'
    )
    home.good("build", "served", "--no-observe", "--no-verify")
    return home


def test_socket_made_outside_is_given_to_a_service_without_a_network(listener: Home) -> None:
    number = port()
    # The condition of the spec names a port that is not listened to inside: the outer one is not it.
    (listener.directory / "config/served.toml").write_text(
        (listener.directory / "config/served.toml").read_text().replace("4242", str(number))
    )
    listener.good("build", "served", "--no-observe", "--no-verify")
    listener.good("start", "served", "--listen", f"127.0.0.1:{number}")
    assert ask(number) == b"from inside\n"
    listener.good("stop", "served")
    with pytest.raises(ConnectionRefusedError):
        ask(number)


@pytest.mark.parametrize("given", ["by the spec", "at the start"])
def test_socket_of_udp_is_not_the_port_of_tcp_that_is_waited_for(home: Home, given: str) -> None:
    number = port()
    in_spec = f'[network]\nlisten = ["{number}/udp"]' if given == "by the spec" else ""
    words = () if in_spec else ("--listen", f"{number}/udp")
    home.build("bound", "exec sleep 100", f"ready = {{ tcp = {number}, timeout_s = 1 }}\n{in_spec}")
    done = home.run("start", "bound", *words)
    assert f"was not ready within 1 s: waited until TCP port {number} is listened to" in done.stderr


def test_low_port_needs_no_right_of_the_service(listener: Home) -> None:
    if os.geteuid() != 0:
        pytest.skip("run as root: the port is below 1024")
    number = next(number for number in range(700, 1000) if not taken(number))
    listener.good("start", "served", "--no-wait", "--listen", str(number))
    assert ask(number) == b"from inside\n"


def taken(number: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", number)) == 0


def test_spec_names_sockets_and_a_service_manager_hands_others_over(listener: Home) -> None:
    path = listener.directory / "config/served.toml"
    first, second = port(), port()
    path.write_text(path.read_text().replace("4242", str(first)) + f'[network]\nlisten = ["{first}"]\n')
    listener.good("build", "served", "--no-observe", "--no-verify")
    listener.good("start", "served")
    assert ask(first) == b"from inside\n"
    [jail] = listener.ps()["jails"]
    assert jail["ports"] == [str(first)]
    listener.good("stop", "served")
    with socket.create_server(("127.0.0.1", second)) as server:
        # As a service manager does it: the descriptor is 3, and the variables name the process that is to take it.
        script = 'exec 3<&"$0"; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        command = ["bash", "-c", script, str(server.fileno()), *listener.command, "start", "served", "--no-wait"]
        done = subprocess.run(
            command, env=listener.environment, pass_fds=(server.fileno(),), capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert ask(second) == b"from inside\n"
    with pytest.raises(ConnectionRefusedError):
        ask(first)


LIBSYSTEMD = f"/usr/lib/{os.uname().machine}-linux-gnu/libsystemd.so.0"

ASKING = """
import ctypes, socket
count = ctypes.CDLL("libsystemd.so.0").sd_listen_fds(0)
server = socket.socket(fileno=3)
while True:
    client, _ = server.accept()
    client.sendall(b"%d" % count)
    client.close()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="run as root: a plain chroot needs it")
@pytest.mark.skipif(not os.path.exists(LIBSYSTEMD), reason="`apt-get install libsystemd0`: it is asked for the sockets")
@pytest.mark.parametrize(("wall", "network"), [("jail", "private"), ("chroot", "host")])
def test_sockets_are_handed_to_the_pid_that_the_service_sees(listener: Home, wall: str, network: str) -> None:
    """sd_listen_fds(3) takes no socket that was meant for another pid."""
    path, number = listener.directory / "config/served.toml", port()
    text = path.read_text().replace(json.dumps(SERVER), json.dumps(ASKING)).replace("ready = { tcp = 4242 }\n", "")
    text = text.replace("3.11\"]", f'3.11", "{LIBSYSTEMD}"]').replace("[service]", f'walls = ["{wall}"]\n[service]')
    path.write_text(f'{text}[network]\nmode = "{network}"\n')
    listener.good("build", "served", "--no-observe", "--no-verify")
    listener.good("start", "served", "--no-wait", "--listen", str(number))
    assert ask(number) == b"1"


@pytest.mark.parametrize("text", ["no-port", "127.0.0.1:0", "1.2.3:80", "80/sctp", "127.0.0.1:80:80"])
def test_socket_that_cannot_be_read_is_a_usage_error(listener: Home, text: str) -> None:
    done = listener.run("start", "served", "--listen", text)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "\nhint: " in done.stderr


def test_port_in_use_is_said_by_name_and_leaves_nothing(listener: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        done = listener.run("start", "served", "--listen", f"127.0.0.1:{number}")
    assert done.returncode == 1
    assert f"error: cannot listen on 127.0.0.1 port {number}/tcp: Address already in use\nhint: `ss -lnp" in done.stderr
    assert listener.ps()["jails"] == []
    assert list((listener.directory / "run").glob("*")) == []


def test_two_starts_at_once_give_one_jail_and_one_clear_error(home: Home) -> None:
    home.build("one", "exec sleep 100")
    with (
        subprocess.Popen([*home.command, "start", "one"], env=home.environment, stderr=subprocess.PIPE) as first,
        subprocess.Popen([*home.command, "start", "one"], env=home.environment, stderr=subprocess.PIPE) as second,
    ):
        said = [first.communicate(timeout=30)[1].decode(), second.communicate(timeout=30)[1].decode()]
    assert sorted((first.returncode, second.returncode)) == [0, 1]
    loser = said[0] if first.returncode else said[1]
    assert re.match(r"error: jail `one` is already running\nhint: ", loser), loser
    assert len(home.ps()["jails"]) == 1


@pytest.mark.parametrize(
    ("verb", "name"), [("start", "../etc"), ("run", "a/../b"), ("stop", ".."), ("exec", ""), ("logs", "a@1/.."),
                       ("status", "x" * 64)],
)  # fmt: skip
def test_name_that_is_none_is_refused_and_makes_nothing(home: Home, verb: str, name: str) -> None:
    before = sorted(home.directory.rglob("*"))
    done = home.run(verb, name, *(["--", "true"] if verb in ("run", "exec") else []))
    assert done.returncode in (1, 2, 125), done.stderr
    assert done.stderr.startswith("error: ")
    assert sorted(home.directory.rglob("*")) == before


def test_nginx_takes_the_socket_that_it_is_given(home: Home) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("`apt-get install nginx-light` brings the service of this test")
    number = port()
    configuration = (
        f"daemon off; pid /run/nginx.pid; error_log stderr; events {{}} http {{ access_log off; server {{ "
        f"listen 127.0.0.1:{number}; location / {{ return 200 'walled\\n'; }} }} "
        + "".join(f"{kind}_temp_path /tmp/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        + "}"
    )
    (home.directory / "config/web.toml").write_text(
        f'name = "web"\n[service]\ncommand = ["{nginx}", "-e", "stderr", "-c", "/etc/nginx.conf"]\n'
        f'ready = {{ tcp = {number} }}\n[files]\nprograms = ["{nginx}"]\n'
        f'content = {{ "/etc/nginx.conf" = {json.dumps(configuration)} }}\n'
        '[directories]\n"/tmp" = {}\n"/run" = {}\n'
        f'[network]\nlisten = ["127.0.0.1:{number}"]\n[[accounts]]\nname = "nobody"\ngroup = "nogroup"\n'
        '[policy]\ncapabilities = ["setuid", "setgid", "chown"]\n'
    )
    home.good("build", "web", "--no-observe", "--no-verify")
    home.good("start", "web")
    with socket.create_connection(("127.0.0.1", number), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b"200 OK" in answer and answer.endswith(b"walled\n")
