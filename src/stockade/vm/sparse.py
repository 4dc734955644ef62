"""Files with holes: copied, hashed and measured without touching what is not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["allocated", "clone", "copy", "copy_range", "digest", "extents", "file_sha256"]

# FICLONE of include/uapi/linux/fs.h: _IOW(0x94, 9, int).
_FICLONE = 0x40049409
_BLOCK = 4096
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


def extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch with data (lseek(2), SEEK_DATA); one stretch where holes are not known."""
    start = 0
    while start < size:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        yield start, end
        start = end


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy the bytes from `start` to `end`; what is zero becomes a hole."""
    while start < end:
        data = os.pread(source, min(_CHUNK, end - start), start)
        if not data:
            return
        if data != _ZEROS[: len(data)]:
            view = memoryview(data)
            done = 0
            while done < len(data):
                done += os.pwrite(target, view[done:], start + done)
        start += len(data)


def clone(source: int, target: int) -> bool:
    """FICLONE of ioctl_ficlone(2): share the blocks; False where the file system cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ETXTBSY):
            return False
        raise
    return True


def copy(source: int, target: int) -> int:
    """Make `target` (empty) the same as `source`, sharing or leaving out what can be; returns the size.

    OSError, with ENOSPC for a full disk: the target is then to be thrown away.
    """
    size = os.fstat(source).st_size
    if clone(source, target):
        return size
    os.ftruncate(target, size)
    for start, end in extents(source, size):
        copy_range(source, target, start, end)
    return size


def digest(path: Path) -> str:
    """SHA-256 of a sparse file's contents by blocks of 4096 that are not zero, each after its offset, then the size.

    The same for every way in which the holes may lie, and quick for large files that hold little.
    """
    total = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        done = 0
        for start, end in extents(file.fileno(), size):
            start = max(done, start - start % _BLOCK)
            while start < end:
                data = os.pread(file.fileno(), min(_CHUNK, size - start), start)
                if not data:
                    break
                for at in range(0, len(data), _BLOCK):
                    block = data[at : at + _BLOCK]
                    if block != _ZEROS[: len(block)]:
                        total.update((start + at).to_bytes(8, "big"))
                        total.update(block)
                start += len(data)
            done = start
        total.update(size.to_bytes(8, "big"))
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of the whole file as sha256sum(1) has it."""
    total = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        for start, end in extents(file.fileno(), size):
            _zeros(total, start - at)
            at = start
            while at < end:
                data = os.pread(file.fileno(), min(_CHUNK, end - at), at)
                if not data:
                    break
                total.update(data)
                at += len(data)
        _zeros(total, size - at)
    return total.hexdigest()


def _zeros(total: hashlib._Hash, count: int) -> None:
    while count > 0:
        part = min(count, _CHUNK)
        total.update(_ZEROS[:part])
        count -= part


def allocated(path: Path) -> int:
    """Bytes that a file takes on the disk; 0 where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_blocks * 512
    return 0
