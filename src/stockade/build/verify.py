"""Compare a rootfs with its lock. Changes nothing, follows no link."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from stockade.kernel.beneath import Root
from stockade.kernel.userns import Single
from stockade.records.closure import FileType
from stockade.records.lock import Lock, LockEntry
from stockade.records.text import escape

from . import copying
from .generations import caller_ids, on_files

__all__ = ["Difference", "verify"]


class Difference(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One thing that is not as the lock says. The path is escaped as in the lock."""

    path: str
    kind: Literal["missing", "extra", "type", "mode", "owner", "digest", "target", "capabilities"]
    expected: str = ""
    found: str = ""


def verify(rootfs: Path, lock: Lock) -> tuple[Difference, ...]:
    """What differs between the caller's tree at `rootfs` and `lock`, sorted by path; nothing when it is as built.

    Content, mode, owner, type, target and file capabilities are compared; of a
    generated secret all but the content.
    """
    ids = caller_ids()
    if isinstance(ids, Single) and lock.entries:
        ids = Single(uid=lock.entries[0].uid, gid=lock.entries[0].gid)
    return on_files(ids, _verify, rootfs, lock)


def _verify(rootfs: Path, lock: Lock) -> tuple[Difference, ...]:
    expected = {entry.path: entry for entry in lock.entries}
    found: list[Difference] = []
    with Root.open(rootfs) as root:
        for path, status, directory, name in _walk(root.descriptor):
            entry = expected.pop(path, None)
            if entry is None:
                found.append(Difference(path=path, kind="extra", found=_type(status) or "special file"))
            else:
                found += _compare(entry, status, directory, name)
    found += [Difference(path=path, kind="missing", expected=entry.type) for path, entry in expected.items()]
    return tuple(sorted(found))


def _walk(root: int) -> Iterator[tuple[str, os.stat_result, int, str]]:
    """Escaped path and status of everything below and with `root`, with the directory and name to reach it by."""
    yield "/", os.fstat(root), root, "."
    for above, directories, files, descriptor in os.fwalk(".", dir_fd=root, follow_symlinks=False, onerror=_raise):
        prefix = escape(above[1:])
        for name in (*directories, *files):
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            yield f"{prefix}/{escape(name)}", status, descriptor, name


def _raise(error: OSError) -> None:
    raise error


def _type(status: os.stat_result) -> FileType | None:
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISDIR(status.st_mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(status.st_mode) else None


def _compare(entry: LockEntry, status: os.stat_result, directory: int, name: str) -> Iterator[Difference]:
    kind = _type(status)
    if kind != entry.type:
        yield Difference(path=entry.path, kind="type", expected=entry.type, found=kind or "special file")
        return
    owner, mode = f"{status.st_uid}:{status.st_gid}", stat.S_IMODE(status.st_mode)
    if owner != f"{entry.uid}:{entry.gid}":
        yield Difference(path=entry.path, kind="owner", expected=f"{entry.uid}:{entry.gid}", found=owner)
    if kind == "symlink":
        target = escape(os.readlink(name, dir_fd=directory))
        if target != entry.target:
            yield Difference(path=entry.path, kind="target", expected=entry.target, found=target)
        return
    if mode != entry.mode:
        yield Difference(path=entry.path, kind="mode", expected=f"{entry.mode:04o}", found=f"{mode:04o}")
    if kind == "file":
        yield from _compare_content(entry, directory, name)


def _compare_content(entry: LockEntry, directory: int, name: str) -> Iterator[Difference]:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        capabilities = ""
        if "security.capability" in os.listxattr(descriptor):
            capabilities = os.getxattr(descriptor, "security.capability").hex()
        if capabilities != entry.capabilities:
            yield Difference(
                path=entry.path, kind="capabilities", expected=entry.capabilities or "none",
                found=capabilities or "none",
            )  # fmt: skip
        digest = "" if entry.secret else copying.digest(descriptor)
        if digest != entry.sha256:
            yield Difference(path=entry.path, kind="digest", expected=entry.sha256, found=digest)
    finally:
        os.close(descriptor)
