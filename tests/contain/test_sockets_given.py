"""Sockets that a launch opens or is given: as many as it carries work, and more are refused with their number."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

import pytest
from conftest import Builder
from processes import until

from stockade import contain, lifecycle
from stockade.contain.network import open_listener
from stockade.errors import UsageError

COUNT = "i=3; while test -e /proc/self/fd/$i; do i=$((i + 1)); done; echo $((i - 3)) of $LISTEN_FDS; sleep 60"


def test_as_many_sockets_as_may_be_given_and_published_are_there(jail: Builder) -> None:
    host = f"127.88.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"  # nobody else takes a port of it meanwhile
    network = {"mode": "private", "publish": [f"{host}:{port}:80" for port in free_ports(20, host)]}
    jail(spec={"service": {"command": ["/bin/sh", "-c", COUNT]}, "network": network})
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno() for _ in range(32)]
        contain.launch("test", detach=True, sockets=opened).close()
    assert until(lambda: b"32 of 32\n" in b"".join(contain.logs("test")))


def test_more_given_sockets_are_refused_with_their_number(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", COUNT]}})
    with ExitStack() as stack, pytest.raises(UsageError, match="33 sockets are to be given.* 32 at most"):
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno() for _ in range(33)]
        contain.launch("test", detach=True, sockets=opened)
    assert contain.running() == ()


@pytest.mark.parametrize(
    "network",
    [
        {"listen": [str(port) for port in range(3000, 3033)]},
        {"mode": "private", "publish": [f"{port}:{port}" for port in range(3000, 3053)]},
        {"mode": "private", "publish": [f"{port}:{port}" for port in range(3000, 3033)], "listen": [*"123456789"] * 3},
    ],
)
def test_a_spec_with_too_many_is_refused_when_it_is_built(jail: Builder, network: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="sockets are to be"):
        jail(spec={"network": network})


def test_a_socket_for_datagrams_has_room_for_many_peers_at_once() -> None:
    port = free_ports(1)[0]
    with socket.socket(fileno=open_listener(f"127.0.0.1:{port}/udp")) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            for number in range(1000):
                peer.sendto(str(number).encode(), ("127.0.0.1", port))
        server.settimeout(10)
        assert [int(server.recv(10)) for _ in range(400)] == list(range(400))


def test_other_sockets_than_the_specs_make_a_service_ready_too(jail: Builder) -> None:
    named, other = free_ports(2)
    service = {"command": ["/bin/sleep", "60"], "ready": {"tcp": named, "timeout_s": 3}}
    jail(spec={"service": service, "network": {"listen": [str(named)]}})
    assert lifecycle.start("test", listen=[str(other)]).pid


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in taken]
