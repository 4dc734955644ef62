"""Talk to a command in a jail through its three pipes until it ends. Starts nothing."""

from __future__ import annotations

import math
import os
import selectors
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

    After `timeout_s` seconds it is killed. Of each stream `most_bytes` are kept, and the rest is read and dropped. A
    process that it left behind cannot outlive it: the jail ends with the command. Closes the pipes.
    """
    output = Output()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    kept: dict[int, bytearray] = {}
    with selectors.PollSelector() as selector:
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
        while selector.get_map():
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in selector.select(min(left, LONGEST_POLL)):
                file = key.fileobj
                if not isinstance(file, FileIO):
                    continue
                if file is running.stdin:
                    rest = _feed(file, rest)
                    if not rest:
                        selector.unregister(file)
                        file.close()
                    continue
                piece = os.read(file.fileno(), _CHUNK)
                if not piece:
                    selector.unregister(file)
                    continue
                room = len(piece) if most_bytes is None else max(0, most_bytes - len(kept[file.fileno()]))
                output.cut |= len(piece) > room
                kept[file.fileno()] += piece[:room]
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
