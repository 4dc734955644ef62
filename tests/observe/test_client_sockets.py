"""Unix sockets of a service that runs elsewhere, as clients in a view find them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from stockade import observe
from stockade.observe.exercise import client

PYTHON = "/usr/bin/python3"
pytestmark = pytest.mark.usefixtures("as_root")

SERVER = """
import os, socket, sys
os.makedirs("/run/greeter"); os.unlink("/etc/hostname")
bound = []
for path in ("/run/greeter/socket", "/etc/hostname", "/run/other"):
    bound.append(socket.socket(socket.AF_UNIX)); bound[-1].bind(path)
os.unlink("/run/other"); open("/run/other", "w").write("no socket")
bound[0].listen(); print("up", flush=True)
while True:
    peer, _ = bound[0].accept(); peer.send(b"hello"); peer.close()
"""
ASK = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/greeter/socket'); print(s.recv(9).decode())"


@pytest.fixture
def clients() -> Iterator[observe.View]:
    """A view for clients of a server that has bound three sockets in another view."""
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reader)
        jail = stack.enter_context(observe.View.open())
        stack.enter_context(
            jail.spawn((PYTHON, "-c", SERVER), environment={}, stdout=writer, stderr=writer, services=False)
        )
        os.close(writer)
        assert os.read(reader, 999) == b"up\n"
        yield stack.enter_context(observe.View.open(network_of=jail.pid, service_root_of=jail.pid))


def test_a_client_finds_a_socket_at_its_own_path_and_again(clients: observe.View) -> None:
    run = client(clients)
    for _ in range(2):
        outcome = run((PYTHON, "-c", ASK), b"", 10.0)
        assert (outcome.status, outcome.stdout, outcome.stderr) == (0, b"hello\n", b"")


def test_a_socket_hides_no_file_of_the_clients_and_nothing_but_a_socket_is_shown(clients: observe.View) -> None:
    script = "test -f /etc/hostname && test -S $STOCKADE_ROOT/etc/hostname && test ! -e /run/other && echo $?"
    outcome = client(clients)(("sh", "-c", script), b"", 10.0)
    assert (outcome.status, outcome.stdout, outcome.stderr) == (0, b"0\n", b"")
