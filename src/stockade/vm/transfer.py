"""Files in and out of a running guest, over its serial line. Nothing that comes out can land outside its target."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from stockade.errors import StateError
from stockade.kernel.beneath import Root

from . import control

__all__ = ["Entry", "listing", "pull", "push"]

_MODE = 0o777
_CHUNK = 1 << 16


class Entry:
    """A line of a listing: "f", "d", "l" or "o", with mode, owner, size, path and, for a link, its target."""

    def __init__(self, text: str, target: str) -> None:
        self.type, mode, uid, gid, size, self.path = text.split(" ", 5)
        self.mode, self.uid, self.gid, self.size = int(mode, 8), int(uid), int(gid), int(size)
        self.target = target


def listing(guest: str, path: str) -> list[Entry]:
    """Everything at and below `path` in the guest, on its file system. StateError for what is not there."""
    status, output, _ = control.execute(guest, ["@list", path])
    _check(status, path, guest)
    words = os.fsdecode(output).split("\0")
    return [Entry(text, target) for text, target in zip(words[::2], words[1::2], strict=False) if text]


def _check(status: int, path: str, guest: str) -> None:
    if status:
        raise StateError(f"`{path}` of guest `{guest}`: {os.strerror(status).lower()}", hint="paths are absolute there")


def pull(guest: str, path: str, target: Path) -> int:
    """Copy a file or a tree of the guest to `target`, which must not be there; returns how many files.

    Links stay links, devices and sockets are left out, setuid is dropped. Every name is resolved below `target`.
    """
    entries = listing(guest, path)
    if entries[0].type != "d":
        if entries[0].type != "f":
            raise StateError(f"`{path}` of guest `{guest}` is no file and no directory", hint="name what it leads to")
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        _fetch(guest, path, descriptor, entries[0].mode)
        return 1
    target.mkdir(mode=0o700)
    count = 0
    prefix = entries[0].path.rstrip("/")
    with Root.open(target) as root:
        for entry in entries[1:]:
            name = entry.path[len(prefix) :]
            if entry.type == "d":
                root.mkdirat(name, 0o700)
            elif entry.type == "l":
                directory, last = root.parent(name)
                os.symlink(entry.target, last, dir_fd=directory)
            elif entry.type == "f":
                _fetch(guest, entry.path, root.create(name), entry.mode)
                count += 1
    return count


def _fetch(guest: str, path: str, descriptor: int, mode: int) -> None:
    with open(descriptor, "wb", buffering=0) as file:

        def take(stream: int, data: bytes) -> None:
            if stream == 1:
                file.write(data)

        status, _, _ = control.execute(guest, ["@read", path], output=take)
        _check(status, path, guest)
        os.fchmod(file.fileno(), mode & _MODE)


def push(guest: str, source: Path, path: str) -> int:
    """Copy a file or a tree of the host into the guest; returns how many files. Each is there whole or not at all.

    A link of the host is followed for `source` itself alone; below it links are left out.
    """
    status = source.stat()
    if stat.S_ISREG(status.st_mode):
        _send(guest, source, path, status.st_mode)
        return 1
    if not stat.S_ISDIR(status.st_mode):
        raise StateError(f"`{source}` is no file and no directory", hint="copy what it leads to")
    count = 0
    for directory, below, files in os.walk(source):
        place = f"{path.rstrip('/')}/{os.path.relpath(directory, source)}".removesuffix("/.")
        code, _, text = control.execute(guest, ["@mkdir", place])
        if code not in (0, errno.EEXIST):
            raise StateError(f"`{place}` of guest `{guest}`: {os.strerror(code).lower()} {text.decode()}".strip())
        below.sort()
        for name in sorted(files):
            file = Path(directory) / name
            found = file.lstat()
            if stat.S_ISREG(found.st_mode):
                _send(guest, file, f"{place}/{name}", found.st_mode)
                count += 1
    return count


def _send(guest: str, source: Path, path: str, mode: int) -> None:
    with open(source, "rb") as file:
        status, _, _ = control.execute(guest, ["@write", path, f"{mode & _MODE:o}"], input=file)
    _check(status, path, guest)
