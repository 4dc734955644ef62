"""A published port: an address and port outside that lead to a port inside."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal

import msgspec

_FORM = re.compile(
    r"(?:(?P<address>\[[0-9a-fA-F:.]+\]|[0-9.]+):)?(?P<outer>\d+):(?P<inner>\d+)(?:/(?P<protocol>tcp|udp))?"
)
_LISTEN_FORM = re.compile(r"(?P<address>(?:\[[0-9a-fA-F:.]+\]|[0-9.]+):)?(?P<port>\d+)(?P<protocol>/(?:tcp|udp))?")
LOOPBACK = "127.0.0.1"
FIRST_GIVEN = 3  # SD_LISTEN_FDS_START


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """`address` and `port` outside lead to `target`, a port on the jail's loopback."""

    address: str
    port: int
    target: int
    protocol: Literal["tcp", "udp"] = "tcp"


def parse(text: str) -> Published:
    """Read `[ADDRESS:]PORT:PORT[/tcp|/udp]`; an IPv6 address stands in brackets.

    Without an address the port is open on 127.0.0.1 only. ValueError says what is wrong.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read `{text}` as `[ADDRESS:]PORT:PORT[/tcp|/udp]`")
    for port in (match["outer"], match["inner"]):
        if not 1 <= int(port) <= 65535:
            raise ValueError(f"port {port} of `{text}` is not between 1 and 65535")
    address = (match["address"] or LOOPBACK).strip("[]")
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(f"`{address}` of `{text}` is no IP address") from None
    return Published(
        address=address,
        port=int(match["outer"]),
        target=int(match["inner"]),
        protocol="udp" if match["protocol"] == "udp" else "tcp",
    )


def written(port: Published) -> str:
    """Write a published port as `parse` reads it."""
    address = f"[{port.address}]" if ":" in port.address else port.address
    return f"{address}:{port.port}:{port.target}/{port.protocol}"


def variables(count: int) -> dict[str, str]:
    """What a service that is given `count` sockets, from descriptor 3 on, finds in its environment.

    Beside `LISTEN_PID`, its own pid: that is for whoever starts it to add. sd_listen_fds(3), and nginx's `NGINX`.
    """
    numbers = "".join(f"{FIRST_GIVEN + number};" for number in range(count))
    return {"LISTEN_FDS": str(count), "NGINX": numbers}


def parse_listen(text: str) -> Published:
    """Read `[ADDRESS:]PORT[/tcp|/udp]`: a socket that is opened outside and given to the service itself.

    Without an address it is open on 127.0.0.1 only. ValueError says what is wrong.
    """
    match = _LISTEN_FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read `{text}` as `[ADDRESS:]PORT[/tcp|/udp]`")
    return parse(f"{match['address'] or ''}{match['port']}:{match['port']}{match['protocol'] or ''}")
