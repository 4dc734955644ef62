"""Attributes of inodes: ioctl_iflags(2), chattr(1)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from struct import pack, unpack

__all__ = ["spread_apart"]

# include/uapi/linux/fs.h
_GETFLAGS = 0x80086601
_SETFLAGS = 0x40086602
_TOPDIR = 0x00020000


def spread_apart(directory: str | os.PathLike[str]) -> None:
    """Tell the file system that the trees in `directory` have nothing to do with each other (`chattr +T`).

    ext4 puts each into a group of blocks of its own then. In the group of a tree that was just removed it would pass
    over the freed inodes one by one, for minutes. No more than a hint: nothing where the file system knows no such.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            flags = unpack("i", fcntl.ioctl(descriptor, _GETFLAGS, bytes(4)))[0]
            if not flags & _TOPDIR:
                fcntl.ioctl(descriptor, _SETFLAGS, pack("i", flags | _TOPDIR))
    finally:
        os.close(descriptor)
