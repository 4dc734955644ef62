"""Talk to a command in a jail through its three pipes until it ends. Starts nothing."""

from __future__ import annotations

import fcntl
import math
import os
import selectors
import struct
import termios
import time
from io import FileIO
from subprocess import PIPE
from typing import TypedDict

from .jail import LONGEST_POLL, Running

__all__ = ["PIPES", "Output", "communicate"]


class Pipes(TypedDict):
    """The three standard streams of a launch."""

    stdin: int
    stdout: int
    stderr: int


PIPES = Pipes(stdin=PIPE, stdout=PIPE, stderr=PIPE)

_CHUNK = 1 << 16


class Output:
    """What a command wrote, and its status: None when its time ran out. `cut` tells that it wrote more than is kept."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.stdout = b""
        self.stderr = b""
        self.cut = False


def communicate(
    running: Running, data: bytes = b"", *, timeout_s: float | None = None, most_bytes: int | None = None
) -> Output:
    """Feed `data` to a command started with three pipes and collect what it writes.

    After `timeout_s` seconds it is killed. Of each stream `most_bytes` are kept, and the rest is read and dropped. What
    it left behind in a jail that it entered may hold the pipes open: that is not waited for, once it has ended itself.
    """
    output = Output()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    kept: dict[int, bytearray] = {}

    def take(file: FileIO, most: int = _CHUNK) -> bool:
        piece = os.read(file.fileno(), most)
        room = len(piece) if most_bytes is None else max(0, most_bytes - len(kept[file.fileno()]))
        output.cut |= len(piece) > room
        kept[file.fileno()] += piece[:room]
        return bool(piece)

    with selectors.PollSelector() as selector:
        selector.register(running, selectors.EVENT_READ)
        for stream in (running.stdout, running.stderr):
            if stream is not None:
                kept[stream.fileno()] = bytearray()
                selector.register(stream, selectors.EVENT_READ)
        rest = memoryview(data)
        if running.stdin is not None and not rest:
            running.stdin.close()
        elif running.stdin is not None:
            os.set_blocking(running.stdin.fileno(), False)
            selector.register(running.stdin, selectors.EVENT_WRITE)
        while len(selector.get_map()) > 1 and not running.ended:
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in selector.select(min(left, LONGEST_POLL)):
                file = key.fileobj
                if not isinstance(file, FileIO):
                    running.look()
                elif file is running.stdin:
                    rest = _feed(file, rest)
                    if not rest:
                        selector.unregister(file)
                        file.close()
                elif not take(file):
                    selector.unregister(file)
        for stream in (running.stdout, running.stderr):
            if stream is not None and running.ended:
                (left_in_pipe,) = struct.unpack("i", fcntl.ioctl(stream, termios.FIONREAD, bytes(4)))
                if left_in_pipe:
                    take(stream, left_in_pipe)
    try:
        output.status = running.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        running.kill()
    if running.stdout is not None:
        output.stdout = bytes(kept[running.stdout.fileno()])
    if running.stderr is not None:
        output.stderr = bytes(kept[running.stderr.fileno()])
    return output


def _feed(file: FileIO, rest: memoryview) -> memoryview:
    """Write what the pipe takes; nothing is left when its reader is gone."""
    if not rest:
        return rest
    try:
        return rest[os.write(file.fileno(), rest[:_CHUNK]) :]
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        return rest[:0]
