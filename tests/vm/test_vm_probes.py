"""Ways out of a guest, tried by its root with the tools that are there; `stockade prove` tries more of them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Guests, free_port, needs, sha256, shell, until

from stockade.records.publish import Published
from stockade.vm import control, images, transfer


class Canary:
    """What a guest must not reach: a port of the host's loopback, and a file."""

    def __init__(self, directory: Path) -> None:
        self.visits: list[str] = []
        self.file = directory / "canary"
        self.file.write_text("only the host has this\n")
        self.file.chmod(0o644)
        self.server = socket.create_server(("0.0.0.0", 0))
        self.port = int(self.server.getsockname()[1])
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            client, peer = self.server.accept()
            with client:
                if peer[0] == "127.0.0.1" and client.recv(4) == b"end\n":
                    return
                self.visits.append(str(peer))

    def end(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
            client.sendall(b"end\n")
        self.thread.join(10)
        self.server.close()


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    made = Canary(tmp_path)
    yield made
    made.end()


def attempt(name: str, script: str) -> tuple[int, str]:
    """Status and output of a script of the guest's root."""
    status, out, err = control.execute(name, ["/bin/sh", "-c", script], timeout_s=30)
    return status, (out + err).decode("utf-8", "replace")


@pytest.mark.parametrize("walled", (("vm",), ("jail", "vm")), ids=",".join)
def test_root_in_the_guest_has_no_file_system_of_the_hosts(
    guests: Guests, canary: Canary, walled: tuple[str, ...]
) -> None:
    name = guests.run("inside", walls=walled).name
    shell(name, "mkdir -p /mnt; mount -t tmpfs none /mnt; umount /mnt")  # mounting as such works
    for options in ("", "-o /", "-o ../../..", f"-o {canary.file.parent}"):
        status, text = attempt(name, f"mount -t hostfs {options} none /mnt && cat /mnt{canary.file}")
        assert status != 0 and "No such device" in text
    _, systems = attempt(name, "cat /proc/filesystems")
    assert "tmpfs" in systems and "hostfs" not in systems and "humfs" not in systems


def test_root_in_the_guest_loads_no_module_and_unlocks_none(guests: Guests, tmp_path: Path) -> None:
    name = guests.run("inside").name
    modules = sorted(Path("/usr/lib/uml/modules").glob("*/kernel/lib/*.ko"))
    if not modules:
        pytest.skip("`apt-get install user-mode-linux`: it brings modules to try")
    transfer.push(name, modules[0], "/root/module.ko")
    status, text = attempt(name, "insmod /root/module.ko")
    assert status != 0 and "not permitted" in text
    status, _ = attempt(name, "echo 0 > /proc/sys/kernel/modules_disabled")
    assert status != 0
    assert shell(name, "cat /proc/sys/kernel/modules_disabled") == "1\n"


def test_root_in_the_guest_writes_to_its_own_disk_alone(guests: Guests) -> None:
    name = guests.run("inside", walls=("jail", "vm")).name
    before = sha256(images.file(guests.image.name))
    devices = shell(name, "ls /dev").split()
    assert [device for device in devices if device.startswith("ubd")] == ["ubda"], "no other disk is there"
    shell(name, "dd if=/dev/zero of=/dev/ubda bs=1M count=8 2>/dev/null; sync")
    assert sha256(images.file(guests.image.name)) == before


@pytest.mark.parametrize("network", ("none", "publish", "nat"))
def test_root_in_the_guest_reaches_no_port_of_the_hosts(guests: Guests, canary: Canary, network: str) -> None:
    needs(("slirp4netns", "slirp4netns"), ("pasta", "passt"))
    ports = (Published(address="127.0.0.1", port=free_port(), target=80),) if network == "publish" else ()
    name = guests.run("inside", network=network, publish=ports).name
    own = {socket.gethostbyname("localhost"), "10.0.2.2", "10.0.2.3", "10.0.2.1", *host_addresses()}
    for address in sorted(own):
        status, _ = attempt(name, f"nc -w 2 {address} {canary.port} </dev/null")
        assert status != 0, address
    assert canary.visits == []


def host_addresses() -> list[str]:
    """IPv4 addresses of the host's but loopback."""
    lines = Path("/proc/net/fib_trie").read_text().splitlines()
    pairs = zip(lines, lines[1:], strict=False)
    found = {one.rpartition(" ")[2] for one, other in pairs if other.strip().startswith("/32 host LOCAL")}
    return sorted(address for address in found if not address.startswith("127."))


def test_the_canary_is_reached_without_a_guest(canary: Canary) -> None:
    for address in ("127.0.0.1", *host_addresses()):
        with socket.create_connection((address, canary.port), timeout=5) as client:
            client.sendall(b"hi\n")
    assert until(lambda: len(canary.visits) == 1 + len(host_addresses()))


def test_memory_of_the_guest_that_root_can_read_is_the_guests(guests: Guests) -> None:
    """Debian's UML lets root read /dev/mem: what is there is the guest's own."""
    secret = os.urandom(16).hex()
    os.environ["STOCKADE_TEST_CANARY"] = secret
    try:
        name = guests.run("inside", walls=("jail", "vm")).name
    finally:
        del os.environ["STOCKADE_TEST_CANARY"]
    # In brackets, so that the search does not find itself in memory.
    search = "dd if=/dev/mem bs=1M count=64 2>/dev/null | grep -a -c '[{first}]{rest}'; true"
    _, text = attempt(name, f"echo found-in-memory >/dev/null; {search.format(first='f', rest='ound-in-memory')}")
    assert int(text) > 0, "memory can be searched"
    _, text = attempt(name, search.format(first=secret[0], rest=secret[1:]))
    assert int(text) == 0
