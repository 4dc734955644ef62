"""Walk a tree that may be hostile: one entry at a time, by descriptors, never through a symbolic link or a mount."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from stockade.kernel.beneath import Root

from .seen import Seen

__all__ = ["DEEPEST", "Node", "mounts", "open_regular", "read_inside", "walk"]

#: Directories in one another that are examined. Two descriptors are open for each.
DEEPEST = 200

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Node(NamedTuple):
    """One entry: its path from the root, its lstat(2), and the directory's descriptor and name to reach it by.

    The descriptor is good until the walk goes on.
    """

    path: str
    status: os.stat_result
    directory: int
    name: str

    @property
    def is_file(self) -> bool:
        """A regular file."""
        return stat.S_ISREG(self.status.st_mode)

    @property
    def is_directory(self) -> bool:
        """A directory."""
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_link(self) -> bool:
        """A symbolic link."""
        return stat.S_ISLNK(self.status.st_mode)


def mounts(root: int) -> dict[str, str]:
    """What is mounted below the directory open as `root` in this process's mount namespace: path in it, type.

    Source: proc_pid_mountinfo(5).
    """
    above = os.readlink(f"/proc/self/fd/{root}").rstrip("/") + "/"
    found = {}
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields, _, rest = os.fsdecode(line).partition(" - ")
            place = _unescaped(fields.split(" ")[4])
            if place.startswith(above) and place != above:
                found[place[len(above) - 1 :]] = rest.split(" ")[0]
    return found


def _unescaped(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def walk(root: int, mounted: Mapping[str, str]) -> Iterator[Node | Seen]:
    """Everything below the directory `root`, itself first, and what could not be looked at.

    What lies on the paths `mounted` is not entered. Entries come as the file systems gives them, in no order: nothing
    is kept of a directory, so a million files cost no memory.
    """
    yield Node("/", os.fstat(root), root, ".")
    levels: list[tuple[str, int, Iterator[os.DirEntry[str]]]] = []
    try:
        yield from _enter(levels, "", root, ".")
        while levels:
            path, directory, entries = levels[-1]
            try:
                entry = next(entries, None)
            except OSError as error:
                yield _trouble(path or "/", error)
                entry = None
            if entry is None:
                levels.pop()
                os.close(directory)
                continue
            here = f"{path}/{entry.name}"
            if here in mounted:
                continue
            try:
                status = os.stat(entry.name, dir_fd=directory, follow_symlinks=False)
            except OSError as error:
                yield _trouble(here, error)
                continue
            yield Node(here, status, directory, entry.name)
            if stat.S_ISDIR(status.st_mode):
                yield from _enter(levels, here, directory, entry.name)
    finally:
        for _, directory, _ in levels:
            os.close(directory)


def _enter(
    levels: list[tuple[str, int, Iterator[os.DirEntry[str]]]], path: str, directory: int, name: str
) -> Iterator[Seen]:
    if len(levels) == DEEPEST:
        yield Seen("TOO-DEEP", path, f"what is more than {DEEPEST} directories deep was not examined")
        return
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    except OSError as error:
        yield _trouble(path or "/", error)
        return
    levels.append((path, descriptor, os.scandir(descriptor)))


def _trouble(path: str, error: OSError) -> Seen:
    """A file that went away, or changed into something that is not followed, is no failure to read one."""
    gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
    return Seen("VANISHED" if gone else "UNREADABLE", path, (error.strerror or str(error)).lower())


def open_regular(node: Node) -> int | Seen:
    """A descriptor to read the regular file `node` by, or why there is none.

    The entry is pinned and looked at before it is opened: a device or FIFO put in its place is never touched.
    """
    try:
        handle = os.open(node.name, _HANDLE, dir_fd=node.directory)
    except OSError as error:
        return _trouble(node.path, error)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return Seen("VANISHED", node.path, "it was a file and is something else now")
        return os.open(f"/proc/self/fd/{handle}", _READ)
    except OSError as error:
        return _trouble(node.path, error)
    finally:
        os.close(handle)


def read_inside(root: Root, path: str, *, limit: int = 1 << 22) -> bytes | None:
    """At most `limit` bytes of the regular file that `path` leads to inside `root`; None when there is none to read."""
    try:
        handle = root.openat(path, os.O_PATH, follow=True)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        with open(f"/proc/self/fd/{handle}", "rb", buffering=0) as file:
            return file.read(limit)
    except OSError:
        return None
    finally:
        os.close(handle)
