"""The `#!` lines of scripts that a run made and executed: they vanish with its view. Changes nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

import msgspec

from ..kernel import userns
from ..kernel.beneath import Root
from ..records.trace import Trace

__all__ = ["with_lines"]

_LINE = 256  # BINPRM_BUF_SIZE: the kernel looks no further into the file


def with_lines(trace: Trace, pid: int) -> Trace:
    """The trace with the first line of each executed script that the host does not have and the root of `pid` does.

    What lies in the host's /tmp is none of the run's, whatever its name.
    """
    programs = {os.path.normpath(execution.program) for execution in trace.executions}
    made = {program for program in programs if program.startswith("/tmp/") or not os.path.lexists(program)}
    if not made:
        return trace
    with Root(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        ids = None if os.geteuid() == 0 else userns.subordinate()
        # Files of a user's range of ids are for nobody but their owner, unless their modes say so.
        lines = _lines(root, made) if ids is None else userns.call(_lines, root, made, ids=ids)
    return msgspec.structs.replace(
        trace,
        executions=tuple(
            msgspec.structs.replace(execution, line=lines.get(os.path.normpath(execution.program), ""))
            for execution in trace.executions
        ),
    )


def _lines(root: Root, programs: Iterable[str]) -> dict[str, str]:
    return {program: _line(root, program) for program in programs}


def _line(root: Root, program: str) -> str:
    """The `#!` line; "" for another kind of file, and for one that is gone or not for the caller to read."""
    try:
        descriptor = root.openat(program, os.O_RDONLY | os.O_NONBLOCK, follow=True)
    except OSError:
        return ""
    with open(descriptor, "rb", buffering=0) as file:
        head = file.read(_LINE) or b"" if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    return os.fsdecode(head.partition(b"\n")[0]) if head.startswith(b"#!") else ""
