"""What the host sees of a process: the oracle is outside of the jail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def status(pid: int) -> dict[str, str]:
    """Fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def exists(pid: int) -> bool:
    """Whether the process runs: what its parent has not asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def cpu_ticks(pid: int) -> int:
    """CPU time of a process, in clock ticks (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def descriptors(pid: int) -> dict[int, str]:
    """Open descriptors of a process and what they lead to."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def children(parent: int) -> list[int]:
    """Pids of the children of a process."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(name))
    return found


def wardens() -> set[int]:
    """Pids of every warden of this process, by their ancestry."""
    mine = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                comm = Path(f"/proc/{name}/comm").read_text()
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "warden" in comm and parent == os.getpid():
                mine.add(int(name))
    return mine
