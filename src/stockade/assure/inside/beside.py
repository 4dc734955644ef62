"""The oracle's hand in a machine: started there by its root, beside the jail in it, for what the host cannot see."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["main"]

_FILES = ("status", "limits", "mountinfo", "environ")


def main(task: str, *arguments: str) -> None:
    """Carry out one of the tasks and print its answer as JSON."""
    tasks: dict[str, Callable[..., object]] = {"put": put, "own": own, "process": process, "owner": owner}
    json.dump(tasks[task](*arguments), sys.stdout)


def put() -> int:
    """Write the files that standard input names, hexadecimal contents by path; how many."""
    files: dict[str, str] = json.load(sys.stdin)
    for path, content in files.items():
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with open(path, "wb") as file:
            file.write(bytes.fromhex(content))
        os.chmod(path, 0o644)
    return len(files)


def own() -> dict[str, int]:
    """Numbers of the namespaces beside the jail, by kind."""
    return {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in os.listdir("/proc/self/ns")}


def owner(pid: str, path: str) -> str:
    """Owner and octal mode of a file, as the process `pid` names it."""
    status = os.lstat(f"/proc/{pid}/root{path}")
    return f"{status.st_uid} {status.st_mode & 0o7777:o}"


def process(mark: str, inner: str) -> dict[str, Any] | None:
    """About the process whose command line ends in `mark` and that calls itself `inner`, and about this one."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if os.fsencode(mark) in _read(pid, "cmdline").split(b"\0")[-2:] and _last_pid(pid) == inner.encode():
                root = os.stat(f"/proc/{pid}/root/.")
                return {"pid": int(pid), "process": _told(pid), "beside": _told("self"),
                        "root": [root.st_dev, root.st_ino]}  # fmt: skip
    return None


def _read(pid: str, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def _last_pid(pid: str) -> bytes:
    """The process's number in its own namespace."""
    return next((line.split()[-1] for line in _read(pid, "status").splitlines() if line.startswith(b"NSpid:")), b"")


def _told(pid: str) -> dict[str, Any]:
    told: dict[str, Any] = {name: _read(pid, name).hex() for name in _FILES}
    for kind in ("fd", "ns"):
        told[kind] = {}
        for name in os.listdir(f"/proc/{pid}/{kind}"):
            with contextlib.suppress(FileNotFoundError):
                told[kind][name] = os.readlink(f"/proc/{pid}/{kind}/{name}")
    return told
