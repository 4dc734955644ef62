"""What every probe shares: the request, places to write to, the way to ask outside. Tries nothing by itself."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from .calls import Kernel, error_name
from .results import MARK

__all__ = ["World", "found_marks", "hear", "in_child", "say"]

_SCRATCH = ("/tmp", "/var/tmp", "/run", "/dev/shm", "/")


class World:
    """The request that came with the tree, and helpers."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.canary: dict[str, Any] = request["canary"]
        self.tree: str = request["tree"]
        self.architecture: str = request["architecture"]
        self.call = Kernel(request["numbers"])

    @contextlib.contextmanager
    def scratch(self) -> Iterator[str | None]:
        """A new directory that this user can write to, removed afterwards; None where there is none."""
        name = f".stockade-{os.urandom(6).hex()}"
        for place in (*_SCRATCH, *self.request["writable"]):
            made = os.path.join(place, name)
            try:
                os.mkdir(made, 0o700)
            except OSError:
                continue
            try:
                yield made
            finally:
                _remove(made)
            return
        yield None

    def ask(self, kind: str, **question: object) -> str:
        """Have the oracle outside look at something now; its answer is one line."""
        say({"ask": kind, **question})
        return hear()


def say(message: dict[str, Any]) -> None:
    """One line to the oracle outside."""
    os.write(1, json.dumps(message).encode() + b"\n")


def hear() -> str:
    """One line from outside; what probes pushed into the terminal is skipped."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        if byte >= b" " or byte == b"\n":
            line += byte
    return line.decode().strip()


def found_marks(data: bytes) -> list[str]:
    """The canaries' contents in `data`."""
    marks = []
    for piece in data.split(MARK.encode())[1:]:
        marks.append(MARK + piece[:32].decode("ascii", "replace"))
    return marks


def in_child(work: Any) -> Any:
    """`work()` in a child process, whose root, directory and credentials vanish with it; its result as JSON carries it.

    An OSError comes back as {"errno": NAME}.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                answer = work()
            except OSError as error:
                answer = {"errno": error_name(error.errno or 0)}
            os.write(writer, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else {"errno": "killed"}


def _remove(path: str) -> None:
    for top, directories, files in os.walk(path, topdown=False):
        for name in files:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(top, name))
        for name in directories:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(top, name))
    with contextlib.suppress(OSError):
        os.rmdir(path)
