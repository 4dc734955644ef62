"""What a started jail has written: the file that its supervisor writes, and those that it has put aside."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from stockade.errors import NotFoundError

from . import runfiles
from .starting import log_path

__all__ = ["Follower", "logs"]

_PIECE = 1 << 16
_ASIDE = re.compile(r"log\.([0-9]{1,9})\Z")


def logs(name: str, *, older: bool = False) -> Iterator[bytes]:
    """The jail's log in pieces; with `older` those that were put aside first. NotFoundError when it never logged."""
    with Follower(name, older=older) as follower:
        yield from follower.pieces()


class Follower:
    """Reads the log of the jail `name` as it grows, without a gap where it is put aside meanwhile.

    It begins with the newest file, with `older` with the oldest that there is. NotFoundError when it never logged.
    `missed` is called before it goes on behind files that were written and removed before they were read.
    """

    def __init__(self, name: str, *, older: bool = False, missed: Callable[[], None] = lambda: None) -> None:
        runfiles.require_name(name)
        self._missed = missed
        self._name = name
        found = self._files()
        chosen = _chosen(found, len(found) - 1 if older else 0)
        if chosen is None:
            raise NotFoundError(
                f"jail `{name}` has no log", hint=f"a jail that `stockade start {name}` started writes one"
            )
        self._file = chosen

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def is_written(self) -> bool:
        """Whether the jail or its supervisor, which writes down what is left, lives."""
        state = runfiles.read(self._name)
        return state is not None and (state.alive or runfiles.is_alive(state.supervisor))

    def pieces(self) -> Iterator[bytes]:
        """What was written between the last call and this one: a writer that is faster than the reader ends it too."""
        newest, size = self._end()
        while True:
            if os.fstat(self._file.fileno()).st_ino == newest:
                yield from self._rest(size)
                return
            yield from self._rest()
            following, left_behind = self._following()
            if following is None:
                return
            yield from self._rest()  # what came before it was put aside is all there now
            if left_behind:
                self._missed()
            self._file.close()
            self._file = following

    def _rest(self, size: int | None = None) -> Iterator[bytes]:
        """What is left of the file; of its first `size` bytes."""
        while piece := self._file.read(_PIECE if size is None else max(0, min(_PIECE, size - self._file.tell()))):
            yield piece

    def _end(self) -> tuple[int, int]:
        """Inode and size of the newest file; zeros where there is none."""
        newest = _chosen(self._files(), 0)
        if newest is None:
            return 0, 0
        with newest:
            status = os.fstat(newest.fileno())
            return status.st_ino, status.st_size

    def _following(self) -> tuple[BinaryIO | None, bool]:
        """The file that was begun when this one was put aside; the oldest one, and true, where this one is gone."""
        found = self._files()
        inodes = [os.fstat(file.fileno()).st_ino for file in found]
        mine = os.fstat(self._file.fileno()).st_ino
        place = inodes.index(mine) if mine in inodes else len(found)
        return _chosen(found, place - 1), mine not in inodes

    def _files(self) -> list[BinaryIO]:
        """The files, open, the newest first. A file only moves to the next number, so none is missed in this order."""
        last = log_path(self._name)
        names = os.listdir(last.parent) if last.parent.exists() else []
        numbers = [int(match[1]) for name in names if (match := _ASIDE.match(name))]
        found: dict[int, BinaryIO] = {}
        for suffix in ("", *(f".{number}" for number in range(1, max(numbers, default=0) + 2))):
            with contextlib.suppress(FileNotFoundError):
                file = open(f"{last}{suffix}", "rb")  # noqa: SIM115
                if found.setdefault(os.fstat(file.fileno()).st_ino, file) is not file:
                    file.close()
        return list(found.values())


def _chosen(files: list[BinaryIO], place: int) -> BinaryIO | None:
    """The file at `place`, if there is one; the others are closed."""
    chosen = files[place] if 0 <= place < len(files) else None
    for file in files:
        if file is not chosen:
            file.close()
    return chosen
