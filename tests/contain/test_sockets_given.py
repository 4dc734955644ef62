"""Sockets that a launch opens or is given: as many as it carries work, and more are refused with their number."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Builder
from processes import until

from stockade import contain, lifecycle
from stockade.contain.network import open_listener
from stockade.contain.starting import current
from stockade.errors import UsageError, WallError

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


@pytest.mark.parametrize("open_files", [None, 40])
def test_sockets_that_come_through_the_gate_are_the_service_s(jail: Builder, open_files: int | None) -> None:
    jail(spec={"limits": {"open_files": open_files}})
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno() for _ in range(32)]
        given = stack.enter_context(at_gate(32))
        given.release(opened)
        assert given.stdout is not None and given.stdout.read() == b"%d of 32\n" % 32


def test_directory_never_comes_through_the_gate(jail: Builder, tmp_path: Path) -> None:
    jail()
    descriptor = os.open(tmp_path, os.O_PATH)
    try:
        with at_gate(1) as given, pytest.raises(WallError, match="a directory is open there"):
            given.release([descriptor])
    finally:
        os.close(descriptor)


def test_gate_that_closes_with_no_socket_ends_the_launch(jail: Builder) -> None:
    jail()
    given = at_gate(1)
    given.close()
    assert until(lambda: contain.running() == ())


def at_gate(count: int) -> contain.Running:
    """A jail whose service waits for so many sockets."""
    command = ["/bin/sh", "-c", COUNT.partition("; sleep")[0]]
    return contain.launch_generation(
        current("test"), name="test", argv=command, gate=True, at_gate=count, stdout=subprocess.PIPE
    )


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in taken]
