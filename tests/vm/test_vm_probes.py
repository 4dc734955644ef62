"""Ways out of a guest: root in it, and whoever has taken UML's process over, against the jail around that."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from machine import Guests, free_port, needs, sha256, shell, until

from stockade import contain, machines
from stockade.assure.prove import prove
from stockade.contain.compile import compile_plan
from stockade.records.launch import Bind, LaunchPlan
from stockade.records.proof import ProbeRun, Proof
from stockade.records.publish import Published
from stockade.vm import control, images, kernels, store, transfer, walls

Change = Callable[[LaunchPlan], LaunchPlan]
replace = msgspec.structs.replace

needs_proof = pytest.mark.usefixtures("proof_tools")


@pytest.fixture
def proof_tools() -> None:
    needs(("strace", "strace"))


def as_a_guests(name: str) -> Change:
    """A change of the kernel jail's plan to what the guest `name` has: ptrace, its directory, its memory's place."""
    kernel = kernels.find()
    generation, lock = walls.jail_of(kernel)
    directory = os.path.realpath(store.machine(name))
    guest = compile_plan(
        walls.specification(kernel, memory=store.load(name).memory), lock, generation=generation,
        volumes=Path("/nonexistent"), ids=contain.for_jail("uml"), allow_ptrace=True,
        extra=(
            Bind(source=directory, target=walls.PLACE, writable=True, own=True),
            Bind(source=f"{directory}/base", target=f"{walls.PLACE}/base", own=True),
        ),
    )  # fmt: skip
    return lambda plan: replace(plan, seccomp=guest.seccomp, mounts=guest.mounts)


def outcomes(runs: tuple[ProbeRun, ...], outcome: str) -> set[str]:
    return {result.id for run in runs for result in run.results if result.outcome == outcome}


@pytest.fixture
def place(guests: Guests) -> str:
    """A guest that is stopped, whose directory the jail has."""
    machines.prepare(("jail", "vm"))
    return guests.create("place", walls=("jail", "vm")).name


@needs_proof
@pytest.mark.slow
def test_nothing_escapes_the_jail_around_uml(place: str) -> None:
    proof: Proof = prove("uml", networks=("none",), change=as_a_guests(place))
    assert {run.user for run in proof.runs} == {"uml", "root"}
    assert outcomes(proof.runs, "escaped") == set()
    assert proof.escapes == 0
    held, lacking = outcomes(proof.runs, "held"), outcomes(proof.runs, "not testable")
    assert {"F1", "F8", "P1", "P2", "P3", "V1", "K7", "K9", "N1", "T5"} <= held | lacking
    assert {"F1", "P1", "P2", "P3", "K9", "N1"} <= held


@needs_proof
@pytest.mark.slow
def test_the_probes_report_the_walls_around_uml_that_are_taken_away(place: str) -> None:
    guest = as_a_guests(place)

    def open_plan(plan: LaunchPlan) -> LaunchPlan:
        kept = tuple(kind for kind in plan.namespaces if kind not in ("pid", "net", "ipc"))
        return replace(
            guest(plan), seccomp=(), landlock=None, namespaces=kept, loopback=False,
            sysctls=tuple(pair for pair in plan.sysctls if "/net/" not in pair[0]),
        )  # fmt: skip

    proof = prove("uml", networks=("none",), change=open_plan)
    assert {"P5", "N1", "T5", "K10"} <= outcomes(proof.runs, "escaped")


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
