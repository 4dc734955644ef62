"""A table of strings in one sorted file, asked by bisection: of a hundred thousand lines a build needs few hundred."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["SortedTable"]


class SortedTable:
    """The file: a line that names the state which it was made from, then lines of a key, a NUL and a value."""

    def __init__(self, content: mmap.mmap, start: int) -> None:
        self._content, self._start = content, start

    @classmethod
    def open(cls, path: Path, state: str) -> SortedTable | None:
        """The table in `path`; None where there is none, or one of another state."""
        wanted = os.fsencode(state) + b"\n"
        try:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
            return None
        return cls(content, len(wanted)) if content[: len(wanted)] == wanted else None

    @staticmethod
    def write(path: Path, state: str, values: Mapping[str, str]) -> None:
        """Put `values` into the file `path`, in one step. No key, value or state may hold a newline, no key a NUL."""
        lines = sorted(os.fsencode(f"{key}\0{value}\n") for key, value in values.items())
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_bytes(os.fsencode(state) + b"\n" + b"".join(lines))
        fresh.replace(path)

    def get(self, key: str) -> str | None:
        """The value of `key`, None where there is none."""
        wanted = os.fsencode(key) + b"\0"
        low, high = self._start, len(self._content)
        while low < high:
            begin = self._content.rfind(b"\n", low, (low + high) // 2) + 1 or low
            end = self._content.find(b"\n", begin)
            line = self._content[begin:end]
            if line.startswith(wanted):
                return os.fsdecode(line[len(wanted) :])
            if line < wanted:
                low = end + 1
            else:
                high = begin
        return None
