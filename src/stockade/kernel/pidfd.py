"""Processes by descriptor: pidfd_open(2) and what /proc tells of one. Signals nothing."""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path

__all__ = ["has_ended", "pid_of", "pidfd_open"]


def pidfd_open(pid: int) -> int:
    """pidfd_open(2): a close-on-exec descriptor; ProcessLookupError where there is no such process.

    Kernels such as Debian 12's say EINVAL of a process that has ended while its id is still that of a session.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.EINVAL and pid > 0:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        raise


def pid_of(descriptor: int) -> int:
    """The id, in the reader's own pid namespace, of the process behind a pidfd (proc(5), fdinfo).

    ProcessLookupError when it has been reaped, or is in no namespace that the reader sees.
    """
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "Pid" and int(value) > 0:
            return int(value)
    raise ProcessLookupError(f"no process behind the descriptor {descriptor}")


def has_ended(descriptor: int, timeout_s: float = 0.0) -> bool:
    """Whether the process behind a pidfd ends within `timeout_s` seconds (a pidfd is readable from then on)."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
