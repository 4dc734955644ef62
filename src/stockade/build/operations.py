"""The steps that make a rootfs: each describes itself and applies itself below a root descriptor."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from stockade.errors import BuildError
from stockade.kernel.beneath import Root, start_writing
from stockade.records.text import escape
from stockade.spread import spread

from . import copying

__all__ = ["Applied", "CopyFile", "MakeDirectory", "MakeSymlink", "Operation", "WriteFile", "apply"]

_CAPABILITY = "security.capability"
_LARGE = 1 << 20  # bytes
_WORTH_STARTING = 1 << 18  # bytes; of smaller files the disk takes many at once, later
_HINTS = {
    errno.EACCES: "build as root, or leave the file out with `files.exclude`",
    errno.EPERM: "build as root, or leave the file out with `files.exclude`",
    errno.ENOENT: "the host changed since it was observed: build again",
}


class Applied(NamedTuple):
    """What an operation found: digest (hexadecimal), size (bytes) and mtime (seconds) of the file that it made."""

    sha256: str = ""
    size: int = 0
    mtime: int = 0


class _Step(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    mode: int = 0o777
    uid: int = 0
    gid: int = 0

    def _finish(self, descriptor: int, mtime: int) -> None:
        # chown(2) clears setuid and setgid bits and file capabilities: the owner comes first.
        os.fchown(descriptor, self.uid, self.gid)
        os.fchmod(descriptor, self.mode)
        os.utime(descriptor, (mtime, mtime))

    def _owned(self) -> str:
        return f"mode {self.mode:04o}, owner {self.uid}:{self.gid}"


class MakeDirectory(_Step, frozen=True, kw_only=True, tag=True):
    """Make a directory, or give the root itself (`/`) its mode and owner."""

    def describe(self) -> str:
        return f"make directory {escape(self.path)}, {self._owned()}"

    def apply(self, root: Root) -> Applied:
        if self.path == "/":
            self._finish(root.descriptor, 0)
            return Applied()
        root.mkdirat(self.path)
        descriptor = root.openat(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._finish(descriptor, 0)
        finally:
            os.close(descriptor)
        return Applied()


class MakeSymlink(_Step, frozen=True, kw_only=True, tag=True):
    """Make a symbolic link to `target`."""

    target: str

    def describe(self) -> str:
        return f"make link {escape(self.path)} to {escape(self.target)}"

    def apply(self, root: Root) -> Applied:
        root.symlinkat(self.target, self.path)
        directory, name = root.parent(self.path)
        os.chown(name, self.uid, self.gid, dir_fd=directory, follow_symlinks=False)
        os.utime(name, (0, 0), dir_fd=directory, follow_symlinks=False)
        return Applied()


class CopyFile(_Step, frozen=True, kw_only=True, tag=True):
    """Copy `source` of the host, its file capabilities only if they are given here. `size` is what it had before."""

    source: str
    capabilities: bytes = b""
    size: int = 0

    def describe(self) -> str:
        return f"copy {escape(self.source)} to {escape(self.path)}, {self._owned()}"

    def apply(self, root: Root) -> Applied:
        descriptor = root.create(self.path)
        try:
            copied = copying.copy(self.source, descriptor)
            self._finish(descriptor, copied.mtime)
            if self.capabilities:
                os.setxattr(descriptor, _CAPABILITY, self.capabilities)
            if copied.size >= _WORTH_STARTING:
                start_writing(descriptor)
        finally:
            os.close(descriptor)
        return Applied(*copied)


class WriteFile(_Step, frozen=True, kw_only=True, tag=True):
    """Write a generated file. Its time is 0, so that it is the same at each build."""

    content: bytes

    def describe(self) -> str:
        return f"write {escape(self.path)}, {len(self.content)} bytes, {self._owned()}"

    def apply(self, root: Root) -> Applied:
        descriptor = root.create(self.path)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(self.content)
            self._finish(descriptor, 0)
        finally:
            os.close(descriptor)
        return Applied(hashlib.sha256(self.content).hexdigest(), len(self.content), 0)


Operation: TypeAlias = MakeDirectory | MakeSymlink | CopyFile | WriteFile


def apply(operations: Sequence[Operation], root: Root) -> tuple[Applied, ...]:
    """Make directories in order, then files and links, several at once; the results stand in the order.

    BuildError says which operation failed; only the OSError of a full disk goes through. Directories get their time
    again at the end, as filling them changed it.
    """
    results: dict[int, Applied] = {}

    def carry_out(steps: Iterator[tuple[int, Operation]]) -> None:
        with Root(os.dup(root.descriptor)) as own:
            for place, operation in steps:
                results[place] = _apply(operation, own)

    steps = list(enumerate(operations))
    carry_out(step for step in steps if isinstance(step[1], MakeDirectory))
    spread(sorted((step for step in steps if not isinstance(step[1], MakeDirectory)), key=_rank), carry_out)
    for operation in operations:
        if operation.path == "/":
            os.utime(root.descriptor, (0, 0))
        elif isinstance(operation, MakeDirectory):
            above, name = root.parent(operation.path)
            os.utime(name, (0, 0), dir_fd=above, follow_symlinks=False)
    return tuple(results[place] for place in range(len(operations)))


def _rank(step: tuple[int, Operation]) -> int:
    """Large files first, or one of them is what is waited for at the end."""
    return -step[1].size if isinstance(step[1], CopyFile) and step[1].size >= _LARGE else 0


def _apply(operation: Operation, root: Root) -> Applied:
    try:
        return operation.apply(root)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BuildError(
            f"cannot {operation.describe()}: {error.strerror}", hint=_HINTS.get(error.errno or 0)
        ) from error
