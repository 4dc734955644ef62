"""Copy one file's content and hash it on the way. Never links to the original."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from typing import NamedTuple

from stockade.errors import BuildError

__all__ = ["Copied", "copy", "digest"]

_FICLONE = 0x40049409  # include/uapi/linux/fs.h
_CHUNK = 1 << 20
_ATTEMPTS = 5
_NO_REFLINK = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ETXTBSY}


class Copied(NamedTuple):
    """Result of a copy: digest in hexadecimal, size in bytes, time of the last change in whole seconds."""

    sha256: str
    size: int
    mtime: int


def copy(source: str, destination: int) -> Copied:
    """Copy the content of the regular file `source` to the empty file `destination`, holes kept.

    BuildError when `source` is something else by now, or changes while it is read.
    """
    try:
        # O_NONBLOCK: a FIFO put in the file's place must not hold up the build.
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BuildError(f"`{source}` was a file and is a symbolic link now", hint="build again") from error
        raise
    try:
        for _ in range(_ATTEMPTS):
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise BuildError(f"`{source}` was a file and is something else now", hint="build again")
            sha256 = _content(descriptor, destination, before)
            if _same(before, os.fstat(descriptor)):
                return Copied(sha256, before.st_size, int(before.st_mtime))
            os.ftruncate(destination, 0)
    finally:
        os.close(descriptor)
    raise BuildError(
        f"`{source}` changes faster than it can be copied", hint="stop what writes to it, or give it a volume"
    )


def _same(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size, after.st_mtime_ns, after.st_ctime_ns,
    )  # fmt: skip


def _content(source: int, destination: int, status: os.stat_result) -> str:
    if status.st_size <= _CHUNK:
        data = os.pread(source, status.st_size + 1, 0)
        _write(destination, data, 0)
        return hashlib.sha256(data).hexdigest()
    if _reflink(source, destination):
        return digest(destination)
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    position = 0
    for start, end in _extents(source, status):
        _hash_zeros(hasher, start - position)
        for offset in range(start, end, _CHUNK):
            chunk = buffer[: os.preadv(source, [buffer[: min(_CHUNK, end - offset)]], offset)]
            hasher.update(chunk)
            _write(destination, chunk, offset)
        position = end
    _hash_zeros(hasher, status.st_size - position)
    os.ftruncate(destination, status.st_size)
    return hasher.hexdigest()


def _write(destination: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(destination, view, offset)
        view, offset = view[count:], offset + count


def _reflink(source: int, destination: int) -> bool:
    try:
        fcntl.ioctl(destination, _FICLONE, source)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


def _extents(source: int, status: os.stat_result) -> list[tuple[int, int]]:
    """Start and end of each stretch of data; one for the whole file where it has no holes."""
    size = status.st_size
    if status.st_blocks * 512 >= size:
        return [(0, size)]
    extents, position = [], 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # lseek(2): only a hole up to the end
                break
            raise
        position = os.lseek(source, start, os.SEEK_HOLE)
        extents.append((start, min(position, size)))
    return extents


def _hash_zeros(hasher: hashlib._Hash, count: int) -> None:
    zeros = bytes(min(count, _CHUNK))
    while count > 0:
        hasher.update(zeros[:count])
        count -= len(zeros)


def digest(descriptor: int) -> str:
    """SHA-256 of a file's whole content, in hexadecimal; its position is left alone."""
    hasher, offset = hashlib.sha256(), 0
    while data := os.pread(descriptor, _CHUNK, offset):
        hasher.update(data)
        offset += len(data)
    return hasher.hexdigest()
