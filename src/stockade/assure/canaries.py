"""What must stay out of reach, made and removed by the tool: a file, a process, sockets, memory, secrets."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stockade.errors import HostError
from stockade.kernel.syscalls import host_architecture, numbers

from .inside.results import MARK

__all__ = ["LOWEST_PID", "VARIABLE", "Canaries", "canaries", "fresh", "requested", "told"]

VARIABLE = "STOCKADE_CANARY"

#: More than a run uses itself, less than the kernel gives out after its first round (RESERVED_PIDS).
LOWEST_PID = 256

_NAMES = ("file", "handle", "memory", "process", "descriptor", "abstract", "shared", "loopback", "address",
          "environment")  # fmt: skip
_START_S = 10.0

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


def fresh() -> dict[str, str]:
    """New contents for every canary, by name."""
    return {name: MARK + secrets.token_hex(16) for name in _NAMES}


def requested(marks: dict[str, str], *, hidden: str, host_address: str) -> dict[str, Any]:
    """What the process that has the canaries is asked for, as `canaryprocess` reads it.

    `hidden` is a file of which a handle is taken, `host_address` where it listens beside the loopback, "" for nowhere.
    """
    name = secrets.token_hex(6)
    return {
        "marks": marks, "comm": f"can{name}", "abstract": f"stockade-{name}", "queue": f"stockade-{name}",
        "shm_key": secrets.randbelow(1 << 30) + 1, "host_address": host_address,
        "lowest_pid": LOWEST_PID,
        "handle": {"path": hidden, "number": numbers(host_architecture())["name_to_handle_at"]},
    }  # fmt: skip


def told(request: dict[str, Any], answer: str) -> dict[str, Any]:
    """What the probes are told of the process's canaries: places, no contents."""
    known = {key: request[key] for key in ("comm", "abstract", "queue", "shm_key", "host_address")}
    known.update(json.loads(answer))
    return known


@contextlib.contextmanager
def canaries(beside: Path) -> Iterator[Canaries]:
    """Make them all; `beside` is a directory on the file system that the probes' tree is on."""
    marks = fresh()
    made = Canaries(marks, Path(tempfile.mkdtemp(prefix="stockade-canary-")))
    hidden = beside / "canary"
    try:
        made.directory.chmod(0o755)
        file = made.directory / "file"
        file.write_text(made.marks["file"], encoding="ascii")
        hidden.write_text(made.marks["handle"], encoding="ascii")
        with _process(made, hidden) as known:
            made.told |= known | {"file": str(file)}
            yield made
    finally:
        shutil.rmtree(made.directory)
        hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def _process(made: Canaries, hidden: Path) -> Iterator[dict[str, Any]]:
    request = requested(made.marks, hidden=os.fspath(hidden), host_address=_host_address())
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
            yield told(request, line)
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
