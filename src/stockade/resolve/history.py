"""A trace regrouped by path: what was done to each, in order, by which program. Decides nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from ..records.trace import Access, Trace
from .host import Host

__all__ = ["EXISTS", "FRESH", "SHOWN", "WRITES", "History", "Programs", "follows", "histories", "place"]

WRITES = frozenset({"write", "create", "truncate", "mkdir", "mknod", "unlink", "bind"})
# Errors that a call gives only for a path that is there: realpath(3) reads "links" that are none, mkdir finds it made.
EXISTS = frozenset({"EINVAL", "EEXIST", "EISDIR", "ENOTEMPTY", "EBUSY", "ENODATA", "EOPNOTSUPP", "ENOTTY", "ETXTBSY"})

#: Of the one temporary tree a run sees nothing of the host's, and of the other all.
FRESH, SHOWN = "/tmp/", "/var/tmp/"

_VERBS = {
    "read": "read", "write": "opened for writing", "create": "created", "truncate": "truncated", "stat": "looked at",
    "readlink": "read as a link", "list": "listed", "exec": "executed", "chdir": "entered", "chroot": "made root",
    "mkdir": "made", "mknod": "made", "unlink": "removed", "chmod": "chmoded", "chown": "chowned", "bind": "bound",
    "connect": "connected to", "mount": "mounted on",
}


class History(msgspec.Struct):
    """Everything that happened to one place. `paths` are the names that programs used for it."""

    place: str
    events: list[Access] = []
    paths: dict[str, None] = {}

    @property
    def succeeded(self) -> list[Access]:
        """The accesses that found something."""
        return [event for event in self.events if not event.error or event.error in EXISTS]

    def did(self, *operations: str) -> bool:
        """One of the operations succeeded."""
        return any(not event.error and event.operation in operations for event in self.events)

    def first(self, operations: Iterable[str]) -> Access | None:
        """The first success of one of the operations."""
        return next((event for event in self.events if not event.error and event.operation in operations), None)


def follows(access: Access) -> bool:
    """Whether a symlink at the end of the path was followed: no name is made or removed through one."""
    made = access.operation == "create" and access.mode is None
    return not made and access.operation not in ("readlink", "unlink")


def place(host: Host, path: str, *, follow: bool = True) -> str:
    """What tells two paths apart: the canonical path, or where the host's tree is not what the run saw, as it stands.

    So it is in the kernel's own trees and in /tmp, where anybody of the host may have put something of the same name.
    """
    plain = os.path.normpath(path)
    if plain.startswith("//"):  # POSIX lets two leading slashes stand; Linux gives them no meaning
        plain = plain[1:]
    if plain.startswith(("/proc/", "/sys/", "/dev/", FRESH)) or plain in ("/proc", "/sys", "/dev"):
        return plain
    return host.walk(path, follow=follow).path


def histories(host: Host, trace: Trace) -> dict[str, History]:
    """The histories of a trace by place, in the order of the first access."""
    result: dict[str, History] = {}
    for event in sorted(trace.accesses, key=lambda access: access.order):
        where = place(host, event.path, follow=follows(event))
        history = result.get(where)
        if history is None:
            history = result[where] = History(where)
        history.events.append(event)
        history.paths[event.path] = None
    return result


class Programs:
    """Which program a process runs, for the wording of evidence."""

    def __init__(self, trace: Trace) -> None:
        self._programs = {execution.pid: execution.program for execution in trace.executions}

    def tell(self, event: Access) -> str:
        """What an access was, as in "read by /usr/sbin/sshd"."""
        verb = _VERBS[event.operation]
        program = self._programs.get(event.pid)
        return f"{verb} by {program}" if program else verb
