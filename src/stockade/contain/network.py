"""The network of a jail: published ports by a forwarder, egress by pasta, and what egress must never reach.

A published port is a socket made here, outside; the warden's forwarder carries what arrives there to the jail's
loopback, so a jail without egress has no interface but that. With egress pasta(1) serves an interface, and routes
that the jail cannot change refuse the host's own addresses and those of cloud metadata services.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from stockade.errors import HostError, UsageError
from stockade.kernel.listening import listener
from stockade.records.addresses import RESOLVER

from . import marker, warden_path, wire
from .spawn import memory_file

if TYPE_CHECKING:
    from stockade.records.publish import Published

__all__ = ["RESOLVER", "Connection", "connection", "open_listener", "openings"]

# pasta's defaults would reach the host's own loopback and forward every port that is open on either side.
_PASTA = (
    "--quiet", "--config-net", "--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none",
    "--dns-forward", RESOLVER, "--netns", "{net}",
)  # fmt: skip

#: Link-local and the fixed addresses of metadata services outside of it.
_REFUSED = ("169.254.0.0/16", "100.100.100.200/32", "192.0.0.192/32", "168.63.129.16/32", "fd00:ec2::254/128")


class Connection:
    """What one launch needs for its network: plan records, and descriptors that the warden inherits.

    `listening` are the sockets that the service itself is to get, `published` counts the forwarder's.
    """

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.inherit: list[int] = []
        self.listening: list[int] = []
        self.published = 0

    def _keep(self, descriptor: int) -> None:
        self.inherit.append(descriptor)
        self.records.append(wire.record(wire.HELPER_FD, descriptor))


@contextlib.contextmanager
def connection(generation: Path, *, publish: bool, listen: bool) -> Iterator[Connection]:
    """Open what the jail in `generation` publishes (`publish`) or listens to outside (`listen`), and plan its helpers.

    The descriptors close at the end: the warden has them then. HostError for a port that cannot be opened, and where
    pasta or ip is missing.
    """
    made = Connection()
    wanted = marker.read(generation)
    if wanted is None:
        yield made
        return
    try:
        for text in wanted.listen if listen else ():
            made.listening.append(open_listener(text))
        if publish and wanted.publish:
            from stockade.records.publish import parse

            gates = []
            for published in map(parse, wanted.publish):
                descriptor = _listen(published).detach()
                made._keep(descriptor)
                gates.append(f"{descriptor}:{published.target}")
            made.published = len(gates)
            forwarder = (warden_path(), "forward", "{pid}", *wanted.ids, *gates)
            made.records.append(wire.text(wire.HELPER, *forwarder))
        if wanted.egress:
            _egress(made)
        yield made
    finally:
        for descriptor in (*made.inherit, *made.listening):
            os.close(descriptor)


def openings(generation: Path) -> tuple[str, ...]:
    """What the jail in `generation` opens outside when it is started, as its spec says it."""
    try:
        wanted = marker.read(generation)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()
    return () if wanted is None else (*wanted.publish, *wanted.listen)


def open_listener(text: str) -> int:
    """A socket for `[ADDRESS:]PORT[/tcp|/udp]`, listening where it is TCP, for a service that takes it over.

    UsageError for what cannot be read, HostError for a port that cannot be opened.
    """
    from stockade.records.publish import parse_listen

    try:
        wanted = parse_listen(text)
    except ValueError as error:
        raise UsageError(str(error), hint="for example `127.0.0.1:8080`, `[::1]:53/udp`, or a port alone") from None
    return _listen(wanted, "listen on").detach()


def _egress(made: Connection) -> None:
    pasta = _program("pasta", package="passt")
    ip = _program("ip", package="iproute2")
    routes = "".join(f"route add unreachable {target}\n" for target in (*_REFUSED, *_own_addresses()))
    batch = memory_file(routes.encode("ascii"))
    made._keep(batch)
    made.records.append(wire.text(wire.HELPER, warden_path(), "attend", "{pid}", pasta, *_PASTA))
    set_up = (warden_path(), "within", "{pid}", ip, "-batch", f"/proc/self/fd/{batch}")
    made.records.append(wire.text(wire.HELPER, *set_up))


def _program(name: str, *, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise HostError(f"`egress` needs `{name}`, which is not installed", hint=f"`apt-get install {package}`")
    return path


def _own_addresses() -> list[str]:
    """Every address of the host but loopback ones, as a route's target; the jail's interface has one of them too."""
    found = set()
    with open("/proc/net/fib_trie", encoding="ascii") as file:
        previous = ""
        for line in file:
            text = line.strip()
            if text.startswith("/32 host LOCAL"):
                found.add(ipaddress.ip_address(previous.rpartition(" ")[2]))
            previous = text
    with contextlib.suppress(FileNotFoundError), open("/proc/net/if_inet6", encoding="ascii") as file:
        found.update(ipaddress.IPv6Address(bytes.fromhex(line.split()[0])) for line in file)
    return [
        f"{address}/{address.max_prefixlen}" for address in sorted(found, key=str) if not address.is_loopback
    ]


def _listen(published: Published, doing: str = "publish") -> socket.socket:
    """A listening TCP or a bound UDP socket for a published port."""
    try:
        return listener(published.address, published.port, datagrams=published.protocol == "udp")
    except OSError as error:
        raise _refused(published, doing, error) from error


def _refused(published: Published, doing: str, error: OSError) -> HostError:
    where = f"{published.address} port {published.port}/{published.protocol}"
    hints = {
        errno.EADDRINUSE: f"`ss -lnp 'sport = {published.port}'` shows who has it; {doing} another port",
        errno.EACCES: f"ports below 1024 are root's: {doing} a higher one, or "
        f"`sysctl net.ipv4.ip_unprivileged_port_start={published.port}`",
        errno.EADDRNOTAVAIL: "`ip address` shows the addresses of this host",
    }
    return HostError(
        f"cannot {doing} {where}: {os.strerror(error.errno or 0)}", hint=hints.get(error.errno or 0)
    )

