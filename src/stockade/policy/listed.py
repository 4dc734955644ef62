"""Directories of which a jail has some names only: who lists one there is told of no others. Changes nothing."""

from __future__ import annotations

import os
from collections import Counter

from ..records.lock import Lock
from ..records.spec import Spec
from ..records.text import escape, unescape
from ..records.trace import Trace
from .writable import mount_of, writable_place

__all__ = ["partly_there"]

_OWN = ("/proc/", "/sys/", "/dev/", "/run/", "/tmp/", "/var/tmp/")  # what a jail and the host each have for themselves
_MOST = 3


def partly_there(trace: Trace, spec: Spec, lock: Lock) -> str:
    """A hint on the directories that were listed in the jail and have more names on the host, the last three first.

    "" for none. What is mounted in the jail has its own names, and `lock` does not tell them.
    """
    names = Counter(os.path.dirname(unescape(entry.path)) for entry in lock.entries)
    listed = dict.fromkeys(
        os.path.realpath(access.path) for access in trace.accesses if access.operation == "list" and not access.error
    )
    told = []
    for path in reversed(listed):
        own = path == "/" or f"{path}/".startswith(_OWN) or _is_mounted(path, spec, lock)
        total = 0 if own else _count(path)
        if names[path] < total:
            told.append(f"`{escape(path)}`, of whose {total} names the jail has {names[path]}")
    if not told:
        return ""
    return f"it listed {', '.join(told[:_MOST])}: what it looks for there comes in by `files.include`"


def _is_mounted(path: str, spec: Spec, lock: Lock) -> bool:
    """Whether `path` is in a mount of the host's, a volume or a tmpfs directory."""
    return mount_of(path, spec) is not None or writable_place(path, spec, lock) is not None


def _count(path: str) -> int:
    """How many names the host's directory has; 0 for none that can be read."""
    try:
        return len(os.listdir(path))
    except OSError:
        return 0
