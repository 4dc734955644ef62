"""Copy-on-write files of UML's block device: header, making, checking, merging.

The format is version 3 of arch/um/drivers/cow_user.c: a big-endian header with the path, the modification time and
the size of the base, a bitmap of the sectors that were written, then the sectors, each at its own place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from stockade.errors import StateError

from . import sparse

__all__ = ["Header", "check", "create", "merge", "opened", "read", "written", "written_sectors"]

MAGIC = 0x4F4F4F4D  # "OOOM"
VERSION = 3
SECTOR = 512
ALIGNMENT = 4096
_PATH_BYTES = 4096
# struct cow_header_v3: magic, version, mtime, size, sectorsize, alignment, cow_format; packed, then the path.
_FIXED = struct.Struct(">IIIQIII")
_BITMAP_START = -(-(_FIXED.size + _PATH_BYTES) // 4096) * 4096
_FORMAT_BITMAP = 0
_CHUNK_SECTORS = 2048


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Header of a copy-on-write file. `size` in bytes and `mtime` in seconds are those of the base."""

    backing: str
    mtime: int
    size: int

    @property
    def bitmap_bytes(self) -> int:
        """Length of the bitmap: one bit for each sector."""
        return -(-self.size // (SECTOR * 8))

    @property
    def data_start(self) -> int:
        """Where sector 0 lies."""
        return -(-(_BITMAP_START + self.bitmap_bytes) // ALIGNMENT) * ALIGNMENT

    @property
    def file_size(self) -> int:
        """Size of the whole copy-on-write file."""
        return self.data_start + self.size


def create(path: Path, *, backing: str, base: Path, mode: int = 0o600) -> Header:
    """Make a copy-on-write file for `base`, which UML will see at `backing`. FileExistsError if `path` is there."""
    status = base.stat()
    header = Header(backing=backing, mtime=int(status.st_mtime), size=status.st_size)
    name = os.fsencode(backing)
    if len(name) >= _PATH_BYTES:
        raise StateError(f"`{backing}` is too long for a copy-on-write file", hint="use a path below 4096 bytes")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        fixed = _FIXED.pack(MAGIC, VERSION, header.mtime, header.size, SECTOR, ALIGNMENT, _FORMAT_BITMAP)
        os.pwrite(descriptor, fixed + name.ljust(_PATH_BYTES, b"\0"), 0)
        os.ftruncate(descriptor, header.file_size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return header


def opened(path: Path) -> BinaryIO:
    """A copy-on-write file, to be read. Whoever took a guest's UML over may have put something else in its place.

    StateError for a link, and for what is no file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _damaged(path, "a link was put in its place") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _damaged(path, "it is no file any more")
    return open(descriptor, "rb", buffering=0)


def read(path: Path) -> Header:
    """The header of a copy-on-write file; StateError says what is wrong with it."""
    with opened(path) as file:
        data = file.read(_FIXED.size + _PATH_BYTES)
        file_size = os.fstat(file.fileno()).st_size
    if len(data) < _FIXED.size + _PATH_BYTES:
        raise _damaged(path, "it is shorter than a header")
    magic, version, mtime, size, sector, alignment, form = _FIXED.unpack_from(data)
    if magic != MAGIC:
        raise _damaged(path, "it does not begin as a copy-on-write file does")
    if version != VERSION:
        raise _damaged(path, f"its format is version {version}, and {VERSION} is what UML writes")
    if (sector, alignment, form) != (SECTOR, ALIGNMENT, _FORMAT_BITMAP):
        raise _damaged(path, f"its sectors of {sector} bytes, aligned to {alignment}, format {form} are not known")
    name, _, _ = data[_FIXED.size :].partition(b"\0")
    header = Header(backing=os.fsdecode(name), mtime=mtime, size=size)
    if not 0 < size <= 1 << 46 or file_size < header.data_start or file_size > header.file_size:
        raise _damaged(path, f"{file_size} bytes cannot be the copy-on-write file of a base of {size} bytes")
    return header


def _damaged(path: Path, why: str) -> StateError:
    return StateError(f"`{path}` is damaged: {why}", hint="restore a snapshot: `stockade snapshot list` shows them")


def check(path: Path, base: Path) -> Header:
    """The header of `path` if `base` is still what it was made for; StateError otherwise.

    UML itself only says EINVAL and panics when the time differs.
    """
    header = read(path)
    try:
        status = base.stat()
    except FileNotFoundError:
        raise StateError(
            f"the base of `{path}` is missing: `{base}`", hint="import the image again, under the same name"
        ) from None
    if status.st_size != header.size or int(status.st_mtime) != header.mtime:
        raise StateError(
            f"`{base}` was changed after the copy-on-write file `{path}` was made for it",
            hint="the disk cannot be used with it: `stockade image inspect --verify` tells about the image",
        )
    return header


def written_sectors(path: Path, header: Header) -> Iterator[tuple[int, int]]:
    """First and last-plus-one of each run of sectors that are in the copy-on-write file."""
    run: tuple[int, int] | None = None
    for start, end in _marked(path, header):
        if run is not None and run[1] == start:
            run = run[0], end
            continue
        if run is not None:
            yield run
        run = start, end
    if run is not None:
        yield run


def _marked(path: Path, header: Header) -> Iterator[tuple[int, int]]:
    """Runs of marked sectors within one byte of the bitmap; neighbours are not joined."""
    sectors = header.size // SECTOR
    with opened(path) as file:
        for low, high in sparse.extents(file.fileno(), _BITMAP_START + header.bitmap_bytes):
            low = max(low, _BITMAP_START)
            bitmap = os.pread(file.fileno(), max(0, high - low), low)
            for index, byte in enumerate(bitmap, (low - _BITMAP_START)):
                if byte == 0xFF:
                    yield index * 8, min(index * 8 + 8, sectors)
                elif byte:
                    # ubd_test_bit: sector n is bit n % 8, from the least one, of byte n / 8.
                    for bit in range(8):
                        if byte >> bit & 1 and index * 8 + bit < sectors:
                            yield index * 8 + bit, index * 8 + bit + 1


def written(path: Path) -> int:
    """Bytes of the disk that the guest has written."""
    header = read(path)
    return sum(end - start for start, end in written_sectors(path, header)) * SECTOR


def merge(path: Path, base: Path, target: Path) -> None:
    """Make `target`: `base` with the sectors of the copy-on-write file `path` over it. It is whole or not there."""
    header = check(path, base)
    target_descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(base, "rb", buffering=0) as below, opened(path) as above:
            sparse.copy(below.fileno(), target_descriptor)
            for start, end in written_sectors(path, header):
                at = start
                while at < end:
                    count = min(_CHUNK_SECTORS, end - at) * SECTOR
                    data = os.pread(above.fileno(), count, header.data_start + at * SECTOR)
                    if not data:
                        break
                    os.pwrite(target_descriptor, data, at * SECTOR)
                    at += -(-len(data) // SECTOR)
        os.fsync(target_descriptor)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
        raise
    finally:
        os.close(target_descriptor)
