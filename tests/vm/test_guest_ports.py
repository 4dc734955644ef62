"""Published ports of a guest over IPv4 and IPv6, TCP and UDP; and egress to a network that the test made."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Guests, free_port, needs, shell, until

from stockade import machines, places, specfile, workflow
from stockade.records.publish import Published
from stockade.vm import control, images, transfer

PACKAGES = (("slirp4netns", "slirp4netns"), ("curl", "curl"), ("gcc", "gcc"))

#: Sends each datagram back to whence it came. busybox has no such server.
ECHO = """
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
int main(int argc, char **argv)
{
    static char data[65536];
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argv[argc - 1]))};
    struct sockaddr_storage peer;
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (bind(fd, (struct sockaddr *)&place, sizeof place) != 0)
        return 1;
    for (;;) {
        socklen_t length = sizeof peer;
        ssize_t got = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&peer, &length);
        if (got >= 0)
            sendto(fd, data, (size_t)got, 0, (struct sockaddr *)&peer, length);
    }
}
"""
LOOPBACKS = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for UDP."""
    needs(*PACKAGES)
    place = tmp_path_factory.mktemp("echo")
    (place / "echo.c").write_text(ECHO)
    subprocess.run(["gcc", "-static", "-O1", "-o", place / "echo", place / "echo.c"], check=True, timeout=60)
    return place / "echo"


@pytest.fixture
def ports(guests: Guests, echo: Path) -> dict[tuple[str, str], int]:
    """A guest that serves on TCP and UDP, and its ports by protocol and address of the host."""
    found = {(kind, address): free_port() for kind in ("tcp", "udp") for address in LOOPBACKS}
    publish = tuple(
        Published(address=address, port=port, target=80 if kind == "tcp" else 53, protocol=kind)  # type: ignore[arg-type]
        for (kind, address), port in found.items()
    )
    name = guests.run("served", network="publish", publish=publish, walls=("jail", "vm")).name
    transfer.push(name, echo, "/root/echo")
    shell(name, "chmod 755 /root/echo; httpd -p 80 -h /srv; /root/echo 53 > /dev/null 2>&1 &")
    assert until(lambda: ":0035 " in shell(name, "cat /proc/net/udp") and ":0050 " in shell(name, "cat /proc/net/tcp6"))
    return found


def ask(address: str, port: int, data: bytes) -> bytes:
    """What comes back for a datagram; a lost one is sent again, as every client of UDP does."""
    with socket.socket(LOOPBACKS[address], socket.SOCK_DGRAM) as client:
        client.connect((address, port))
        client.settimeout(2)
        for _ in range(6):
            client.send(data)
            try:
                return client.recv(65536)
            except TimeoutError:
                continue
    return b"no answer"


@pytest.mark.parametrize("address", LOOPBACKS)
def test_published_ports_answer_over_both_protocols_of_the_internet(
    ports: dict[tuple[str, str], int], address: str
) -> None:
    host = f"[{address}]" if ":" in address else address
    done = subprocess.run(
        ["curl", "-sS", "-g", "-f", "-m", "20", f"http://{host}:{ports['tcp', address]}/"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.stdout == "a page from inside\n", done.stderr
    for size in (1, 512, 1472, 9000, 60000):
        data = os.urandom(size)
        assert ask(address, ports["udp", address], data) == data, size
    # One port of the two families is not the other's.
    other = next(one for one in LOOPBACKS if one != address)
    with socket.socket(LOOPBACKS[other], socket.SOCK_STREAM) as client, pytest.raises(ConnectionRefusedError):
        client.connect((other, ports["tcp", address]))


def test_each_client_of_a_udp_port_gets_its_own_answers(ports: dict[tuple[str, str], int]) -> None:
    wrong: list[int] = []

    def visit(number: int) -> None:
        address = ("127.0.0.1", "::1")[number % 2]
        for turn in range(10):
            data = b"client %d turn %d" % (number, turn)
            if ask(address, ports["udp", address], data) != data:
                wrong.append(number)

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(16)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(120)
    assert wrong == []


def test_guest_cannot_reach_what_listens_on_the_hosts_loopback_by_udp_either(
    guests: Guests, ports: dict[tuple[str, str], int]
) -> None:
    del ports  # its guest is the one that asks
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener, socket.create_server(("127.0.0.1", 0)) as server:
        listener.bind(("127.0.0.1", 0))
        for target in ("10.0.2.2", "10.0.2.3", "127.0.0.1"):
            port = server.getsockname()[1]
            status, out, err = control.execute(
                "served", ["sh", "-c", f"echo x | nc -w 2 {target} {port}"], timeout_s=20
            )
            assert status != 0, out + err
            # A datagram by the shell's own means: a resolver that is asked at that port.
            control.execute("served", ["busybox", "nslookup", f"-port={listener.getsockname()[1]}", "-retry=1",
                                       "-timeout=1", "name.test", target], timeout_s=20)  # fmt: skip
        listener.setblocking(False)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(100)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.fixture
def abroad(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A host with a route to another one, which serves and resolves; both are network namespaces of the test's own."""
    needs(*PACKAGES, ("pasta", "passt"), ("unshare", "util-linux"))
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "contain")
    import hosts

    with hosts.TwoHosts() as made:
        made.serve(made.host, 9000, "the host itself")
        made.serve(made.peer, 9000, "the peer")
        made.resolve(made.peer, hosts.PEER)
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("walls", [("vm",), ("jail", "vm")], ids=",".join)
def test_guest_with_egress_reaches_the_network_and_its_names_and_not_its_host(
    guests: Guests, abroad: object, tmp_path: Path, walls: tuple[str, ...]
) -> None:
    import hosts

    assert isinstance(abroad, hosts.TwoHosts)
    (tmp_path / "resolv.conf").write_text(f"nameserver {hosts.PEER}\n")
    name = guests.create("abroad", network="nat", walls=walls).name
    view = 'mount --make-rprivate / && mount --bind "$0" "$(readlink -f /etc/resolv.conf)" && exec "$@"'
    source = os.fspath(Path(__file__).parents[2] / "src")
    abroad.run(
        abroad.host, "unshare", "--mount", "sh", "-ec", view, os.fspath(tmp_path / "resolv.conf"), "env",
        f"PYTHONPATH={source}", sys.executable, "-m", "stockade", "guest", "start", name, timeout=60,
    )  # fmt: skip
    guests.seen.note(name)

    def said(address: str) -> str:
        _, out, _ = control.execute(name, ["sh", "-c", f"nc -w 5 {address} 9000 < /dev/null"], timeout_s=30)
        return out.decode()

    assert until(lambda: said(hosts.PEER) == "the peer", seconds=30)
    for address in (hosts.HOST, hosts.SECOND, "10.0.2.2", "127.0.0.1", "169.254.169.254"):
        assert said(address) == "", address
    assert until(lambda: "10.9.8.7" in shell(name, "busybox nslookup -type=a some.name.test || true"), seconds=30)


@pytest.fixture(scope="module")
def named(home: Path) -> Iterator[None]:
    """The recipe's jail, built."""
    needs(("named", "bind9"), ("dig", "bind9-dnsutils"), ("strace", "strace"))
    workflow.build(specfile.load(specfile.recipe("named")), verify=False)
    yield
    for name in images.names():
        if images.load(name).source == "named":
            images.remove(name, [])
    shutil.rmtree(places.jail("named"))


@pytest.mark.slow
@pytest.mark.parametrize("walls", [("vm",), ("jail", "vm", "jail")], ids=",".join)
def test_named_answers_dig_over_each_protocol_and_family(named: None, guests: Guests, walls: tuple[str, ...]) -> None:
    ports = {(kind, address): free_port() for kind in ("udp", "tcp") for address in LOOPBACKS}
    publish = [
        Published(address=address, port=port, target=53, protocol=kind)  # type: ignore[arg-type]
        for (kind, address), port in ports.items()
    ]
    guest = machines.guest_of_jail("named", walls, name="resolver", memory=128 << 20, publish=publish)
    guests.start(guest.name).close()
    for (kind, address), port in ports.items():
        words = ["dig", "+short", "+time=3", "+tries=8", "+tcp" if kind == "tcp" else "+notcp", f"@{address}",
                 "-p", str(port), "www.example.test", "AAAA"]  # fmt: skip

        def answer(words: list[str] = words) -> str:
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
            return done.stdout

        assert until(lambda answer=answer: answer() == "2001:db8::2\n", seconds=30), (kind, address, answer())  # type: ignore[misc]
