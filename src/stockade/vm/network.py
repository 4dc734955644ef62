"""A guest's network: none, published ports without egress, egress too, and wires to other guests. Needs no root.

The guest's interface ends in slirp4netns(1), over a socket that lies beside its disk: UML itself needs no network. That
process stands in a network namespace of its own. Nothing leads out of there, so a published port is a socket made
here that the warden's forwarder carries into it; with egress pasta(1) serves that namespace, and routes refuse what
no guest is to reach.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from typing import Any

import msgspec

from stockade.contain import warden_path
from stockade.errors import HostError, StateError
from stockade.records.guest import Guest
from stockade.records.publish import Published

from . import control
from .commandline import FIRST_WIRE_FD, Interface

__all__ = ["Plan", "Wires", "plan", "wires"]

#: What slirp4netns gives with its default network 10.0.2.0/24.
ADDRESS = "10.0.2.100"
_GATEWAY = "10.0.2.2"
_MTU = 65520
_SOCKET = "run/slirp.sock"
_API = "run/slirp.api"
#: pasta passes what goes here on to the host's resolver; RFC 7600 keeps the address unused.
_RESOLVER = "192.0.0.8"
#: Link-local, and the fixed addresses of metadata services outside of it.
_REFUSED = ("169.254.0.0/16", "100.100.100.200/32", "192.0.0.192/32", "168.63.129.16/32")
_BACKLOG = 4096
_FIRST_INNER = 20000
_PASTA = (
    "pasta", "--quiet", "--config-net", "--no-map-gw", "-4", "-t", "none", "-u", "none", "-T", "none", "-U", "none",
    "--dns-forward", _RESOLVER, "--netns", "{net}",
)  # fmt: skip
_WIRE_NETWORK = "10.1"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Interfaces of a guest, what the keeper does for them before UML starts and once UML is connected, and
    descriptors that its commands inherit."""

    interfaces: tuple[Interface, ...] = ()
    helpers: list[dict[str, Any]] = []
    late: list[dict[str, Any]] = []
    inherit: tuple[int, ...] = ()
    dns: str = ""


class Wires(msgspec.Struct, frozen=True, kw_only=True):
    """Wires to other guests, in the order of the guest's links: its own ends, and the others' by name."""

    interfaces: tuple[Interface, ...] = ()
    near: list[int] = []
    far: dict[str, int] = {}


def plan(guest: Guest, links: Wires) -> Plan:
    """What the guest's network needs. HostError for a port that cannot be opened or a program that is missing."""
    if guest.network == "none":
        if guest.publish:
            raise StateError(
                f"guest `{guest.name}` publishes ports and has no network", hint="`--network publish` gives it one"
            )
        return Plan()
    egress = guest.network == "nat"
    for program, package in _needed(egress):
        if shutil.which(program) is None:
            raise HostError(f"a guest's network needs `{program}`", hint=f"`apt-get install {package}`")
    inner = _inner_ports(guest)
    late: list[dict[str, Any]] = [{"await": _API}, *_forwards(inner)]
    listeners: list[int] = []
    try:
        for published in guest.publish:
            listeners.append(_listen(published).detach())
    except BaseException:
        for number in listeners:
            os.close(number)
        raise
    if listeners:
        gates = [
            f"{number}:{inner[published.protocol, published.target]}"
            for number, published in zip(listeners, guest.publish, strict=True)
        ]
        forward = [warden_path(), "forward", "{pid}", str(guest.uid), str(guest.gid), *gates]
        late.append({"run": forward, "pass": listeners})
    return Plan(
        interfaces=(
            Interface(
                transport=f"bess,dst={_SOCKET}", address=f"{ADDRESS}/24", gateway=_GATEWAY if egress else "", mtu=_MTU
            ),
        ),
        helpers=_slirp(guest, egress=egress), late=late, inherit=tuple(listeners), dns=_RESOLVER if egress else "",
    )  # fmt: skip


def _needed(egress: bool) -> tuple[tuple[str, str], ...]:
    needed = (("slirp4netns", "slirp4netns"), ("ip", "iproute2"), ("setpriv", "util-linux"))
    return (*needed, ("pasta", "passt")) if egress else needed


def _slirp(guest: Guest, *, egress: bool) -> list[dict[str, Any]]:
    """The steps that make the guest's network: a namespace, with egress pasta and routes, slirp4netns in it."""
    script = 'ip link set lo up && exec "$@"'
    if egress:
        refused = "".join(f"ip route add unreachable {target} && " for target in (*_REFUSED, *_own_addresses()))
        script = f"until ip -4 route show default | grep -q .; do sleep 0.01; done; {refused}{script}"
    # Without --disable-host-loopback, which refuses the answers to datagrams too: the loopback that the guest reaches
    # by its gateway is that of this namespace, where nothing listens but what leads back to the guest.
    slirp = [
        "slirp4netns", "--target-type=bess", f"--mtu={_MTU}", "--disable-dns",
        "--enable-seccomp", f"--api-socket={_API}", _SOCKET,
    ]  # fmt: skip
    ids = ["setpriv", f"--reuid={guest.uid}", f"--regid={guest.gid}", "--clear-groups"] if os.geteuid() == 0 else []
    # All of it ends with the keeper: the change of ids would clear a death signal, so that is set after it.
    namespace = ["unshare", "--user", "--map-root-user", "--", "setpriv", "--pdeathsig", "KILL",
                 "unshare", "--net", "--pid", "--fork", "--kill-child=KILL", "--"]  # fmt: skip
    steps: list[dict[str, Any]] = [{"start": [*ids, *namespace, "sh", "-c", script, "sh", *slirp]}]
    if egress:
        steps += [{"await_namespace": True}, {"run": [warden_path(), "attend", "{pid}", *_PASTA]}]
    return [*steps, {"await": _SOCKET}]


def _inner_ports(guest: Guest) -> dict[tuple[str, int], int]:
    """The port in slirp4netns's namespace that leads to each port of the guest, by protocol and number.

    One for each: of two that lead to one UDP port slirp4netns sends all answers through the same.
    """
    found: dict[tuple[str, int], int] = {}
    for published in guest.publish:
        found.setdefault((published.protocol, published.target), _FIRST_INNER + len(found))
    return found


def _forwards(inner: dict[tuple[str, int], int]) -> list[dict[str, Any]]:
    """Requests to slirp4netns: ports in its namespace lead to those of the guest."""
    return [
        {"request": {
            "execute": "add_hostfwd",
            "arguments": {"proto": protocol, "host_addr": "127.0.0.1", "host_port": port,
                          "guest_addr": ADDRESS, "guest_port": target},
        }, "api": _API}
        for (protocol, target), port in inner.items()
    ]  # fmt: skip


def _own_addresses() -> list[str]:
    """Every IPv4 address of the host but loopback ones: a guest with egress does not reach its own host."""
    found = set()
    previous = ""
    with contextlib.suppress(FileNotFoundError), open("/proc/net/fib_trie", encoding="ascii") as file:
        for line in file:
            if line.strip().startswith("/32 host LOCAL"):
                found.add(previous.rpartition(" ")[2])
            previous = line.strip()
    return [f"{address}/32" for address in sorted(found) if not address.startswith("127.")]


def _listen(published: Published) -> socket.socket:
    family = socket.AF_INET6 if ":" in published.address else socket.AF_INET
    kind = socket.SOCK_STREAM if published.protocol == "tcp" else socket.SOCK_DGRAM
    listener = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    try:
        if published.protocol == "tcp":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((published.address, published.port))
        if published.protocol == "tcp":
            listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise HostError(
            f"port {published.port} of {published.address} cannot be published: {(error.strerror or '').lower()}",
            hint="name a free port, above 1023 without root",
        ) from error
    return listener


def wires(guest: Guest) -> Wires:
    """Ends of the wires to the guests that this one is linked with.

    Whoever starts first makes a wire, and every keeper holds both ends of its guest's wires: so either guest can be
    started again while the other goes on.
    """
    interfaces, near, far = [], [], {}
    for number, peer in enumerate(guest.links):
        ends = _kept_ends(peer, guest.name)
        if ends is None:
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            ends = pair[0].detach(), pair[1].detach()
        near.append(ends[0])
        far[peer] = ends[1]
        interfaces.append(
            Interface(transport=f"fd,fd={FIRST_WIRE_FD + number}", address=wire_address(guest.name, peer), mtu=1500)
        )
    return Wires(interfaces=tuple(interfaces), near=near, far=far)


def wire_address(name: str, peer: str) -> str:
    """The address of guest `name` on its wire to `peer`: a network of four addresses that only the two have."""
    low, high = sorted((name, peer))
    number = int(hashlib.sha256(f"{low} {high}".encode()).hexdigest()[:4], 16) & 0x3FFF
    host = number * 4 + (1 if name == low else 2)
    return f"{_WIRE_NETWORK}.{host >> 8}.{host & 255}/30"


def _kept_ends(peer: str, name: str) -> tuple[int, int] | None:
    """This guest's end and the other's of the wire that the running guest `peer` has; None where there is none."""
    try:
        connection = control.connect(peer)
    except StateError:
        return None
    with connection:
        connection.sendall(json.dumps({"do": "wire", "peer": name}).encode() + b"\n")
        data, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
        if data != b"w" or len(descriptors) != 2:
            return None
        return descriptors[0], descriptors[1]
