"""Messages between the caller and the first process of a view: JSON and descriptors. Interprets nothing."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

__all__ = ["Message", "receive", "send"]

_LENGTH = struct.Struct("!I")
_MOST_DESCRIPTORS = 64
_MOST_BYTES = 256 * 1024 * 1024

Message = dict[str, Any]


def send(channel: socket.socket, message: Message, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message, and descriptors with its first byte. Paths keep their bytes (surrogate escapes)."""
    body = json.dumps(message).encode("ascii")
    head = _LENGTH.pack(len(body))
    if descriptors:
        socket.send_fds(channel, [head], list(descriptors))
    else:
        channel.sendall(head)
    channel.sendall(body)


def receive(channel: socket.socket) -> tuple[Message, list[int]]:
    """The next message and its descriptors, which are close-on-exec; EOFError when the other side is gone."""
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, _MOST_DESCRIPTORS)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    head += _exactly(channel, _LENGTH.size - len(head))
    (length,) = _LENGTH.unpack(head)
    if length > _MOST_BYTES:
        raise ValueError(f"a message of {length} bytes is too long")
    message: Message = json.loads(_exactly(channel, length))
    return message, descriptors


def _exactly(channel: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = channel.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError("the other side of the view's channel is gone")
        parts += part
    return bytes(parts)
