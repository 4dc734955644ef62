"""Remove a tree whose shape somebody else chose: however deep it is, with three descriptors and no recursion."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

__all__ = ["remove_tree"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ALL = stat.S_IRWXU


def remove_tree(path: Path) -> None:
    """Remove `path` with all below it, if it is there. No link is followed.

    Directories that are closed to their owner are opened. OSError as it comes; ESTALE where somebody moves directories
    meanwhile.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        _empty(_open(os.fspath(path), None))
        os.rmdir(path)


def _empty(current: int) -> None:
    """Remove all that is in the directory `current`, and close it."""
    above: list[tuple[str, os.stat_result]] = []
    try:
        while True:
            name = _first_directory(current)
            if name is not None:
                inner = _open(name, current)
                above.append((name, os.fstat(current)))
                os.close(current)
                current = inner
            elif above:
                name, outer = above.pop()
                parent = os.open("..", _DIRECTORY, dir_fd=current)
                os.close(current)
                current = parent
                if not os.path.samestat(os.fstat(current), outer):
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
                os.rmdir(name, dir_fd=current)
            else:
                return
    finally:
        os.close(current)


def _first_directory(current: int) -> str | None:
    """Remove what is in a directory up to the first directory in it, whose name is returned; None when it is empty."""
    while True:
        seen = False
        with os.scandir(current) as entries:
            for entry in entries:
                seen = True
                if entry.is_dir(follow_symlinks=False):
                    return entry.name
                os.unlink(entry.name, dir_fd=current)
        if not seen:
            return None


def _open(name: str, directory: int | None) -> int:
    """A descriptor of a directory, with the rights that removing what is in it needs."""
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    except PermissionError:
        os.chmod(name, _ALL, dir_fd=directory)
        descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    mode = os.fstat(descriptor).st_mode
    if mode & _ALL != _ALL:
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, stat.S_IMODE(mode) | _ALL)
    return descriptor
