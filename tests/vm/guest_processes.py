"""What a guest leaves, or must not leave, on the host."""

from __future__ import annotations

import os
import time
from pathlib import Path

from stockade import places
from stockade.vm import control


def of_guest(name: str) -> list[int]:
    """Every process of a running guest: its keeper's, UML's and the network's."""
    status = control.request(name, "status")
    return [*status["processes"], *status["helpers"]]


def keeper_of(name: str) -> int:
    """The keeper: the parent of UML's first process."""
    return int(
        Path(f"/proc/{control.request(name, 'status')['processes'][0]}/stat").read_text().rpartition(")")[2].split()[1]
    )


def alive(pid: int) -> bool:
    """Whether a process still runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(pids: list[int], seconds: float = 5.0) -> list[int]:
    """Those of `pids` that still run after at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(alive(pid) for pid in pids):
        time.sleep(0.01)
    return [pid for pid in pids if alive(pid)]


def holders(name: str) -> list[int]:
    """Processes that have a file of the guest open."""
    place = os.path.realpath(places.guest(name))
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and int(entry) != os.getpid()):
        try:
            names = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        if any(target.startswith(f"{place}/") for target in names):
            found.append(pid)
    return found


def uids_of_kernels(name: str) -> set[int]:
    """Who runs the kernel of the guest `name`, of any caller; empty where nobody does."""
    word = f"stockade_hostname={name}".encode()
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if word in (entry / "cmdline").read_bytes().split(b"\0"):
                found.add(entry.stat().st_uid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
