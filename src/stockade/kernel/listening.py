"""Sockets that are opened for somebody else to take over: ip(7), tcp(7), udp(7). Knows nothing of jails."""

from __future__ import annotations

import socket

__all__ = ["listener"]

_BACKLOG = 4096
_DATAGRAM_BYTES = 2 << 20
_SO_RCVBUFFORCE = 33


def listener(address: str, port: int, *, datagrams: bool) -> socket.socket:
    """A socket bound to a numeric address and a port: of UDP for `datagrams`, else of TCP, and listening.

    It blocks, closes on exec, and one of IPv6 takes nothing of IPv4. OSError where it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, (socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM) | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if datagrams:
            _room(made)
        else:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        if not datagrams:
            made.listen(_BACKLOG)
    except OSError:
        made.close()
        raise
    return made


def _room(made: socket.socket) -> None:
    """Many peers may ask at once: room for some thousand datagrams, where the kernel's default has it for 300."""
    try:
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _DATAGRAM_BYTES)
    except PermissionError:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _DATAGRAM_BYTES)  # net.core.rmem_max at most
