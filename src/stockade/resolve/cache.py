"""Read ld.so.cache, the index that `ldconfig` writes. Never trusts an offset in it."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

__all__ = ["Cache", "CacheEntry"]

# glibc, sysdeps/generic/dl-cache.h
_OLD_MAGIC = b"ld.so-1.7.0\0"
_OLD_ENTRY = 12
_MAGIC = b"glibc-ld.so.cache1.1"
_HEADER = struct.Struct("=20sIIB3xI12x")
_ENTRY = struct.Struct("=iIIIQ")
_EXTENSION_MAGIC = 0xEAA42174
_EXTENSION = struct.Struct("=II")
_SECTION = struct.Struct("=IIII")
_TAG_HWCAPS = 1
_HWCAP_EXTENSION = 1 << 62  # the entry's low 32 bits are an index into the extension's list of subdirectories


class CacheEntry(NamedTuple):
    """One library of the cache. `hwcaps` is its glibc-hwcaps subdirectory, "" for none, None for a legacy one."""

    flags: int
    path: str
    hwcaps: str | None


class Cache:
    """The entries of one ld.so.cache by name; none for a file in no known format.

    ld.so itself ignores a cache that it can't read, so damage is no error here either.
    """

    def __init__(self, data: bytes) -> None:
        if data.startswith(_OLD_MAGIC) and len(data) >= 16:
            start = 16 + _OLD_ENTRY * int.from_bytes(data[12:16], "little")
            data = data[(start + 7) // 8 * 8 :]
        self._data = data
        self._keys: tuple[int, ...] = ()
        self._last: dict[bytes, int] = {}
        self._subdirectories: list[str] = []
        if not data.startswith(_MAGIC) or len(data) < _HEADER.size:
            return
        _, count, _, _, extension = _HEADER.unpack_from(data)
        end = _HEADER.size + count * _ENTRY.size
        if end > len(data):
            return
        self._subdirectories = _subdirectories(data, extension)
        find = data.find
        self._keys = struct.unpack_from(f"={6 * count}I", data, _HEADER.size)[1::6]
        # Entries of one name stand together: the last place of each is enough to find the others.
        self._last = {data[key : find(b"\0", key)]: place for place, key in enumerate(self._keys)}

    def entries(self, name: str) -> list[CacheEntry]:
        """The entries for the library `name`, in the file's order."""
        wanted = os.fsencode(name)
        place = self._last.get(wanted, -1)
        result: list[CacheEntry] = []
        while place >= 0 and self._data.startswith(wanted + b"\0", self._keys[place]):
            flags, _, value, _, hwcap = _ENTRY.unpack_from(self._data, _HEADER.size + place * _ENTRY.size)
            result.append(CacheEntry(flags, _string(self._data, value), self._hwcaps(hwcap)))
            place -= 1
        result.reverse()
        return result

    def _hwcaps(self, hwcap: int) -> str | None:
        if hwcap == 0:
            return ""
        index = hwcap & 0xFFFFFFFF
        return self._subdirectories[index] if hwcap & _HWCAP_EXTENSION and index < len(self._subdirectories) else None


def _string(data: bytes, offset: int) -> str:
    end = data.find(b"\0", offset)
    return os.fsdecode(data[offset:end]) if end > 0 else ""


def _subdirectories(data: bytes, offset: int) -> list[str]:
    """The glibc-hwcaps subdirectory names of the extension directory at `offset` (0: there is none)."""
    if not offset or offset + _EXTENSION.size > len(data):
        return []
    magic, count = _EXTENSION.unpack_from(data, offset)
    if magic != _EXTENSION_MAGIC:
        return []
    for index in range(min(count, 64)):
        position = offset + _EXTENSION.size + index * _SECTION.size
        if position + _SECTION.size > len(data):
            break
        tag, _, start, size = _SECTION.unpack_from(data, position)
        if tag == _TAG_HWCAPS and start + size <= len(data):
            names = struct.iter_unpack("=I", data[start : start + size // 4 * 4])
            return [_string(data, name) for (name,) in names]
    return []
