"""Services that need their sockets from whoever starts them, as sd_listen_fds(3) has it: built unedited, then started.

They are real programs, and clients ask them in the exercises and after the start, as root and as an ordinary user.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "contain"))
import ordinary

from stockade import specfile
from stockade.doctor import examine
from stockade.policy import changes
from stockade.records.spec import Network

PYTHON = "/usr/bin/python3"
PROXY = "/usr/lib/systemd/systemd-socket-proxyd"
NOBODY = 65534
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="another user is made for this: run the tests as root"),
    pytest.mark.skipif(
        bool(examine().missing),
        reason=f"this host lacks {', '.join(feature.name for feature in examine().missing)}: see `stockade doctor`",
    ),
]

#: Answers with the turn of the socket that was asked, and ends at once where it was not started with sockets.
IN_PYTHON = """
import fcntl, os, select, socket, sys
def is_open(number):
    try: return fcntl.fcntl(number, fcntl.F_GETFD) == 0
    except OSError: return False
if os.environ.get("LISTEN_PID") != str(os.getpid()):
    sys.exit("this service needs LISTEN_FDS")
given = [socket.socket(fileno=3 + turn) for turn in range(int(os.environ["LISTEN_FDS"]))]
assert os.environ["NGINX"] == "".join(f"{one.fileno()};" for one in given)
assert [number for number in range(256) if is_open(number)] == list(range(3 + len(given)))
while True:
    for one in select.select(given, [], [])[0]:
        said = b"socket %d of %d" % (given.index(one), len(given))
        if one.type == socket.SOCK_DGRAM:
            one.sendto(said, one.recvfrom(9)[1])
        else:
            with one.accept()[0] as client:
                client.sendall(said)
"""

IN_C = r"""
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
    const char *pid = getenv("LISTEN_PID"), *given = getenv("LISTEN_FDS");
    const int count = given == NULL ? 0 : atoi(given);
    struct pollfd watched[32];

    if (pid == NULL || atoi(pid) != getpid() || count < 1 || count > 32) {
        fprintf(stderr, "this service needs LISTEN_FDS\n");
        return 1;
    }
    for (int i = 0; i < count; i++)
        watched[i] = (struct pollfd){.fd = 3 + i, .events = POLLIN};
    while (poll(watched, (nfds_t)count, -1) > 0)
        for (int i = 0; i < count; i++) {
            struct sockaddr_storage peer;
            socklen_t size = sizeof peer, type_size = sizeof(int);
            char text[64];
            int type;
            if (watched[i].revents == 0)
                continue;
            snprintf(text, sizeof text, "socket %d of %d", i, count);
            getsockopt(3 + i, SOL_SOCKET, SO_TYPE, &type, &type_size);
            if (type == SOCK_DGRAM) {
                char byte;
                recvfrom(3 + i, &byte, 1, 0, (struct sockaddr *)&peer, &size);
                sendto(3 + i, text, strlen(text), 0, (struct sockaddr *)&peer, size);
            } else {
                const int client = accept(3 + i, NULL, NULL);
                if (write(client, text, strlen(text)) < 0)
                    return 1;
                close(client);
            }
        }
    return 1;
}
"""

#: Asks one socket; the words are its kind, address and port.
ASK = """
import socket, sys
kind, address, port = sys.argv[1:]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as client:
    client.settimeout(10)
    client.connect((address, int(port)))
    client.send(b"?")
    print(client.recv(99).decode())
"""

#: The way of a user, in whose home it runs: writes the spec, builds, starts (or something else), asks each socket.
WAY = """
import json, os, subprocess, sys
from pathlib import Path
answers = []
place, text, then, asked = Path(os.environ["STOCKADE_HOME"]), {text!r}, {then!r}, {asked!r}
(place / "config").mkdir(parents=True)
(place / "config/given.toml").write_text(text)
done = []
def run(*words, timeout=100):
    done.append(subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout))
    return done[-1]
def stockade(*words):
    return run(sys.executable, "-m", "stockade", *words)
try:
    built = stockade("build", "given", "--json")
    if built.returncode == 0 and stockade(*then).returncode == 0:
        answers = [run({PYTHON!r}, "-c", {ASK!r}, *one).stdout for one in asked]
finally:
    stockade("stop", "given", "--timeout", "0")
    stockade("rm", "--force", "given")
print(json.dumps([[one.returncode, one.stdout, one.stderr] for one in done] + [answers]))
"""


Done = subprocess.CompletedProcess[str]


def as_root(code: str) -> Done:
    with tempfile.TemporaryDirectory(prefix="stockade-root-", dir="/var/tmp") as place:
        environment = {**os.environ, "STOCKADE_HOME": f"{place}/home", "PYTHONPATH": ":".join(filter(None, sys.path))}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False
        )


def as_user_with_range(code: str) -> Done:
    with ordinary.home(ranges=True) as place:
        return ordinary.python(place, code, timeout_s=200)


def as_user_without(code: str) -> Done:
    with ordinary.home(ranges=False) as place:
        return ordinary.python(place, code, timeout_s=200)


Who = Callable[[str], Done]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that everybody, and a view, can see."""
    with tempfile.TemporaryDirectory(prefix="stockade-given-", dir="/var/tmp") as made:
        os.chmod(made, 0o755)
        yield Path(made)


def compiled(program: Path, *options: str) -> str:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("`apt-get install gcc libc6-dev`: the service of this test is a C program")
    subprocess.run([compiler, *options, "-x", "c", "-", "-o", program], input=IN_C, text=True, check=True, timeout=60)
    return str(program)


@pytest.fixture(scope="module")
def in_c(place: Path) -> str:
    return compiled(place / "given")


def ports(count: int, address: str = "127.0.0.1") -> list[int]:
    taken = [socket.create_server((address, 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return found


def spec(
    command: list[str], listen: list[str], asked: list[list[str]], *, top: str = "", service: str = "",
    network: str = "", more: str = "",
) -> str:  # fmt: skip
    """TOML whose exercises ask each socket of `asked`, in their order."""
    exercises = "".join(
        f"[[exercises]]\ncommand = {json.dumps([PYTHON, '-c', ASK, *one])}\nstdout = 'socket {turn} of {len(asked)}'\n"
        for turn, one in enumerate(asked)
    )
    return (
        f'name = "given"\n{top}\n[service]\ncommand = {json.dumps(command)}\nuser = "nobody"\n{service}\n'
        f"[network]\nlisten = {json.dumps(listen)}\n{network}\n{exercises}{more}"
    )


def way(
    who: Who, text: str, asked: list[list[str]], then: tuple[str, ...] = ("start", "given")
) -> tuple[list[Done], list[str]]:
    """What the commands said, the build first and `then` next, and what each socket of `asked` answered."""
    done = who(WAY.format(text=text, then=then, asked=asked, ASK=ASK, PYTHON=PYTHON))
    assert done.returncode == 0, done.stderr
    *said, answers = json.loads(done.stdout)
    return [subprocess.CompletedProcess((), *one) for one in said], answers


def went(who: Who, text: str, asked: list[list[str]]) -> dict[str, Any]:
    """Build and start as `who`, who asks then; the build's report."""
    said, answers = way(who, text, asked)
    assert said[0].returncode == 0, said[0].stderr
    assert answers == [f"socket {turn} of {len(asked)}\n" for turn in range(len(asked))], said[1].stderr
    found: dict[str, Any] = json.loads(said[0].stdout)
    return found


EVERYBODY = pytest.mark.parametrize("who", [as_root, as_user_with_range, as_user_without])


@EVERYBODY
def test_python_service_is_built_and_started_with_sockets_of_each_kind_in_their_order(who: Who) -> None:
    one, two, three, four = ports(4)
    listen = [str(one), f"127.0.0.1:{two}/udp", f"[::1]:{three}", f"0.0.0.0:{four}/tcp"]
    asked = [["tcp", "127.0.0.1", str(one)], ["udp", "127.0.0.1", str(two)], ["tcp", "::1", str(three)],
             ["tcp", "127.0.0.1", str(four)]]  # fmt: skip
    report = went(who, spec([PYTHON, "-c", IN_PYTHON], listen, asked), asked)
    assert [exercise["passed"] for exercise in report["exercises"]] == [True] * 4
    assert report["proposal"]["ports"] == []


@EVERYBODY
def test_c_service_is_built_from_a_new_spec_and_started_with_the_socket_that_tells_it_is_ready(
    who: Who, in_c: str
) -> None:
    one, two = ports(2)
    asked = [["tcp", "127.0.0.1", str(one)], ["udp", "127.0.0.1", str(two)]]
    exercises = [[PYTHON, "-c", ASK, *words] for words in asked]
    text = specfile.new("given", [in_c], exercises, user="nobody", tcp=one, listen=[str(one), f"{two}/udp"])
    assert went(who, text, asked)["proposal"]["preset"] == "strict"


@EVERYBODY
def test_socket_comes_to_a_service_that_may_open_no_file_of_its_own(who: Who, place: Path) -> None:
    """It has no room under the limit, which is for what the service opens itself (getrlimit(2))."""
    (given,) = ports(1)
    asked = [["udp", "127.0.0.1", str(given)]]
    program = compiled(place / "static", "-static")
    went(who, spec([program], [f"{given}/udp"], asked, more="[limits]\nopen_files = 3"), asked)


@EVERYBODY
def test_service_with_its_own_network_has_both_kinds_of_sockets_in_one(who: Who) -> None:
    """An exercise reaches the given sockets and those that the service makes itself."""
    given, own = ports(2)
    code = IN_PYTHON.replace("while True", f"given.append(socket.create_server(('127.0.0.1', {own})))\nwhile True")
    asked = [["tcp", "127.0.0.1", str(given)], ["tcp", "127.0.0.1", str(own)]]
    network = f'mode = "private"\npublish = ["{own}:{own}"]'
    report = went(who, spec([PYTHON, "-c", code], [str(given)], asked, network=network), asked)
    assert report["proposal"]["ports"] == [f"{own}/tcp"]


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
@pytest.mark.parametrize("who", [as_root, as_user_with_range])
def test_socket_of_an_address_that_only_the_host_has_is_there_for_the_exercises(who: Who, address: str) -> None:
    """No host has these (RFC 5737, RFC 3849), so the service is not started; the build says that it works."""
    written = f"[{address}]:81" if ":" in address else f"{address}:81"
    text = spec([PYTHON, "-c", IN_PYTHON], [written], [["tcp", address, "81"]])
    (built, started, *_), _ = way(who, text, [])
    assert built.returncode == 0, built.stderr
    assert [exercise["passed"] for exercise in json.loads(built.stdout)["exercises"]] == [True]
    assert f"cannot listen on {address} port 81/tcp" in started.stderr


@pytest.mark.skipif(not os.path.exists(PROXY), reason="`apt-get install systemd`: its proxy is this test's service")
def test_program_of_debian_that_takes_nothing_but_sockets_is_built_and_started() -> None:
    """systemd-socket-proxyd(8) carries on to a server: the exercise's own, and then one of the host's network."""
    given, behind = ports(2)
    answer = "socket.accept()[0].sendall(b'socket 0 of 1')"
    server = f"import socket as s; socket = s.create_server(('127.0.0.1', {behind})); {answer}"
    script = (
        f'{PYTHON} -c "$1" & until grep -q ":{behind:04X} 00000000:0000 0A" /proc/net/tcp; do sleep 0.05; done; '
        f'{PYTHON} -c "$2" tcp 127.0.0.1 {given}; wait'
    )
    command = json.dumps(["sh", "-c", script, "sh", server, ASK])
    exercise = f"[[exercises]]\ncommand = {command}\nstdout = 'socket 0 of 1'\n"
    text = spec([PROXY, f"127.0.0.1:{behind}"], [str(given)], [], network='mode = "host"', more=exercise)
    taken = f"import socket as s; socket = s.socket(fileno=0); {answer}"
    with (
        socket.create_server(("127.0.0.1", behind)) as beyond,
        subprocess.Popen([PYTHON, "-c", taken], stdin=beyond) as answering,
    ):
        try:
            went(as_root, text, [["tcp", "127.0.0.1", str(given)]])
        finally:
            answering.kill()


def test_plain_chroot_is_tried_and_started_with_its_sockets() -> None:
    (given,) = ports(1)
    asked = [["tcp", "127.0.0.1", str(given)]]
    went(as_root, spec([PYTHON, "-c", IN_PYTHON], [str(given)], asked, top='walls = ["chroot"]',
                       network='mode = "host"'), asked)  # fmt: skip


def test_service_that_names_no_socket_is_told_of_the_key() -> None:
    text = spec([PYTHON, "-c", IN_PYTHON], [], [["tcp", "127.0.0.1", "81"]])
    (built, *_), _ = way(as_root, text, [])
    assert built.returncode == 1
    assert "hint: name the sockets that it is to be given: `listen` in `[network]`" in built.stderr


def test_service_without_an_exercise_is_observed_until_it_serves() -> None:
    """The port is open before the service is: that it is ready is told by the service itself."""
    (given,) = ports(1)
    code = IN_PYTHON.replace("while True", "import email.mime.text, zoneinfo\nwhile True")
    text = spec([PYTHON, "-c", code], [str(given)], [], service=f"ready = {{ tcp = {given} }}")
    went(as_root, text, [["tcp", "127.0.0.1", str(given)]])


def test_command_in_the_place_of_the_service_is_tried_without_its_sockets() -> None:
    (given,) = ports(1)
    text = spec([PYTHON, "-c", IN_PYTHON], [str(given)], [["tcp", "127.0.0.1", str(given)]])
    seen = "import os, sys; sys.exit('LISTEN_FDS' in os.environ)"
    (built, asked, *_), _ = way(as_root, text, [], then=("why", "given", "--json", "--", PYTHON, "-c", seen))
    assert built.returncode == 0, built.stderr
    assert json.loads(asked.stdout)["works"], asked.stdout


def test_more_sockets_than_a_launch_carries_are_refused_before_anything_is_observed() -> None:
    text = spec([PYTHON, "-c", IN_PYTHON], [str(port) for port in range(3000, 3100)], [])
    (built, *_), _ = way(as_root, text, [])
    assert built.returncode == 2
    assert "error: 100 sockets are to be given to the service, and a jail has 32 at most" in built.stderr
    assert "observing" not in built.stderr


def test_as_many_sockets_as_a_launch_carries_are_given_in_a_build_too() -> None:
    given = ports(32)
    asked = [["tcp", "127.0.0.1", str(port)] for port in given]
    text = spec([PYTHON, "-c", IN_PYTHON], [str(port) for port in given], [])
    last = spec([PYTHON], [], asked).rpartition("[[exercises]]")[2]
    went(as_root, f"{text}[[exercises]]{last}", asked)


def test_cure_that_is_tried_leaves_a_service_its_sockets() -> None:
    given = specfile.loads(spec(["/bin/true"], ["80", "53/udp"], []), "given.toml")
    assert changes.network(egress=True)(given).network == Network(mode="private", listen=("80", "53/udp"), egress=True)
