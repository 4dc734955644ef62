"""Files in and out of a running guest, without a network. Nothing that comes out can land outside its target.

What is small goes over the serial line. The rest goes by a file that the guest has as one more disk meanwhile: UML
reads its line byte by byte (half a megabyte a second), and a disk by hundreds of megabytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stockade.errors import StateError
from stockade.kernel.beneath import Root
from stockade.records.text import escape

from . import control, packed, store

__all__ = ["listing", "pull", "push"]

_NOT_FOUND = 127
#: Beyond these a disk is quicker, attached and taken away again, than the line.
_LINE_OUT = 1 << 18
_LINE_IN = 1 << 13
_BLOCK = 1 << 12
_COMMAND_S = 60.0


class Entry:
    """A line of a listing: "f", "d", "l" or "o", with mode, owner, bytes, path and, for a link, its target."""

    def __init__(self, text: str, target: str) -> None:
        self.type, mode, uid, gid, size, self.path = text.split(" ", 5)
        self.mode, self.uid, self.gid, self.size = int(mode, 8), int(uid), int(gid), int(size)
        self.target = target


def listing(guest: str, path: str) -> list[Entry]:
    """Everything at and below `path` in the guest, on its file system. StateError for what is not there."""
    output = _command(guest, ["@list", path], path)
    words = os.fsdecode(output).split("\0")
    try:
        return [Entry(text, target) for text, target in zip(words[::2], words[1::2], strict=False) if text]
    except ValueError as error:
        raise StateError(f"what guest `{guest}` lists cannot be read: {error}", hint="stop the guest") from error


def _command(guest: str, argv: list[str], path: str, *, input: bytes = b"") -> bytes:
    """Standard output of a command of PID 1's own; StateError says which path it is about, and why."""
    status, output, text = control.execute(guest, argv, input=input, timeout_s=_COMMAND_S)
    if status == _NOT_FOUND:
        raise StateError(
            f"guest `{guest}` cannot copy files: its image was made by another version of Stockade",
            hint="make the image again, and a guest of it",
        )
    if status:
        about = os.fsdecode(text) or path
        raise StateError(
            f"`{escape(about)}` of guest `{guest}`: {os.strerror(status).lower()}", hint="paths are absolute there"
        )
    return output


def pull(guest: str, path: str, target: Path) -> int:
    """Copy a file or a tree of the guest to `target`, which must not be there; returns how many files.

    Links stay links, devices and sockets are left out, setuid is dropped. Every name is resolved below `target`.
    StateError where the host has no room for it, or when it grew meanwhile.
    """
    if os.path.lexists(target):
        raise StateError(f"`{target}` is there already", hint="name another target")
    entries = listing(guest, path)
    if not entries or entries[0].type not in ("f", "d"):
        raise StateError(f"`{path}` of guest `{guest}` is no file and no directory", hint="name what it leads to")
    contents = sum(entry.size for entry in entries if entry.type == "f")
    names = sum(len(os.fsencode(entry.path + entry.target)) for entry in entries)
    need = packed.space(len(entries), names, contents + contents // 4)
    if contents + names + 64 * len(entries) <= _LINE_OUT:
        stream: IO[bytes] = io.BytesIO(_command(guest, ["@pack", path], path))
        return packed.unpack(stream, target, most=need)
    _has_room(guest, need)
    with _file(guest) as (file, name):
        os.ftruncate(file, need + -need % _BLOCK)
        with _disk(guest, name) as device:
            _command(guest, ["@pack", path, device], path)
        with open(os.dup(file), "rb") as stream:
            return packed.unpack(stream, target, most=need)


def push(guest: str, source: Path, path: str) -> int:
    """Copy a file or a tree of the host into the guest; returns how many files. Each is there whole or not at all.

    A link of the host is followed for `source` itself alone; below it links stay links. They belong to root there.
    """
    small = bytearray()

    def gather(data: bytes) -> None:
        small.extend(data)
        if len(small) > _LINE_IN:
            raise _TooLargeError

    with contextlib.suppress(_TooLargeError):
        count = packed.pack(source, gather)
        _command(guest, ["@unpack", path], path, input=bytes(small))
        return count
    with _file(guest) as (file, name):
        with open(os.dup(file), "wb") as stream:
            count = packed.pack(source, stream.write)
            stream.write(bytes(-stream.tell() % _BLOCK))
        with _disk(guest, name) as device:
            _command(guest, ["@unpack", path, device], path)
    return count


class _TooLargeError(Exception):
    """More than the line is for."""


@contextlib.contextmanager
def _file(guest: str) -> Iterator[tuple[int, str]]:
    """A new file in UML's directory, for UML alone: its descriptor, and its name there. It is gone afterwards.

    The directory is UML's own, so no name in it is followed.
    """
    record = store.load(guest)
    name = f"run/copy-{os.getpid()}-{time.monotonic_ns()}"
    with Root.open(store.machine(guest)) as machine:
        descriptor = machine.create(name)
        try:
            if os.geteuid() == 0:
                os.fchown(descriptor, record.uid, record.gid)
            yield descriptor, name
        finally:
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):
                directory, last = machine.parent(name)
                os.unlink(last, dir_fd=directory)


@contextlib.contextmanager
def _disk(guest: str, file: str) -> Iterator[str]:
    """The file is a disk of the guest's meanwhile; its path there. The keeper takes it away once this ends."""
    with control.connect(guest) as connection:
        yield str(control.ask(connection, "attach", file=file)["device"])


def _has_room(guest: str, need: int) -> None:
    free = shutil.disk_usage(store.machine(guest)).free
    if need > free:
        raise StateError(
            f"a copy of {need >> 20} MB out of guest `{guest}` needs more room than there is: {free >> 20} MB",
            hint="make room on the disk that holds the guest, or copy less at once",
        )
