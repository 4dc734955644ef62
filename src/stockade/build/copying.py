"""Copy one file's content and hash it on the way. Never links to the original."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from stockade.errors import BuildError
from stockade.kernel.beneath import start_writing

__all__ = ["Copied", "copy", "digest"]

_FICLONE = 0x40049409  # include/uapi/linux/fs.h
_LARGE = 1 << 18  # bytes; of smaller files the disk takes many at once, later
_CHUNK = 1 << 20
_BLOCK = 1 << 12  # bytes; what unbuffered writes are aligned to
_ATTEMPTS = 5
_own = threading.local()
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
    if status.st_size < _LARGE:
        data = os.pread(source, status.st_size + 1, 0)
        _write(destination, data, 0)
        return hashlib.sha256(data).hexdigest()
    if _reflink(source, destination):
        return digest(destination)
    hasher = hashlib.sha256()
    position = 0
    with _unbuffered(destination) as unbuffered:
        for start, end in _extents(source, status):
            _hash_zeros(hasher, start - position)
            _stretch(source, destination, start, end, hasher, blocks=unbuffered)
            position = end
    _hash_zeros(hasher, status.st_size - position)
    os.ftruncate(destination, status.st_size)
    if not unbuffered:
        start_writing(destination)
    return hasher.hexdigest()


@contextmanager
def _unbuffered(destination: int) -> Iterator[bool]:
    """Have writes go past the page cache; False where the file system cannot do that (open(2), O_DIRECT).

    What is copied is to be on the disk before the build ends, and need not take memory until it is used: new pages
    cost more than the copying, above all in a virtual machine, whose host has to find them first.
    """
    able = _set_direct(destination, wanted=True)
    try:
        yield able
    finally:
        _set_direct(destination, wanted=False)


def _set_direct(descriptor: int, *, wanted: bool) -> bool:
    """Set or clear O_DIRECT; whether it is as wanted."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if wanted else 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _stretch(source: int, destination: int, start: int, end: int, hasher: hashlib._Hash, *, blocks: bool) -> None:
    """Copy the bytes from `start` to `end`, and hash them. Stops where the file has become shorter.

    With `blocks` a last part of one is filled up with zeros.
    """
    buffer = _buffer()
    for offset in range(start, end, _CHUNK):
        wanted = min(_CHUNK, end - offset)
        if os.preadv(source, [buffer[:wanted]], offset) != wanted:
            return
        hasher.update(buffer[:wanted])
        missing = -wanted % _BLOCK if blocks else 0
        buffer[wanted : wanted + missing] = bytes(missing)
        _write(destination, buffer[: wanted + missing], offset)


def _buffer() -> memoryview:
    """This thread's, in whole pages."""
    if not hasattr(_own, "buffer"):
        _own.buffer = memoryview(mmap.mmap(-1, _CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    buffer: memoryview = _own.buffer
    return buffer


def _write(destination: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        try:
            count = os.pwrite(destination, view, offset)
        except OSError as error:
            # Another alignment than ours is asked for, or a short write left none.
            if error.errno != errno.EINVAL or not fcntl.fcntl(destination, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            _set_direct(destination, wanted=False)
            continue
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
