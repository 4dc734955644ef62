"""Stand-ins, in an ordinary user's view, for what the host keeps from that user. Reads the host, changes nothing.

The kernel refuses to write to a file or directory whose owner has no mapping in the user namespace, whatever rights the
writer has there (user_namespaces(7)), so the root of a view cannot write where the host's root can. A seed of the same
owner, which the view does map, can be written to.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator

from ..records.seed import Seed
from ..records.trace import Access, Trace

__all__ = ["stand_ins"]

_REFUSED = frozenset({"EACCES", "EPERM"})
#: What changes an entry of a directory, and what changes a file or directory itself.
_OF_DIRECTORY = frozenset({"create", "mkdir", "mknod", "bind", "unlink"})
_OF_ITSELF = frozenset({"create", "write", "truncate", "chmod", "chown"})
_LARGEST = 16 << 20  # bytes


def stand_ins(trace: Trace, *, uid: int, groups: Collection[int], seeded: Collection[str]) -> tuple[Seed, ...]:
    """Seeds of what a run was refused to write to, and on the host could write to as `uid` with `groups`, by path.

    A directory comes without what it holds, which the host's shows through it; a file with its content, or empty
    where the caller may not read it, as with logs. Nothing for paths in `seeded`, and for files above 16 MiB.
    """
    found: dict[str, Seed] = {}
    for access in trace.accesses:
        if access.error in _REFUSED:
            for path in _places(access):
                if path not in seeded and path not in found:
                    seed = _seed(path, uid, groups)
                    if seed is not None:
                        found[path] = seed
    return tuple(found[path] for path in sorted(found))


def _places(access: Access) -> Iterator[str]:
    """What would have to be writable, as the host names it without symlinks."""
    path = os.path.realpath(access.path)
    if access.operation in _OF_ITSELF and os.path.exists(path):
        yield path
    elif access.operation in _OF_DIRECTORY:
        yield os.path.realpath(os.path.dirname(access.path))


def _seed(path: str, uid: int, groups: Collection[int]) -> Seed | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    if status.st_uid == os.geteuid() or not _writable(status, uid, groups):
        return None
    mode, reason = stat.S_IMODE(status.st_mode), "stand-in for what the caller may not write to"
    if stat.S_ISDIR(status.st_mode):
        return Seed(path=path, type="directory", mode=mode, uid=status.st_uid, gid=status.st_gid, reason=reason)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
        return None
    return Seed(path=path, content=_content(path), mode=mode, uid=status.st_uid, gid=status.st_gid, reason=reason)


def _writable(status: os.stat_result, uid: int, groups: Collection[int]) -> bool:
    """Whether the host's permission bits let a process write (path_resolution(7)); root may always."""
    if uid == 0:
        return True
    if status.st_uid == uid:
        return bool(status.st_mode & stat.S_IWUSR)
    return bool(status.st_mode & (stat.S_IWGRP if status.st_gid in groups else stat.S_IWOTH))


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except PermissionError:
        return b""
