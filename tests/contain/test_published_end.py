"""When a jail ends, clients of its published ports still get what its service said last, and the ports are free."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest
from conftest import Builder
from processes import exists, until
from test_published import MOUNTS, SECONDS, free_port

from stockade import contain

# Says as much as is taken while the client reads nothing, tells how much that was, and ends.
SERVICE = """
import select, socket
server = socket.create_server(("127.0.0.1", 80))
print("up", flush=True)
client, _ = server.accept()
client.recv(1)
client.setblocking(False)
said = 0
while select.select([], [client], [], 0.5)[1]:
    said += client.send(bytes(1 << 16))
print("said", said, flush=True)
"""


def log() -> list[str]:
    return b"".join(contain.logs("test")).decode().split()


def started(jail: Builder, script: str, protocol: str = "tcp", restart: str = "no") -> int:
    """A jail that runs `script` and says "up"; the port that its port 80 is published at."""
    port = free_port("127.0.0.1")
    jail(spec={
        "service": {"command": ["/usr/bin/python3", "-I", "-c", script], "restart": restart},
        "network": {"mode": "private", "publish": [f"127.0.0.1:{port}:80/{protocol}"]},
        "mounts": MOUNTS[:1],
    })  # fmt: skip
    contain.launch("test", detach=True).close()
    assert until(lambda: "up" in log(), seconds=SECONDS)
    return port


@pytest.mark.parametrize("restart", ["no", "always"])
def test_what_the_service_said_before_its_end_arrives(jail: Builder, restart: str) -> None:
    port = started(jail, SERVICE, restart=restart)
    init = contain.find("test").init_pid
    with socket.socket() as client:
        client.settimeout(SECONDS)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.connect(("127.0.0.1", port))
        client.sendall(b"?")
        assert until(lambda: not exists(init), seconds=SECONDS)
        heard = 0
        while data := client.recv(1 << 20):
            heard += len(data)
    words = log()
    assert heard == int(words[words.index("said") + 1])
    assert heard > 1 << 20, "nothing had to wait in the forwarder"


def test_a_client_that_takes_nothing_does_not_keep_the_port(jail: Builder) -> None:
    port = started(jail, SERVICE)
    supervisor = contain.find("test").supervisor_pid
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"?")
        assert until(lambda: not exists(supervisor), seconds=SECONDS)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
            again.listen()


# Answers each datagram with what it holds.
ECHO = """
import socket
from contextlib import ExitStack
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 80))
print("up", flush=True)
while True:
    data, peer = server.recvfrom(100)
    server.sendto(data, peer)
"""


def test_peers_that_were_answered_make_room_before_those_that_wait(jail: Builder) -> None:
    port = started(jail, ECHO, "udp")
    with ExitStack() as stack:
        for at_once in (1,) * 300 + (250,):  # together more than the forwarder keeps
            peers = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(at_once)]
            for peer in peers:
                peer.settimeout(SECONDS)
                peer.connect(("127.0.0.1", port))
            for number, peer in enumerate(peers):
                peer.send(str(number).encode())
            assert [peer.recv(100) for peer in peers] == [str(number).encode() for number in range(at_once)]
