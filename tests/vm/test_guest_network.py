"""What a guest reaches, and what reaches it."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import NewGuest
from guest_processes import of_guest

from stockade import machines
from stockade.errors import HostError, StateError
from stockade.records.publish import Published
from stockade.vm import control, manage, network
from stockade.vm.start import Started, stop

Start = Callable[[str], Started]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shell(name: str, script: str) -> tuple[int, str]:
    status, output, errors = control.execute(name, ["sh", "-c", script], timeout_s=20)
    return status, (output + errors).decode("utf-8", "replace")


def get(port: int, path: str = "/") -> str:
    done = subprocess.run(
        ["curl", "-sS", "-f", "-m", "10", f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, timeout=20,
        check=False,
    )  # fmt: skip
    return done.stdout if done.returncode == 0 else f"curl: {done.stderr}"


@contextmanager
def listener(address: str) -> Iterator[tuple[int, list[str]]]:
    """A server on the host that notes who comes."""
    came: list[str] = []
    with socket.socket() as server:
        server.bind((address, 0))
        server.listen()
        server.settimeout(0.1)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                try:
                    connection, peer = server.accept()
                except TimeoutError:
                    continue
                came.append(str(peer))
                connection.sendall(b"the host\n")
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(server.getsockname()[1]), came
        finally:
            done.set()
            thread.join(5)


def host_addresses() -> list[str]:
    return [address.removesuffix("/32") for address in network._own_addresses()]


def test_published_port_answers_and_nothing_leads_out(new_guest: NewGuest, start: Start) -> None:
    port = free_port()
    guest = new_guest(network="publish", publish=(Published(address="127.0.0.1", port=port, target=80),))
    start(guest.name)
    shell(guest.name, "httpd -p 80 -h /srv")
    assert get(port) == "served from a guest\n"
    for address in ("127.0.0.1", *host_addresses()[:1]):
        with listener(address) as (outside, came):
            for target in {address, "10.0.2.2"}:
                status, text = shell(guest.name, f"echo | nc -w 2 {target} {outside}")
                assert "the host" not in text, text
            assert came == []


def test_guest_without_a_network_has_loopback_alone(new_guest: NewGuest, start: Start) -> None:
    guest = new_guest()
    start(guest.name)
    assert shell(guest.name, "cat /proc/net/dev | grep -c :") == (0, "1\n")
    assert "unreachable" in shell(guest.name, "echo | nc -w 2 192.0.2.1 80")[1].lower()


def test_large_files_pass_whole_through_a_published_port(new_guest: NewGuest, start: Start, tmp_path: Path) -> None:
    port = free_port()
    guest = new_guest(
        network="publish", publish=(Published(address="127.0.0.1", port=port, target=80),), memory=128 << 20
    )
    start(guest.name)
    shell(guest.name, "mount -t tmpfs none /tmp; head -c 20000000 /dev/urandom > /tmp/big; httpd -p 80 -h /tmp")
    wanted = shell(guest.name, "sha256sum /tmp/big || busybox sha256sum /tmp/big")[1].split()[-2]
    subprocess.run(
        ["curl", "-sS", "-f", "-m", "30", "-o", str(tmp_path / "big"), f"http://127.0.0.1:{port}/big"],
        check=True,
        timeout=40,
    )
    assert (
        wanted
        in subprocess.run(
            ["sha256sum", str(tmp_path / "big")], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    )


def test_port_that_is_taken_is_one_clear_error_and_starts_nothing(new_guest: NewGuest) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        guest = new_guest(network="publish", publish=(Published(address="127.0.0.1", port=port, target=80),))
        with pytest.raises(HostError, match=f"port {port} of 127.0.0.1 cannot be published"):
            machines.start_guest(guest.name)
        assert not control.is_running(guest.name)
    machines.start_guest(guest.name).close()


def test_ports_without_a_network_are_refused(new_guest: NewGuest) -> None:
    guest = new_guest(publish=(Published(address="127.0.0.1", port=free_port(), target=80),))
    with pytest.raises(StateError, match="has no network"):
        machines.start_guest(guest.name)


def test_uml_itself_and_what_serves_its_network_stand_in_networks_without_the_host(
    new_guest: NewGuest, start: Start
) -> None:
    guest = new_guest(network="publish", walls=("jail", "vm"))
    start(guest.name)
    own = os.readlink("/proc/self/ns/net")
    status = control.request(guest.name, "status")
    assert {os.readlink(f"/proc/{pid}/ns/net") for pid in status["helpers"]}.isdisjoint({own})
    assert os.readlink(f"/proc/{status['pid']}/ns/net") != own


def test_network_ends_with_the_guest(new_guest: NewGuest, start: Start) -> None:
    guest = new_guest(network="publish", publish=(Published(address="127.0.0.1", port=free_port(), target=80),))
    start(guest.name)
    helpers = control.request(guest.name, "status")["helpers"]
    assert helpers
    stop(guest.name)
    time.sleep(0.2)
    assert not any(os.path.exists(f"/proc/{pid}/exe") and os.access(f"/proc/{pid}/exe", os.R_OK) for pid in helpers)


@pytest.mark.slow
def test_guest_with_egress_reaches_outside_and_not_its_host(new_guest: NewGuest, start: Start) -> None:
    guest = new_guest(network="nat")
    start(guest.name)
    assert "default" in shell(guest.name, "route -n | sed s/^0.0.0.0/default/")[1]
    for address in host_addresses():
        with listener(address) as (port, came):
            assert "the host" not in shell(guest.name, f"echo | nc -w 2 {address} {port}")[1]
            assert came == []
    with listener("127.0.0.1") as (port, came):
        for target in ("10.0.2.2", "127.0.0.1"):
            shell(guest.name, f"echo | nc -w 2 {target} {port}")
        assert came == []
    began = time.monotonic()
    status, _ = shell(guest.name, "echo | nc -w 8 169.254.169.254 80")
    assert status != 0
    assert time.monotonic() - began < 6, "refused, not lost"


def test_two_guests_with_a_wire_reach_each_other_and_nobody_else(new_guest: NewGuest, start: Start) -> None:
    one, other = new_guest(), new_guest()
    manage.link(one.name, other.name)
    start(one.name)
    start(other.name)
    address = network.wire_address(other.name, one.name).partition("/")[0]
    shell(other.name, "httpd -p 80 -h /srv")
    assert "served from a guest" in shell(one.name, f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} 80")[1]
    # The one that is started again gets the wire that the other has kept.
    stop(one.name)
    start(one.name)
    assert "served from a guest" in shell(one.name, f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} 80")[1]
    assert of_guest(one.name) != of_guest(other.name)
