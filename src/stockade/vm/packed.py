"""Trees of files in one stream, as `warden/pack.h` has them. What comes out of a guest is not believed."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from stockade.errors import StateError
from stockade.kernel.beneath import Root
from stockade.records.text import escape

from . import sparse

__all__ = ["pack", "space", "unpack"]

_MODE = 0o777
_CHUNK = 1 << 20
_HOLE = 1 << 63
_FILE_MOST = 1 << 43
_PATH_MOST = 4096
#: An entry that is there twice, below what is no directory, or reached by a link.
_MISPLACED = (errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
#: Bytes of an entry beside its path and contents.
_ENTRY = struct.Struct(">cBHH")
_LENGTH = struct.Struct(">Q")

Write = Callable[[bytes], object]


def space(entries: int, names: int, contents: int) -> int:
    """Bytes that a stream of so many entries, with so many bytes of names and contents, needs at most."""
    return contents + contents // _CHUNK * 64 + names + entries * 128 + _CHUNK


def pack(source: Path, write: Write) -> int:
    """Write the stream of a file or a tree of the host; returns how many files. Devices and sockets are left out.

    A link is followed for `source` itself alone. StateError for what is no file and no directory.
    """
    status = source.stat()
    count = 0
    if stat.S_ISREG(status.st_mode):
        _put_file(source, b"", write)
        count = 1
    elif stat.S_ISDIR(status.st_mode):
        write(_ENTRY.pack(b"d", 0, status.st_mode & _MODE, 0))
        for path, found in _below(source):
            name = os.fsencode(os.path.relpath(path, source))
            if stat.S_ISDIR(found.st_mode):
                write(_ENTRY.pack(b"d", 0, found.st_mode & _MODE, len(name)) + name)
            elif stat.S_ISLNK(found.st_mode):
                target = os.fsencode(os.readlink(path))
                write(_ENTRY.pack(b"l", 0, _MODE, len(name)) + name + len(target).to_bytes(2, "big") + target)
            elif stat.S_ISREG(found.st_mode):
                _put_file(path, name, write)
                count += 1
    else:
        raise StateError(f"`{source}` is no file and no directory", hint="copy what it leads to")
    write(_ENTRY.pack(b"e", 0, 0, 0))
    return count


def _below(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path = directory / name
        status = path.lstat()
        yield path, status
        if stat.S_ISDIR(status.st_mode):
            yield from _below(path)


def _put_file(path: Path, name: bytes, write: Write) -> None:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if name else 0)
    with open(os.open(path, flags), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        write(_ENTRY.pack(b"f", 0, status.st_mode & _MODE, len(name)) + name)
        at = 0
        for start, end in sparse.extents(file.fileno(), status.st_size):
            if start > at:
                write(_LENGTH.pack((start - at) | _HOLE))
            at = start
            while at < end and (data := os.pread(file.fileno(), min(_CHUNK, end - at), at)):
                write(_LENGTH.pack(len(data)) + data)
                at += len(data)
        if at < status.st_size:
            write(_LENGTH.pack((status.st_size - at) | _HOLE))
        write(_LENGTH.pack(0))


class _Reader:
    """Takes a stream apart."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def take(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) != length:
            raise _damaged("it is cut off")
        return data

    def text(self, length: int) -> str:
        if length >= _PATH_MOST:
            raise _damaged("a path is too long")
        return os.fsdecode(self.take(length))

    def contents(self, descriptor: int, limit: int) -> int:
        """Write a file's contents; returns how many bytes of `limit` are left."""
        at = 0
        while head := _LENGTH.unpack(self.take(_LENGTH.size))[0]:
            length = head & ~_HOLE
            if head & _HOLE:
                at += length
                if at > _FILE_MOST:
                    raise _damaged("a file is larger than any can be")
                continue
            limit -= length
            if limit < 0:
                raise _damaged("it holds more than was said")
            while length:
                data = self.take(min(length, _CHUNK))
                at += os.pwrite(descriptor, data, at)
                length -= len(data)
        os.ftruncate(descriptor, at)
        return limit


def _damaged(why: str) -> StateError:
    return StateError(f"what the guest sent cannot be read: {why}", hint="copy it again")


def unpack(stream: IO[bytes], target: Path, *, most: int) -> int:
    """Make what the stream has at `target`, which must not be there; returns how many files.

    Every name is resolved below `target`; its contents take `most` bytes at most. StateError for a damaged stream,
    FileExistsError when `target` is there.
    """
    reader = _Reader(stream)
    kind, _, mode, length = _ENTRY.unpack(reader.take(_ENTRY.size))
    if length or kind not in (b"f", b"d"):
        raise _damaged("it does not begin with a file or a directory")
    if kind == b"f":
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(target, flags, 0o600)
        try:
            reader.contents(descriptor, most)
            os.fchmod(descriptor, mode & _MODE)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return 1
    target.mkdir(mode=0o700)
    with Root.open(target) as root:
        return _unpack_below(reader, root, mode, most)


def _unpack_below(reader: _Reader, root: Root, mode: int, most: int) -> int:
    directories = [("", mode)]
    count = 0
    while True:
        kind, _, mode, length = _ENTRY.unpack(reader.take(_ENTRY.size))
        if kind == b"e":
            break
        name = reader.text(length)
        try:
            if kind == b"d":
                root.mkdirat(name, 0o700)
                directories.append((name, mode))
            elif kind == b"l":
                root.symlinkat(reader.text(int.from_bytes(reader.take(2), "big")), name)
            elif kind == b"f":
                descriptor = root.create(name)
                try:
                    most = reader.contents(descriptor, most)
                    os.fchmod(descriptor, mode & _MODE)
                finally:
                    os.close(descriptor)
                count += 1
            else:
                raise _damaged("an entry is of no known kind")
        except ValueError as error:
            raise _damaged(str(error)) from error
        except OSError as error:
            if error.errno not in _MISPLACED:
                raise
            raise _damaged(f"`{escape(name)}` has no place: {(error.strerror or '').lower()}") from error
    # What is in a directory is made before its mode may forbid that.
    for name, mode in reversed(directories):
        descriptor = root.openat(name, os.O_RDONLY | os.O_DIRECTORY)
        os.fchmod(descriptor, mode & _MODE)
        os.close(descriptor)
    return count
