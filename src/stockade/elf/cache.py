"""ld.so.cache, the index of libraries that ldconfig(8) writes: read, without trusting an offset in it, and written."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Iterable
from typing import NamedTuple

from .reading import EM_386, EM_AARCH64, EM_RISCV, EM_X86_64

__all__ = ["FLAGS", "Cache", "CacheEntry", "encode", "rank"]

#: By machine and bits, which of the entries are for which linker (FLAG_ELF_LIBC6, and sysdeps/*/dl-cache.h).
FLAGS = {
    (EM_X86_64, 64): 0x0303,
    (EM_X86_64, 32): 0x0803,
    (EM_386, 32): 0x0003,
    (EM_AARCH64, 64): 0x0A03,
    (EM_RISCV, 64): 0x1003,
}

# glibc, sysdeps/generic/dl-cache.h
_OLD_MAGIC = b"ld.so-1.7.0\0"
_OLD_ENTRY = 12
_MAGIC = b"glibc-ld.so.cache1.1"
_HEADER = struct.Struct("=20sIIB3xI12x")
_BYTE_ORDER = 2 if sys.byteorder == "little" else 3  # cache_file_new_flags_endian_*
_ENTRY = struct.Struct("=iIIIQ")
_EXTENSION_MAGIC = 0xEAA42174
_EXTENSION = struct.Struct("=II")
_SECTION = struct.Struct("=IIII")
_TAG_HWCAPS = 1
_HWCAP_EXTENSION = 1 << 62  # the entry's low 32 bits are an index into the extension's list of subdirectories
_DIGITS = re.compile(rb"([0-9]+)")


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


def encode(libraries: Iterable[tuple[str, CacheEntry]]) -> bytes:
    """The content of a cache with `libraries`: names as programs ask for them, each with where it is.

    Of several with one name and the same flags the first counts. What `hwcaps` names is preferred where the processor
    can do it; a legacy subdirectory (None) cannot be given. For the ld.so of glibc 2.2 and later; those before 2.33
    do not see what stands in a glibc-hwcaps subdirectory.
    """
    entries = sorted(((os.fsencode(name), entry) for name, entry in libraries), key=_rank, reverse=True)
    subdirectories = sorted({os.fsencode(entry.hwcaps) for _, entry in entries if entry.hwcaps})
    places: dict[bytes, int] = {}
    strings = bytearray()
    start = _HEADER.size + len(entries) * _ENTRY.size

    def place(text: bytes) -> int:
        if text not in places:
            places[text] = start + len(strings)
            strings.extend(text + b"\0")
        return places[text]

    table = b"".join(
        _ENTRY.pack(
            entry.flags, place(name), place(os.fsencode(entry.path)), 0,
            _HWCAP_EXTENSION | subdirectories.index(os.fsencode(entry.hwcaps)) if entry.hwcaps else 0,
        )
        for name, entry in entries
    )  # fmt: skip
    names = struct.pack(f"={len(subdirectories)}I", *map(place, subdirectories))
    extension = start + len(strings) + -len(strings) % 4 if names else 0
    section = extension + _EXTENSION.size + _SECTION.size
    end = b"" if not names else bytes(-len(strings) % 4) + b"".join(
        (_EXTENSION.pack(_EXTENSION_MAGIC, 1), _SECTION.pack(_TAG_HWCAPS, 0, section, len(names)), names)
    )
    return _HEADER.pack(_MAGIC, len(entries), len(strings), _BYTE_ORDER, extension) + table + bytes(strings) + end


def rank(name: bytes) -> list[tuple[int, int]]:
    """A key that sorts names of libraries, older versions first, as _dl_cache_libcmp of elf/dl-cache.c compares them.

    Runs of digits count as one C int and come after all else, which is compared as C's char.
    """
    key: list[tuple[int, int]] = []
    for number, part in enumerate(_DIGITS.split(name + b"\0")):
        if number % 2:
            key.append((1, (int(part) + (1 << 31)) % (1 << 32) - (1 << 31)))
        else:
            key += [(0, _character(byte)) for byte in part]
    return key


def _rank(item: tuple[bytes, CacheEntry]) -> tuple[list[tuple[int, int]], int, bool]:
    """As compare of elf/cache.c: ld.so's search stops at the first entry outside a glibc-hwcaps subdirectory."""
    name, entry = item
    return rank(name), entry.flags, bool(entry.hwcaps)


def _character(byte: int) -> int:
    """A byte as char is on the machine: signed on x86."""
    return byte - 256 if byte > 127 and os.uname().machine in ("x86_64", "i686") else byte
