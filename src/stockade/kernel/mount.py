"""mount(2), umount2(2), pivot_root(2) and the calls on detached mounts. Keeps no state.

Numbers are those of include/uapi/linux/mount.h and, for calls that glibc 2.36 was the first to wrap,
of the table of system calls.
"""

from __future__ import annotations

import ctypes
import os

from .libc import check, function, path_argument, syscall
from .syscalls import host_architecture, numbers

__all__ = [
    "AT_EMPTY_PATH",
    "AT_RECURSIVE",
    "MNT_DETACH",
    "MOUNT_ATTR_NODEV",
    "MOUNT_ATTR_NOSUID",
    "MOUNT_ATTR_RDONLY",
    "MS_BIND",
    "MS_NODEV",
    "MS_NOEXEC",
    "MS_NOSUID",
    "MS_PRIVATE",
    "MS_RDONLY",
    "MS_REC",
    "MS_REMOUNT",
    "OPEN_TREE_CLONE",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "pivot_root",
    "umount2",
]

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

MNT_DETACH = 2

OPEN_TREE_CLONE = 1
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
_AT_FDCWD = -100
_MOVE_MOUNT_F_EMPTY_PATH = 0x4

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4

_mount = function(
    "mount", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p
)  # fmt: skip
_umount2 = function("umount2", ctypes.c_char_p, ctypes.c_int)


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


# Looked up now: where these calls are made, the file that holds the table may no longer be in sight.
_NUMBERS = {
    name: numbers(host_architecture())[name] for name in ("mount_setattr", "move_mount", "open_tree", "pivot_root")
}


def _number(name: str) -> int:
    return _NUMBERS[name]


def mount(source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). OSError names `target`."""
    options = None if data is None else os.fsencode(data)
    result = _mount(path_argument(source), path_argument(target), path_argument(fstype), flags, options)
    check(result, "mount", target)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    check(_umount2(path_argument(target), flags), "umount2", target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2); "." for both stacks the old root over the new one, as its page describes."""
    result = syscall(
        _number("pivot_root"), ctypes.c_char_p(path_argument(new_root)), ctypes.c_char_p(path_argument(put_old))
    )
    check(result, "pivot_root", new_root)


def open_tree(directory: int | None, path: str, flags: int) -> int:
    """open_tree(2): a close-on-exec descriptor; with OPEN_TREE_CLONE of a detached copy of the mount."""
    result = syscall(
        _number("open_tree"),
        ctypes.c_int(_AT_FDCWD if directory is None else directory),
        ctypes.c_char_p(path_argument(path)),
        ctypes.c_uint(flags | os.O_CLOEXEC),
    )
    return check(result, "open_tree", path)


def move_mount(tree: int, target: str) -> None:
    """move_mount(2) of the detached mount behind the descriptor `tree` to `target`."""
    result = syscall(
        _number("move_mount"),
        ctypes.c_int(tree),
        ctypes.c_char_p(b""),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(path_argument(target)),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
    )
    check(result, "move_mount", target)


def mount_setattr(directory: int | None, path: str, flags: int, *, attr_set: int, attr_clr: int = 0) -> None:
    """mount_setattr(2), without a change of propagation or id mapping."""
    attributes = _MountAttr(attr_set, attr_clr, 0, 0)
    result = syscall(
        _number("mount_setattr"),
        ctypes.c_int(_AT_FDCWD if directory is None else directory),
        ctypes.c_char_p(path_argument(path)),
        ctypes.c_uint(flags),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    check(result, "mount_setattr", path)
