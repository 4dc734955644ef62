"""Which limit of the jail a call ran into, and the line that gives twice as much. Knows no filter and no rights.

Source: the errors of fork(2), open(2), write(2) and getrlimit(2); tmpfs(5); the memory controller of control groups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from ..records.lock import Lock, LockDirectory
from ..records.policy import size_bytes
from ..records.spec import Directory, Spec
from ..records.text import unescape
from ..records.trace import CallSeen, Trace
from . import changes
from .changes import Change

__all__ = ["Exhausted", "exhausted"]

_TMPFS_BYTES = 256 << 20
_TMPFS_INODES = 65536
_BYTES_PER_FILE, _LEAST_PER_FILE = 8192, 1024  # of a volume: what it has by itself, and what a spec may ask for
_STARTING = frozenset({"clone", "clone3", "fork", "vfork"})
_FILLING = frozenset({"create", "write", "mkdir", "truncate", "mknod"})
_UNITS = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))


class Exhausted(msgspec.Struct, frozen=True):
    """What was used up, in words, and the change of the spec that gives more; None where the host has no more.

    `limit` names the one limit that was reached, whatever call ran into it; "" where that is not known.
    """

    reason: str
    change: Change | None
    limit: str = ""


def exhausted(seen: CallSeen, spec: Spec, lock: Lock, trace: Trace) -> Exhausted | None:
    """The limit that the kernel answered `seen` by, None where it was none of the spec's."""
    limits = spec.limits
    match seen.error:
        case "SIGKILL" if limits.memory:
            return _size("memory", limits.memory, "is reached: the kernel ended the process that asked for more")
        case "EMFILE" if limits.open_files:
            return _number("open_files", limits.open_files)
        case "EAGAIN" if limits.processes and seen.name in _STARTING:
            return _number("processes", limits.processes)
        case "EFBIG" if limits.file_size:
            return _size("file_size", limits.file_size, "is reached")
        case "ENOSPC":
            return _full(seen, spec, lock, trace)
    return None


def _number(key: str, value: int) -> Exhausted:
    return Exhausted(f"`{key} = {value}` is reached", changes.limit(key, value * 2), key)


def _size(key: str, value: str, what: str) -> Exhausted:
    return Exhausted(f'`{key} = "{value}"` {what}', changes.limit(key, _written(size_bytes(value) * 2)), key)


def _written(number: int) -> str:
    """A size as a spec has it."""
    for unit, letter in _UNITS:
        if number % unit == 0:
            return f"{number // unit}{letter}"
    return str(number)


def _full(seen: CallSeen, spec: Spec, lock: Lock, trace: Trace) -> Exhausted:
    """A place is full: of files, where a call that makes one was refused, else of bytes."""
    known = {unescape(found.path): found for found in lock.directories}
    places = list(dict.fromkeys(_places(seen, known, trace)))
    if not places:
        return Exhausted("a writable place is full: set its `size` in `[directories]`, or `tmpfs` in `[limits]`", None)
    if len(places) > 1:
        named = ", ".join(f"`{place}`" for place in places)
        larger = _written(2 * size_bytes(spec.limits.tmpfs or str(_TMPFS_BYTES)))
        return Exhausted(f"one of {named} is full", changes.limit("tmpfs", larger), "tmpfs")
    [place] = places
    found = known[place]
    directory = spec.directories.get(found.path) or _as_it_is(found, spec)
    stated = directory.size or (None if found.volume else spec.limits.tmpfs)
    size = size_bytes(stated) if stated else found.size if found.volume else _TMPFS_BYTES
    if not size:
        return Exhausted(f"the host's file system, on which the volume `{place}` lies, is full", None)
    if not seen.path:
        wanted = msgspec.structs.replace(directory, size=_written(2 * size))
        reason = f"`{place}` is full: it has {_written(size)}"
        return Exhausted(reason, changes.directory(place, wanted), f"size of {place}")
    most = directory.inodes or found.inodes or (size // _BYTES_PER_FILE if found.volume else _TMPFS_INODES)
    wanted = msgspec.structs.replace(directory, inodes=2 * most)
    if found.volume and 2 * most * _LEAST_PER_FILE > size:
        wanted = msgspec.structs.replace(wanted, size=_written(2 * size))
    reason = f"`{place}` has no room for more than {most} files"
    return Exhausted(reason, changes.directory(place, wanted), f"inodes of {place}")


def _as_it_is(found: LockDirectory, spec: Spec) -> Directory:
    """The directory that the build found to be needed, as a spec would say it."""
    owner = spec.service.user if found.uid else "root"
    return Directory(
        mode=f"{found.mode:04o}", owner=owner, kind="volume" if found.volume else "tmpfs", volume=found.volume or None
    )


def _places(seen: CallSeen, known: dict[str, LockDirectory], trace: Trace) -> Iterator[str]:
    """Writable directories in which `seen` may have been refused; a call without a path may be to any written one."""
    if seen.path.startswith("/"):
        yield from _of(seen.path, known)
        return
    for access in trace.accesses:
        if access.operation in _FILLING and access.error == ("ENOSPC" if seen.path else ""):
            yield from _of(access.path, known)


def _of(path: str, known: dict[str, LockDirectory]) -> Iterator[str]:
    """The file system that `path` is on: a volume, or the outermost of the tmpfs directories above it."""
    place = ""
    while path != "/":
        found = known.get(path)
        if found is not None and (not found.volume or not place):
            place = path
        if found is not None and found.volume:
            break
        path = os.path.dirname(path)
    if place:
        yield place
