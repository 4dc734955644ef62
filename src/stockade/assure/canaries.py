"""What must stay out of reach, made and removed by the tool: a file, a process, sockets, memory, secrets."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stockade.errors import HostError
from stockade.kernel import libc
from stockade.kernel.syscalls import host_architecture, numbers

from .inside.results import MARK

__all__ = ["Canaries", "canaries"]

VARIABLE = "STOCKADE_CANARY"

_NAMES = ("file", "handle", "memory", "process", "descriptor", "abstract", "shared", "loopback", "address",
          "environment")  # fmt: skip
_START_S = 10.0
_LARGEST_HANDLE = 128

#: An address that RFC 5737 keeps for documentation: only a route to it is looked up, nothing is sent.
_SOMEWHERE = ("198.51.100.1", 9)


@dataclass
class Canaries:
    """What was made. `marks` are the secret contents by name, `told` what the probes are told: places, no contents."""

    marks: dict[str, str]
    directory: Path
    told: dict[str, Any] = field(default_factory=dict)

    def named(self, marks: list[str]) -> set[str]:
        """The names of the canaries whose contents are among `marks`."""
        return {name for name, mark in self.marks.items() if mark in marks}


@contextlib.contextmanager
def canaries(beside: Path) -> Iterator[Canaries]:
    """Make them all; `beside` is a directory on the file system that the probes' tree is on."""
    marks = {name: MARK + secrets.token_hex(16) for name in _NAMES}
    made = Canaries(marks, Path(tempfile.mkdtemp(prefix="stockade-canary-")))
    hidden = beside / "canary"
    try:
        made.directory.chmod(0o755)
        file = made.directory / "file"
        file.write_text(made.marks["file"], encoding="ascii")
        hidden.write_text(made.marks["handle"], encoding="ascii")
        with _process(made) as told:
            made.told |= told | {"file": str(file), "handle": _handle(hidden)}
            yield made
    finally:
        shutil.rmtree(made.directory)
        hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def _process(made: Canaries) -> Iterator[dict[str, Any]]:
    name = secrets.token_hex(6)
    request = {
        "marks": made.marks, "comm": f"can{name}", "abstract": f"stockade-{name}", "queue": f"stockade-{name}",
        "shm_key": secrets.randbelow(1 << 30) + 1, "host_address": _host_address(),
    }  # fmt: skip
    command = [sys.executable, "-I", "-S", os.fspath(Path(__file__).with_name("canaryprocess.py"))]
    environment = {"PATH": os.defpath, VARIABLE: made.marks["process"]}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=made.directory, env=environment, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise HostError("the canary process outside could not be started", hint="see its standard error")
            told = {key: request[key] for key in ("comm", "abstract", "queue", "shm_key", "host_address")}
            yield told | json.loads(line)
        finally:
            process.stdin.close()
            try:
                process.wait(_START_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _host_address() -> str:
    """The host's own IPv4 address that is not its loopback's, "" where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        try:
            link.connect(_SOMEWHERE)
        except OSError:
            return ""
        address: str = link.getsockname()[0]
    return "" if address.startswith("127.") else address


def _handle(path: Path) -> dict[str, object] | None:
    """name_to_handle_at(2) of `path`; None where the file system gives none."""
    number = numbers(host_architecture())["name_to_handle_at"]
    handle = ctypes.create_string_buffer(_LARGEST_HANDLE.to_bytes(4, sys.byteorder), 8 + _LARGEST_HANDLE)
    mount = ctypes.c_int()
    arguments = (ctypes.c_int(-100), os.fsencode(path), handle, ctypes.byref(mount), ctypes.c_int(0))
    if libc.syscall(number, *arguments) < 0:
        return None
    length, kind = struct.unpack_from("=Ii", handle.raw)
    return {"type": kind, "bytes": handle.raw[8 : 8 + length].hex()}
