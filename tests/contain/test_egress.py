"""What a private network reaches, and what it must not, between two hosts made of network namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Builder
from hosts import HOST, HOST6, PEER, PEER6, SECOND, TwoHosts
from processes import children, exists, until
from test_walls_ordinary import facts, kind, place  # the fixtures of an ordinary user

from stockade import contain, places
from stockade.contain.starting import log_path

__all__ = ["kind", "place"]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="run as root: the hosts are network namespaces of the test's own"),
    pytest.mark.skipif(shutil.which("pasta") is None, reason="`apt-get install passt`: it serves egress"),
]

# Says what came of one connection: what the other side said, or the name of the errno.
CONNECT = """
import errno, socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2) as connection:
        print(connection.recv(100).decode() or "closed")
except OSError as error:
    print(errno.errorcode.get(error.errno, type(error).__name__))
"""
#: Runs a command that sees a tun device which everybody may open, as most hosts have it.
WITH_TUN = (
    "unshare", "--mount", "sh", "-ec",
    'mount --make-rprivate / && mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec "$@"', "sh",
)  # fmt: skip
REFUSED = {"ECONNREFUSED", "ENETUNREACH", "EHOSTUNREACH", "EACCES", "EINVAL"}


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as made:
        made.serve(made.host, 9000, "the host itself")
        made.serve(made.peer, 9000, "the peer")
        made.resolve(made.peer, PEER)
        yield made


@pytest.fixture
def stockade(hosts: TwoHosts, tmp_path: Path) -> list[str]:
    """`stockade contain` on the host, with the peer as its resolver."""
    resolver = tmp_path / "resolv.conf"
    resolver.write_text(f"nameserver {PEER}\n")
    environment = [f"STOCKADE_HOME={tmp_path}/home", f"PYTHONPATH={Path(__file__).parents[2] / 'src'}"]
    view = 'mount --make-rprivate / && mount --bind "$0" "$(readlink -f /etc/resolv.conf)" && exec "$@"'
    return [
        "unshare", "--mount", "sh", "-ec", view, str(resolver), "env", *environment,
        sys.executable, "-m", "stockade", "contain",
    ]  # fmt: skip


def connect(hosts: TwoHosts, stockade: list[str], network: str, address: str, port: int = 9000) -> str:
    command = ["--network", network, "--", "/usr/bin/python3", "-c", CONNECT, address, str(port)]
    return hosts.run(hosts.host, *stockade, *command).stdout.strip()


@pytest.mark.parametrize("address", [PEER, PEER6])
def test_egress_reaches_another_host(hosts: TwoHosts, stockade: list[str], address: str) -> None:
    assert connect(hosts, stockade, "egress", address) == "the peer"


@pytest.mark.parametrize("address", [HOST, SECOND, "127.0.0.1", HOST6, "::1"])
def test_egress_never_reaches_the_host_itself(hosts: TwoHosts, stockade: list[str], address: str) -> None:
    assert connect(hosts, stockade, "host", address) == "the host itself"  # the server can be reached at all
    assert connect(hosts, stockade, "egress", address) in REFUSED


def test_the_second_address_is_reached_where_no_route_refuses_it(hosts: TwoHosts, tmp_path: Path) -> None:
    """The wall of the test above is the route: pasta with the same flags reaches that address."""
    command = [
        "pasta", "--quiet", "--config-net", "--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none",
        "--", "/usr/bin/python3", "-c", CONNECT, SECOND, "9000",
    ]  # fmt: skip
    user = ["setpriv", "--reuid", "65533", "--regid", "65533", "--clear-groups"]
    done = hosts.attempt(hosts.host, *WITH_TUN, *user, *command)
    assert done.stdout.strip() == "the host itself", done.stderr


@pytest.mark.usefixtures("kind")
def test_egress_of_an_ordinary_user_reaches_another_host_and_not_its_own(hosts: TwoHosts, place: Path) -> None:
    told = facts(place, f"""
build({{"network": {{"mode": "private", "egress": True}}}})
ask = "sleep 1 | nc -w 2 $0 9000"  # the other side ends the connection first
tell(**{{host: output("test", "/bin/sh", "-c", ask, host)[1] for host in {(PEER, HOST, SECOND)}}})
""", under=("nsenter", f"--net=/proc/{hosts.host}/ns/net", *WITH_TUN))  # fmt: skip
    assert told == {PEER: "the peer", HOST: "", SECOND: ""}


@pytest.mark.parametrize("address", ["169.254.169.254", "169.254.0.7", "100.100.100.200", "fd00:ec2::254"])
def test_metadata_and_link_local_addresses_are_refused(hosts: TwoHosts, stockade: list[str], address: str) -> None:
    assert connect(hosts, stockade, "egress", address) in {"ENETUNREACH", "EHOSTUNREACH"}


def test_names_are_resolved_where_egress_is_on(hosts: TwoHosts, stockade: list[str]) -> None:
    done = hosts.run(hosts.host, *stockade, "--network", "egress", "--", "getent", "ahostsv4", "name.example")
    assert done.stdout.split()[0] == "10.9.8.7"


@pytest.mark.parametrize("address", [PEER, HOST, SECOND, "127.0.0.1"])
def test_without_egress_nothing_is_reached(hosts: TwoHosts, stockade: list[str], address: str) -> None:
    assert connect(hosts, stockade, "none", address) in REFUSED


def test_the_network_helper_ends_with_the_command(hosts: TwoHosts, stockade: list[str]) -> None:
    marker = f"egress-helper-{os.getpid()}"
    hosts.run(hosts.host, *stockade, "--network", "egress", "--env", f"MARKER={marker}", "--", "true")
    inside = hosts.attempt(hosts.host, "sh", "-c", "sleep 0.3; ls -l /proc/[0-9]*/ns/net | wc -l; pgrep -x pasta")
    assert inside.returncode == 1, "pasta still runs"  # pgrep finds none


def test_a_missing_pasta_is_named_with_its_package(hosts: TwoHosts, stockade: list[str], tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ip").symlink_to(shutil.which("ip") or "ip")
    command = [*stockade[:7], f"PATH={programs}", *stockade[7:], "--network", "egress", "--", "true"]
    done = hosts.attempt(hosts.host, *command)
    assert (done.returncode, done.stderr) == (
        125,
        "error: `egress` needs `pasta`, which is not installed\nhint: `apt-get install passt`\n",
    )


def test_a_host_without_a_route_says_so(tmp_path: Path) -> None:
    environment = {"STOCKADE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2] / "src"), **os.environ}
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "stockade", "contain", "--network", "egress", "--", "true"],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 125
    assert "No external routable interface" in done.stderr
    assert done.stderr.endswith(
        "a network helper did not start, and has said why\n"
        "hint: for `egress` the host itself needs a way out: `ip route` shows it\n"
    )


def started(hosts: TwoHosts) -> contain.RunningJail:
    """The jail `test`, started in the background on the host."""
    code = "from stockade import contain; contain.launch('test', detach=True).close()"
    hosts.run(hosts.host, sys.executable, "-c", code)
    return contain.find("test")


def reached(address: str) -> str:
    """What the peer said to a command in the jail, or why it was not reached."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with contain.enter("test", ["/bin/nc", "-w", "2", address, "9000"], **pipes) as client:
        assert client.stdout is not None and client.stderr is not None
        return client.stdout.read().decode() + client.stderr.read().decode()


def helpers(jail: contain.RunningJail) -> tuple[int, int]:
    """The pasta that serves the jail, and its attendant, a child of the supervisor."""
    [attendant] = [pid for pid in children(jail.supervisor_pid) if pid != jail.init_pid]
    [pasta] = children(attendant)
    return pasta, attendant


def interfaces(pid: int) -> set[str]:
    return {line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]}


EGRESS = {"mode": "private", "egress": True}


@pytest.mark.parametrize("whole", [False, True], ids=["pasta", "attendant"])
def test_killed_pasta_leaves_no_way_out_and_is_told_until_the_jail_is_restarted(
    hosts: TwoHosts, jail: Builder, *, whole: bool
) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "1000"]}, "network": EGRESS})
    found = started(hosts)
    assert until(lambda: reached(PEER) == "the peer")
    pasta, attendant = helpers(found)
    os.kill(attendant if whole else pasta, signal.SIGKILL)
    assert until(lambda: contain.find("test").helper_lost)
    assert until(lambda: not exists(pasta) and not exists(attendant))
    assert interfaces(found.init_pid) == {"lo"}
    assert all("Network is unreachable" in reached(address) for address in (PEER, PEER6))
    assert "No route to host" in reached(HOST)  # by the route that refuses it, which stays
    assert exists(found.pid)
    assert until(lambda: "what it carried is cut off until the jail is restarted" in log_path("test").read_text())
    contain.stop("test", timeout_s=1)
    assert list(places.run().iterdir()) == []
    again = started(hosts)
    assert not again.helper_lost
    assert until(lambda: reached(PEER) == "the peer")
    pasta, attendant = helpers(again)
    contain.stop("test", timeout_s=1)
    assert until(lambda: not exists(pasta) and not exists(attendant))


@pytest.mark.slow
def test_next_life_of_a_jail_has_its_way_out_again(hosts: TwoHosts, jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "1000"], "restart": "always"}, "network": EGRESS})
    first = started(hosts)
    os.kill(helpers(first)[0], signal.SIGKILL)
    assert until(lambda: contain.find("test").helper_lost)
    os.kill(first.pid, signal.SIGKILL)
    assert until(lambda: contain.find("test").restarts == 1 and contain.find("test").init_pid != 0)
    assert until(lambda: not contain.find("test").helper_lost)
    assert until(lambda: reached(PEER) == "the peer")
