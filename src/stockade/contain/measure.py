"""What a running jail uses: from its control groups where it has some, else summed over its processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from stockade.kernel import cgroups
from stockade.records.policy import Usage

from .descent import descendants, stat

__all__ = ["members", "started_at", "usage"]

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

# A file that only the group of that controller has, in version 1 and 2.
_MARKS = {
    "memory": ("memory.usage_in_bytes", "memory.current"),
    "pids": ("pids.current",),
    "cpu": ("cpu.stat",),
    "cpuacct": ("cpuacct.usage",),
}


def usage(directories: Sequence[str], pids: Sequence[int]) -> Usage:
    """What the control groups `directories` of a jail tell; what they do not tell is summed over `pids`.

    Without a group, memory is the sum of the processes' proportional shares (smaps_rollup, "Pss" in
    proc_pid_smaps(5)), or of their resident sets where the caller may not read that; CPU time is that of processes
    that live, and of children that they have waited for. None for what nobody tells.
    """
    found = cgroups.usage(_controllers(directories))
    return Usage(
        memory_bytes=found.memory_bytes if found.memory_bytes is not None else _sum(map(_memory, pids)),
        cpu_seconds=found.cpu_seconds if found.cpu_seconds is not None else _cpu_seconds(pids),
        processes=found.processes if found.processes is not None else len(pids),
        oom_kills=found.oom_kills,
    )


def _controllers(directories: Iterable[str]) -> dict[str, str]:
    return {
        controller: directory
        for directory in directories
        for controller, files in _MARKS.items()
        if any(os.path.exists(f"{directory}/{name}") for name in files)
    }


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _memory(pid: int) -> int | None:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except OSError:
        return None


def _cpu_seconds(pids: Iterable[int]) -> float | None:
    ticks = _sum(sum(map(int, fields[11:15])) if (fields := stat(pid)) else None for pid in pids)
    return None if ticks is None else ticks / _TICKS


def started_at(ticks: int, now: float, uptime: float) -> float:
    """Seconds since 1970 of a process that started `ticks` after boot; `uptime` is CLOCK_BOOTTIME at the time `now`."""
    return now - max(0.0, uptime - ticks / _TICKS)


def members(init: int) -> tuple[int, ...]:
    """Pids of the jail whose first process is `init`, as the caller sees them, PID 1 first."""
    return init, *sorted(descendants(init))
