"""Frames of a guest's serial line, as `warden/channel.h` has them. The same go between the keeper and its clients."""

from __future__ import annotations

import struct

__all__ = ["Frame", "Reader", "WINDOW", "execute", "pack", "pack_number"]

EXEC, DATA, EOF, SIGNAL, RESIZE, CREDIT, STOP, SERVICE = range(1, 9)
READY, STDOUT, STDERR, EXIT, STARTED, ENDED, FAULT, TAKEN, RECORD, GATHERS = range(16, 26)

WINDOW = 65536
#: What may be on its way to the guest: beyond 4096 bytes that nobody has read its terminal driver loses some.
LINE_MOST = 3072
DATA_MOST = 4096
_FRAME_MOST = 32768
_HEADER = struct.Struct(">BBHI")
_TERMINAL = 1

Frame = tuple[int, int, bytes]


def pack(kind: int, session: int, payload: bytes = b"") -> bytes:
    """One frame; ValueError when it is too long."""
    if len(payload) > _FRAME_MOST:
        raise ValueError("too long for a frame")
    return _HEADER.pack(kind, 0, session, len(payload)) + payload


def pack_number(kind: int, session: int, number: int) -> bytes:
    """A frame that holds one number."""
    return pack(kind, session, struct.pack(">I", number))


def number(payload: bytes) -> int:
    """The number in a frame's payload; 0 in a malformed one."""
    return int(struct.unpack(">I", payload)[0]) if len(payload) == 4 else 0


def execute(
    session: int, argv: list[str], *, environment: dict[str, str], directory: str = "/", uid: int = 0, gid: int = 0,
    terminal: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    """The frame that starts a command; `terminal` are its rows and columns. ValueError for what does not fit."""
    rows, columns = terminal or (0, 0)
    strings = [directory, f"{uid}:{gid}", *argv, *(f"{key}={value}" for key, value in environment.items())]
    encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
    if any(b"\0" in text for text in encoded):
        raise ValueError("embedded null byte")
    head = struct.pack(">HHHH", _TERMINAL if terminal else 0, rows, columns, len(argv))
    return pack(EXEC, session, head + b"".join(text + b"\0" for text in encoded))


class Reader:
    """Takes a stream apart into frames. What comes from a guest is not trusted: ValueError ends the conversation."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are whole once `data` has come."""
        self._data += data
        found: list[Frame] = []
        while len(self._data) >= _HEADER.size:
            kind, zero, session, length = _HEADER.unpack_from(self._data)
            if zero != 0 or length > _FRAME_MOST:
                raise ValueError("malformed frame")
            end = _HEADER.size + length
            if len(self._data) < end:
                break
            found.append((kind, session, bytes(self._data[_HEADER.size : end])))
            del self._data[:end]
        return found
