from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from stockade.observe import Observation
from stockade.observe.ready import conditions, sockets
from stockade.records.spec import Exercise, Ready

PYTHON = "/usr/bin/python3"
Outside = Callable[..., Observation]

LATE = """
import os, socket, time
print("begun", flush=True); time.sleep(0.3)
{deed}
print("done", flush=True); time.sleep(100)
"""


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("deed", "ready"),
    [
        ("s = socket.create_server(('127.0.0.1', 4242))", Ready(tcp=4242)),
        ("s = socket.create_server(('::1', 4242), family=socket.AF_INET6)", Ready(tcp=4242)),
        ("s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.1', 4242))", Ready(udp=4242)),
        ("s = socket.socket(socket.AF_UNIX); s.bind('/run/x.sock'); s.listen()", Ready(unix="/run/x.sock")),
        (
            "os.chdir('/run'); s = socket.socket(socket.AF_UNIX); s.bind('x.sock'); s.listen()",
            Ready(unix="/var/run/x.sock"),
        ),
        ("open('/run/is-up', 'w')", Ready(file="/run/is-up")),
        ("open('/run/is-up', 'w')", Ready(command=("test", "-e", "/run/is-up"))),
        ("print('listening on 1')", Ready(log=r"^listening on \d$")),
    ],
    ids=["tcp", "tcp6", "udp", "unix", "unix, relative", "file", "command", "log"],
)
def test_service_counts_as_ready_only_when_the_condition_holds(deed: str, ready: Ready, outside: Outside) -> None:
    exercise = Exercise(command=("true",))
    observation = outside(PYTHON, "-c", LATE.format(deed=deed), ready=ready, exercises=(exercise,))
    assert observation.seconds["start"] >= 0.3
    assert observation.seconds["start"] < 10


@pytest.mark.usefixtures("as_root")
def test_waiting_for_a_port_does_not_connect_to_it(outside: Outside) -> None:
    code = """
import socket
server = socket.create_server(("127.0.0.1", 4242)); server.settimeout(0.5)
try: server.accept(); print("a client came")
except TimeoutError: print("nobody came")
import time; time.sleep(100)
"""
    observation = outside(PYTHON, "-uc", code, ready=Ready(tcp=4242), exercises=(Exercise(command=("sleep", "0.7")),))
    assert observation.log == "nobody came\n"


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    "early", ["", "early = socket.socket(type=socket.SOCK_DGRAM); early.bind(('127.0.0.1', 4241))"],
    ids=["silent", "listening already"],
)  # fmt: skip
def test_without_a_condition_a_client_waits_for_a_service_that_is_still_at_work(outside: Outside, early: str) -> None:
    code = f"""
import socket, time
{early}
while time.process_time() < 1.5: pass
server = socket.create_server(("127.0.0.1", 4242)); time.sleep(100)
"""
    client = (PYTHON, "-c", "import socket; socket.create_connection(('127.0.0.1', 4242))")
    assert outside(PYTHON, "-c", code, exercises=(Exercise(command=client),)).exercises[0].passed


@pytest.mark.usefixtures("as_root")
def test_a_service_that_listens_and_is_never_idle_is_not_waited_for_beyond_its_time(outside: Outside) -> None:
    code = """
import socket
server = socket.create_server(("127.0.0.1", 4242))
while True: pass
"""
    client = (PYTHON, "-c", "import socket; socket.create_connection(('127.0.0.1', 4242))")
    observation = outside(PYTHON, "-c", code, exercises=(Exercise(command=client),), ready=Ready(timeout_s=1.0))
    assert observation.exercises[0].passed
    assert observation.seconds["start"] >= 1.0


@pytest.mark.usefixtures("as_root")
def test_a_command_that_sleeps_is_waited_for_to_its_end(outside: Outside) -> None:
    observation = outside("sh", "-c", "sleep 1.5; cat /etc/hostname")
    assert observation.status == 0
    assert any(access.path == "/etc/hostname" for access in observation.trace.accesses)


def test_own_sockets_are_found_in_proc(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        path = os.fspath(tmp_path / "with space")
        unix.bind(path)
        found = sockets(os.getpid())
        assert tcp.getsockname()[1] in found.tcp
        assert udp.getsockname()[1] in found.udp and udp.getsockname()[1] not in found.tcp
        assert path in found.unix
        assert path not in sockets(os.getpid(), ignored=frozenset((path,))).unix


def test_conditions_are_named_for_a_message() -> None:
    assert conditions(Ready()) == ()
    assert conditions(Ready(tcp=22, file="/run/x", log="up")) == (
        "TCP port 22 is listened to",
        "`/run/x` is there",
        "its output matches `up`",
    )
