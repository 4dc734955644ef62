"""A table of strings in one file, asked by hash: of a hundred thousand keys a build needs few hundred."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from struct import Struct

__all__ = ["HashedTable"]

#: Number of buckets and size of the whole file in bytes, little-endian as all here.
_HEADER = Struct("<2Q")
#: Where a bucket begins and where it ends, from the start of the file.
_BUCKET = Struct("<2I")
_PLACE = 4  # bytes; a bucket's end is the next one's start


class HashedTable:
    """The file: a line that names the state which it was made from, the header, the places of the buckets, and those.

    A bucket has the lines, of a key, a NUL and a value, whose keys' CRC-32 is its number, modulo the number of buckets.
    """

    def __init__(self, content: mmap.mmap, start: int) -> None:
        self._content = content
        self._count = _HEADER.unpack_from(content, start)[0]
        self._places = start + _HEADER.size

    @classmethod
    def open(cls, path: Path, state: str) -> HashedTable | None:
        """The table in `path`; None where there is none that is whole, or one of another state."""
        wanted = os.fsencode(state) + b"\n"
        start = len(wanted)
        try:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
            return None
        if content[:start] != wanted or len(content) < start + _HEADER.size:
            return None
        return cls(content, start) if _HEADER.unpack_from(content, start)[1] == len(content) else None

    @staticmethod
    def write(path: Path, state: str, values: Mapping[str, str]) -> None:
        """Put `values` into the file `path`, in one step. No key, value or state may hold a newline, no key a NUL."""
        count = max(1, len(values))
        buckets: list[list[bytes]] = [[] for _ in range(count)]
        for key, value in values.items():
            encoded = os.fsencode(key)
            buckets[zlib.crc32(encoded) % count].append(b"%b\0%b\n" % (encoded, os.fsencode(value)))
        first = os.fsencode(state) + b"\n"
        start = len(first) + _HEADER.size + _PLACE * (count + 1)
        places = list(accumulate((sum(map(len, lines)) for lines in buckets), initial=start))
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with open(fresh, "wb") as file:
            file.write(first + _HEADER.pack(count, places[-1]) + Struct(f"<{count + 1}I").pack(*places))
            file.writelines(line for lines in buckets for line in lines)
        fresh.replace(path)

    def get(self, key: str) -> str | None:
        """The value of `key`, None where there is none."""
        encoded = os.fsencode(key)
        start, end = _BUCKET.unpack_from(self._content, self._places + _PLACE * (zlib.crc32(encoded) % self._count))
        for line in self._content[start:end].split(b"\n")[:-1]:
            found, _, value = line.partition(b"\0")
            if found == encoded:
                return os.fsdecode(value)
        return None
