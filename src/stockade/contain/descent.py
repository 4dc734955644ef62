"""Processes by descent: what one has started, and the end of all of it."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from stockade.kernel.pidfd import pidfd_open

__all__ = ["descendants", "end", "inside", "stat"]

_STOP_S = 1.0
_POLL_S = 0.002
_STARTED = 19  # the place of field 22 of proc_pid_stat(5) in what `stat` gives
_AT_REST = frozenset({b"T", b"t", b"Z", b"X"})


def stat(pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from the third on (proc_pid_stat(5)); none when it is gone."""
    return _fields(f"/proc/{pid}/stat")


def _fields(path: str) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def inside(pid: int, ancestor: int) -> bool:
    """Whether `pid`, as it is now, is `ancestor` or a descendant of it: a recycled number is not."""
    while pid > 1:
        if pid == ancestor:
            return True
        fields = stat(pid)
        if not fields:
            return False
        pid = int(fields[1])
    return False


def descendants(pid: int) -> list[int]:
    """Pids of the children of `pid` and of theirs, as the caller sees them. A jail decides how many, and how deep."""
    listed = _listed(pid)
    return list(_by_parent(pid)) if listed is None else listed


def _listed(pid: int) -> list[int] | None:
    """Children of every thread and theirs; None on a kernel without CONFIG_PROC_CHILDREN."""
    found = [pid]
    for parent in found:
        for path in glob.iglob(f"/proc/{parent}/task/*"):
            try:
                children = Path(path, "children").read_text(encoding="ascii").split()
            except ProcessLookupError:
                continue
            except FileNotFoundError:
                if os.path.exists(path):
                    return None
                continue
            found += map(int, children)
    return found[1:]


def _by_parent(ancestor: int) -> Iterator[int]:
    parents = {
        int(name): int(fields[1])
        for name in os.listdir("/proc")
        if name.isdecimal() and (fields := stat(int(name)))
    }
    for pid in parents:
        above = pid
        while (above := parents.get(above, 0)) > 1:
            if above == ancestor:
                yield pid
                break


def end(process: tuple[int, int]) -> None:
    """Kill the process (pid and start time) and its descendants; one whose parent has ended before is none of them.

    Each is stopped before any is killed, else one could start another meanwhile, or lose the parent it is known by.
    What does not stop, because the kernel holds it or somebody wakes it, is killed after a second all the same.
    """
    deadline = time.monotonic() + _STOP_S
    found = [process]
    while True:
        known = set(found)
        for one in found:
            _send(one, signal.SIGSTOP)
        family = list(_family(process[0]))
        if _is_there(process):  # else the number may have been another's
            found += [one for one in family if one not in known]
        if (len(found) == len(known) and all(map(_at_rest, found))) or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    for one in found:
        _send(one, signal.SIGKILL)


def _family(pid: int) -> Iterator[tuple[int, int]]:
    for child in descendants(pid):
        fields = stat(child)
        if fields and inside(child, pid):
            yield child, int(fields[_STARTED])


def _is_there(process: tuple[int, int]) -> bool:
    """Whether the number is still that process's: one whose main thread has ended is a zombie, and others may run."""
    fields = stat(process[0])
    return bool(fields) and int(fields[_STARTED]) == process[1]


def _at_rest(process: tuple[int, int]) -> bool:
    """Whether none of its threads runs."""
    threads = map(_fields, glob.iglob(f"/proc/{process[0]}/task/*/stat"))
    return not _is_there(process) or all(not fields or fields[0] in _AT_REST for fields in threads)


def _send(process: tuple[int, int], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        descriptor = pidfd_open(process[0])
        try:
            if _is_there(process):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
