"""What passes a published port arrives whole, in order, and at once: TCP and UDP, IPv4 and IPv6."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import publishedpeer
import pytest
from conftest import Builder
from processes import children, until
from test_walls_ordinary import facts, kind, place  # the fixtures of an ordinary user

from stockade import contain

__all__ = ["kind", "place"]

PEER = Path(publishedpeer.__file__)
MOUNTS = [{"source": "/usr", "target": "/usr"}, {"source": str(PEER.parent), "target": "/mnt"}]
SECONDS = 20
#: What one connection may move before the others get their turn (warden/forward.c).
TURN = 4 << 20


def free_port(host: str) -> int:
    """A port that is free for TCP and for UDP."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        with socket.create_server((host, 0), family=family) as taken, socket.socket(family, socket.SOCK_DGRAM) as other:
            port = int(taken.getsockname()[1])
            try:
                other.bind((host, port))
            except OSError:
                continue
            return port


class Service:
    """A jail with the service on `inside`, published at `outside`."""

    def __init__(self, jail: Builder, outside: str, inside: str) -> None:
        self.family = socket.AF_INET6 if ":" in outside else socket.AF_INET
        self.host, self.port = outside, free_port(outside)
        address = f"[{outside}]" if ":" in outside else outside
        network = {"mode": "private", "publish": [f"{address}:{self.port}:80{way}" for way in ("", "/udp")]}
        command = ["/usr/bin/python3", "-I", f"/mnt/{PEER.name}", inside]
        jail(spec={"service": {"command": command}, "network": network, "mounts": MOUNTS})
        contain.launch("test", detach=True).close()
        assert until(self.is_up), b"".join(contain.logs("test")).decode()

    def is_up(self) -> bool:
        try:
            with self.connect() as client:
                client.sendall(b"give 1\n")
                return len(client.recv(1)) == 1
        except OSError:
            return False

    def forwarder(self) -> int:
        return next(
            pid for pid in children(contain.find("test").supervisor_pid)
            if b"forward" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )  # fmt: skip

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=SECONDS)

    def datagrams(self) -> socket.socket:
        made = socket.socket(self.family, socket.SOCK_DGRAM)
        made.settimeout(SECONDS)
        made.connect((self.host, self.port))
        return made


@pytest.fixture(params=[("127.0.0.1", "0.0.0.0"), ("::1", "0.0.0.0"), ("127.0.0.1", "::1")], ids="-".join)
def service(request: pytest.FixtureRequest, jail: Builder) -> Service:
    return Service(jail, *request.param)


@pytest.fixture
def plain(jail: Builder) -> Service:
    return Service(jail, "127.0.0.1", "0.0.0.0")


def given(size: int) -> str:
    """Digest of what `give` sends."""
    whole, rest = divmod(size, len(publishedpeer.PATTERN))
    hasher = hashlib.sha256()
    for _ in range(whole):
        hasher.update(publishedpeer.PATTERN)
    hasher.update(publishedpeer.PATTERN[:rest])
    return hasher.hexdigest()


def taken(client: socket.socket, size: int) -> str:
    """Digest of the next `size` bytes; TimeoutError when they do not come."""
    hasher, left = hashlib.sha256(), size
    while left > 0 and (data := client.recv(min(left, 1 << 20))):
        hasher.update(data)
        left -= len(data)
    assert left == 0, f"{left} of {size} bytes are missing"
    return hasher.hexdigest()


def said(client: socket.socket) -> str:
    """What comes until the service has no more to say."""
    return b"".join(iter(lambda: client.recv(4096), b"")).decode()


def test_answers_and_questions_arrive_whole(service: Service) -> None:
    size = 3 * TURN + 12345
    with service.connect() as client:
        client.sendall(b"give %d\n" % size)
        assert taken(client, size) == given(size)
    with service.connect() as client:
        client.sendall(b"digest\n" + publishedpeer.PATTERN * 9)
        client.shutdown(socket.SHUT_WR)
        assert said(client) == hashlib.sha256(publishedpeer.PATTERN * 9).hexdigest()


def test_datagrams_go_to_and_fro(service: Service) -> None:
    with service.datagrams() as one, service.datagrams() as other:
        one.send(b"one")
        other.send(b"other")
        assert (one.recv(100), other.recv(100)) == (b"<one", b"<other")
        large = os.urandom(40_000)
        one.send(large)
        assert one.recv(65536) == b"<" + large


def test_answer_is_never_held_back_until_something_else_comes(plain: Service) -> None:
    """Not even one that ends where the forwarder's turn ends: it is all there when the forwarder begins to read."""
    forwarder = plain.forwarder()
    with ExitStack() as stack:
        clients = [stack.enter_context(plain.connect()) for _ in range(6)]
        for client in clients:
            client.sendall(b"give %d\n" % (16 * TURN))  # after which the kernel's buffers take whole answers
            assert taken(client, 16 * TURN) == given(16 * TURN)
        for size in range(TURN + 50_000, TURN + 800_000, 100_000):
            for client in clients:
                client.sendall(b"later %d\n" % size)
            time.sleep(0.05)
            os.kill(forwarder, signal.SIGSTOP)
            time.sleep(0.15)
            os.kill(forwarder, signal.SIGCONT)
            for client in clients:
                assert taken(client, size) == given(size)


def test_client_that_reads_nothing_holds_up_nobody_and_loses_nothing(plain: Service) -> None:
    size = 16 * TURN
    with plain.connect() as idle, plain.connect() as other:
        idle.sendall(b"give %d\n" % size)
        for _ in range(50):
            other.sendall(b"give 1000\n")
            assert taken(other, 1000) == given(1000)
        assert taken(idle, size) == given(size)


def test_many_clients_at_once_get_each_their_own(plain: Service) -> None:
    sizes = [1000 + 7919 * number for number in range(200)]
    with ExitStack() as stack:
        clients = [stack.enter_context(plain.connect()) for _ in sizes]
        for client, size in zip(clients, sizes, strict=True):
            client.sendall(b"give %d\n" % size)
        for client, size in zip(clients, sizes, strict=True):
            assert taken(client, size) == given(size)


def test_both_ways_at_full_speed_at_once(plain: Service) -> None:
    """Neither way waits for the other, though both fill every buffer."""
    with plain.connect() as client:
        count = 40
        sender = threading.Thread(target=client.sendall, args=(b"give 1000000\n" * count + b"digest\n",))
        sender.start()
        assert taken(client, 1_000_000 * count) == hashlib.sha256(publishedpeer.PATTERN[:1_000_000] * count).hexdigest()
        sender.join(SECONDS)
        client.sendall(publishedpeer.PATTERN * 5)
        client.shutdown(socket.SHUT_WR)
        assert said(client) == hashlib.sha256(publishedpeer.PATTERN * 5).hexdigest()


def test_reset_of_the_service_reaches_the_client(plain: Service) -> None:
    with plain.connect() as client, pytest.raises(ConnectionResetError):
        client.sendall(b"reset\n")
        client.recv(1)


def test_port_that_nobody_listens_on_resets(jail: Builder) -> None:
    port = free_port("127.0.0.1")
    network = {"mode": "private", "publish": [f"{port}:80"]}
    jail(spec={"service": {"command": ["/bin/sleep", "100"]}, "network": network})
    contain.launch("test", detach=True).close()
    with pytest.raises(ConnectionResetError), socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        client.recv(1)


def test_more_peers_than_are_kept_push_out_the_oldest(plain: Service) -> None:
    """The number of UDP peers is the client's to choose, and must cost no more than a fixed number of descriptors."""
    with ExitStack() as stack:
        peers = [stack.enter_context(plain.datagrams()) for _ in range(600)]
        for number, peer in enumerate(peers):
            peer.send(b"%d" % number)
            assert peer.recv(100) == b"<%d" % number
        assert len(os.listdir(f"/proc/{plain.forwarder()}/fd")) < 512 + 16
        peers[0].send(b"again")
        assert peers[0].recv(100) == b"<again"


ORDINARY = """
import hashlib, socket
from test_published import MOUNTS, PEER, free_port, given, taken
hosts = ("127.0.0.1", "::1")
ports = {host: free_port(host) for host in hosts}
publish = [f"{name}:{ports[host]}:80{way}" for host, name in zip(hosts, ("127.0.0.1", "[::1]")) for way in ("", "/udp")]
generation = build({
    "service": {"command": ["/usr/bin/python3", "-I", f"/mnt/{PEER.name}", "0.0.0.0"], "user": "www"},
    "network": {"mode": "private", "publish": publish},
    "mounts": MOUNTS,
})
contain.launch("test", detach=True).close()

def is_up(host):
    try:
        with socket.create_connection((host, ports[host]), timeout=10) as client:
            client.sendall(b"give 20000000\\n")
            return taken(client, 20_000_000) == given(20_000_000)
    except OSError:
        return False

def echoed(host):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect((host, ports[host]))
        client.send(b"hello")
        return client.recv(100).decode()

streams = [until(lambda: is_up(host)) for host in hosts]
datagrams = [echoed(host) for host in hosts]
contain.stop("test", timeout_s=0.5)
tell(streams=streams, datagrams=datagrams)
"""


@pytest.mark.usefixtures("kind")
def test_ports_of_an_ordinary_users_jail(place: Path) -> None:
    told = facts(place, ORDINARY)
    assert told == {"streams": [True, True], "datagrams": ["<hello", "<hello"]}
