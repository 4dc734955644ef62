"""Read what the dynamic linker needs to know from an ELF file. Never runs code, never trusts an offset."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import ElfError

__all__ = ["DlopenNote", "ElfFile", "read"]

# elf(5) and the System V gABI.
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE = 1, 2, 3, 4
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 14, 15, 29
_DT_FLAGS_1, _DT_AUXILIARY, _DT_FILTER = 0x6FFFFFFB, 0x7FFFFFFD, 0x7FFFFFFF
_DF_1_NODEFLIB, _DF_1_PIE = 0x800, 0x8000000
_NT_FDO_DLOPEN = 0x407C0C0A  # systemd.io/ELF_DLOPEN_METADATA, note owner "FDO"
_TYPES = {0: "NONE", 1: "REL", 2: "EXEC", 3: "DYN", 4: "CORE"}

# Bounds on what a file may claim; the largest real ones are a tenth of these.
_HEAD = 4096
_MAX_PROGRAM_HEADERS = 4096
_MAX_DYNAMIC = 1 << 20
_MAX_NOTES = 1 << 20
_MAX_STRING = 1 << 16
_MAX_STRINGS = 4096

# For each class and byte order: program header, the places of offset, address and size in it, dynamic entry, and
# what follows e_machine in the file header.
_LAYOUTS = {
    (1, 1): (struct.Struct("<IIIIIIII"), (1, 2, 4), struct.Struct("<iI"), struct.Struct("<IIIIIHHH")),
    (1, 2): (struct.Struct(">IIIIIIII"), (1, 2, 4), struct.Struct(">iI"), struct.Struct(">IIIIIHHH")),
    (2, 1): (struct.Struct("<IIQQQQQQ"), (2, 3, 5), struct.Struct("<qQ"), struct.Struct("<IQQQIHHH")),
    (2, 2): (struct.Struct(">IIQQQQQQ"), (2, 3, 5), struct.Struct(">qQ"), struct.Struct(">IQQQIHHH")),
}


@dataclass(frozen=True, slots=True)
class DlopenNote:
    """Libraries that a file may open while it runs: any one of `sonames` brings the feature."""

    sonames: tuple[str, ...]
    feature: str = ""
    priority: str = "recommended"
    description: str = ""


@dataclass(frozen=True, slots=True)
class ElfFile:
    """What an ELF file says about how it is loaded. Strings are as `os.fsdecode` gives them.

    `type` is "EXEC", "DYN", "REL", "CORE", "NONE" or "OTHER". `rpath` and `runpath` are None when
    absent and else unexpanded. `filters` and `auxiliaries` are loaded like `needed`, the latter only if found.
    """

    bits: int
    little_endian: bool
    machine: int
    type: str
    dynamic: bool = False
    interpreter: str | None = None
    needed: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    auxiliaries: tuple[str, ...] = ()
    soname: str | None = None
    rpath: str | None = None
    runpath: str | None = None
    nodeflib: bool = False
    pie: bool = False
    dlopen: tuple[DlopenNote, ...] = ()


class _File:
    """A bounded view of an open file."""

    def __init__(self, descriptor: int, path: str, size: int) -> None:
        self.descriptor, self.path, self.size = descriptor, path, size
        self.head = os.pread(descriptor, _HEAD, 0)

    def damaged(self, why: str) -> ElfError:
        return ElfError(
            f"cannot read the ELF file `{self.path}`: {why}",
            hint="the file is damaged or hostile; install its package again or leave it out with `files.exclude`",
        )

    def bytes(self, offset: int, length: int, what: str) -> bytes:
        """Exactly `length` bytes at `offset`."""
        if length < 0 or offset + length > self.size:
            raise self.damaged(f"{what} ends beyond the file")
        if offset + length <= len(self.head):
            return self.head[offset : offset + length]
        data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            raise self.damaged(f"{what} could not be read whole")
        return data

    def string(self, offset: int, limit: int, what: str) -> str:
        """The NUL-terminated string at `offset`, which must end within `limit` bytes."""
        limit = min(limit, _MAX_STRING, self.size - offset)
        window = 256
        while True:
            data = self.bytes(offset, max(0, min(window, limit)), what)
            end = data.find(b"\0")
            if end >= 0:
                return os.fsdecode(data[:end])
            if window >= limit:
                raise self.damaged(f"{what} does not end")
            window *= 16


def read(path: str | os.PathLike[str]) -> ElfFile | None:
    """Read the ELF file at `path`; None when it is no regular file or no ELF file.

    Raises ElfError for a file that starts like ELF and is damaged, OSError when it can't be opened.
    """
    name = os.fspath(path)
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        file = _File(descriptor, name, status.st_size)
        return _parse(file) if file.head[:4] == b"\x7fELF" else None
    finally:
        os.close(descriptor)


def _parse(file: _File) -> ElfFile:
    if len(file.head) < 20:
        raise file.damaged("its header is cut off")
    class_, data = file.head[4], file.head[5]
    layout = _LAYOUTS.get((class_, data))
    if layout is None:
        raise file.damaged(f"class {class_} and byte order {data} are unknown")
    program_header, (at_offset, at_address, at_size), dynamic_entry, header = layout
    order: Literal["little", "big"] = "little" if data == 1 else "big"
    kind = _TYPES.get(int.from_bytes(file.head[16:18], order), "OTHER")
    machine = int.from_bytes(file.head[18:20], order)
    _, _, table, _, _, _, entry_size, count = header.unpack(file.bytes(20, header.size, "its header"))
    plain = ElfFile(bits=32 * class_, little_endian=data == 1, machine=machine, type=kind)
    if count == 0 or kind not in ("EXEC", "DYN"):
        return plain
    if entry_size != program_header.size:
        raise file.damaged(f"its program headers claim {entry_size} bytes each instead of {program_header.size}")
    if count > _MAX_PROGRAM_HEADERS:
        raise file.damaged(f"it claims {count} program headers")
    headers = file.bytes(table, count * entry_size, "its program header table")
    segments: list[_Segment] = []
    interpreter = None
    dynamic: tuple[int, int] | None = None
    notes: tuple[DlopenNote, ...] = ()
    for values in program_header.iter_unpack(headers):
        type_, offset, size = values[0], values[at_offset], values[at_size]
        if type_ == _PT_LOAD:
            segments.append((offset, values[at_address], size))
        elif type_ == _PT_INTERP and interpreter is None:
            interpreter = file.string(offset, size, "its interpreter's name")
        elif type_ == _PT_DYNAMIC and size:
            dynamic = (offset, size)
        elif type_ == _PT_NOTE and size:
            notes += _notes(file, offset, size, order)
    if dynamic is None:
        return _made(plain, interpreter, None, notes)
    offset, size = dynamic
    if size > _MAX_DYNAMIC:
        raise file.damaged(f"its dynamic section claims {size} bytes")
    size -= size % dynamic_entry.size
    entries = dynamic_entry.iter_unpack(file.bytes(offset, size, "its dynamic section"))
    return _made(plain, interpreter, _Dynamic(file, entries, segments), notes)


_Segment = tuple[int, int, int]  # offset in the file, address, bytes in the file


class _Dynamic:
    """The dynamic section's strings and flags."""

    def __init__(self, file: _File, entries: Iterator[tuple[int, int]], segments: list[_Segment]) -> None:
        self.flags = 0
        values: dict[int, int] = {}
        lists: dict[int, list[int]] = {_DT_NEEDED: [], _DT_FILTER: [], _DT_AUXILIARY: []}
        for tag, value in entries:
            if tag == _DT_NULL:
                break
            if tag in lists:
                lists[tag].append(value)
            else:
                values[tag] = value  # ld.so keeps the last of each
        self.flags = values.get(_DT_FLAGS_1, 0)
        wanted = [values[tag] for tag in (_DT_SONAME, _DT_RPATH, _DT_RUNPATH) if tag in values]
        wanted += [value for offsets in lists.values() for value in offsets]
        strings = self._strings(file, wanted, values, segments)
        self.needed, self.filters, self.auxiliaries = (
            tuple(strings[offset] for offset in lists[tag]) for tag in (_DT_NEEDED, _DT_FILTER, _DT_AUXILIARY)
        )
        self.soname, self.rpath, self.runpath = (
            strings[values[tag]] if tag in values else None for tag in (_DT_SONAME, _DT_RPATH, _DT_RUNPATH)
        )

    @staticmethod
    def _strings(
        file: _File, wanted: list[int], values: dict[int, int], segments: list[_Segment]
    ) -> dict[int, str]:
        if not wanted:
            return {}
        if len(wanted) > _MAX_STRINGS:
            raise file.damaged(f"its dynamic section names {len(wanted)} strings")
        if _DT_STRTAB not in values:
            raise file.damaged("its dynamic section has no string table")
        address = values[_DT_STRTAB]
        for offset, start, size in segments:
            if start <= address < start + size:
                table = offset + address - start
                break
        else:
            raise file.damaged("its string table lies in no segment")
        length = values.get(_DT_STRSZ, start + size - address)
        if max(wanted) >= length:
            raise file.damaged("a string lies beyond its string table")
        if length <= _MAX_STRING:  # one read for all: the common case, and four times as fast
            text = file.bytes(table, min(length, file.size - table), "its string table")
            ends = {position: text.find(b"\0", position) for position in wanted}
            if min(ends.values()) < 0:
                raise file.damaged("a string does not end")
            return {position: os.fsdecode(text[position:end]) for position, end in ends.items()}
        return {position: file.string(table + position, length - position, "a string") for position in set(wanted)}


def _made(
    plain: ElfFile, interpreter: str | None, dynamic: _Dynamic | None, notes: tuple[DlopenNote, ...]
) -> ElfFile:
    if dynamic is None:
        return ElfFile(
            plain.bits, plain.little_endian, plain.machine, plain.type, interpreter=interpreter, dlopen=notes
        )
    return ElfFile(
        plain.bits,
        plain.little_endian,
        plain.machine,
        plain.type,
        True,
        interpreter,
        dynamic.needed,
        dynamic.filters,
        dynamic.auxiliaries,
        dynamic.soname,
        None if dynamic.runpath is not None else dynamic.rpath,  # ld.so ignores DT_RPATH beside DT_RUNPATH
        dynamic.runpath,
        bool(dynamic.flags & _DF_1_NODEFLIB),
        bool(dynamic.flags & _DF_1_PIE),
        notes,
    )


def _notes(file: _File, offset: int, size: int, order: Literal["little", "big"]) -> tuple[DlopenNote, ...]:
    """The .note.dlopen entries of one PT_NOTE segment."""
    if size > _MAX_NOTES:
        raise file.damaged(f"its notes claim {size} bytes")
    data = file.bytes(offset, size, "a note segment")
    if b"FDO\0" not in data:
        return ()
    found: list[DlopenNote] = []
    header = struct.Struct(("<" if order == "little" else ">") + "III")
    position = 0
    while position + header.size <= len(data):
        name_size, text_size, type_ = header.unpack_from(data, position)
        name_start = position + header.size
        text_start = name_start + (name_size + 3) // 4 * 4
        position = text_start + (text_size + 3) // 4 * 4
        if text_start + text_size > len(data):
            raise file.damaged("a note ends beyond its segment")
        if type_ == _NT_FDO_DLOPEN and data[name_start : name_start + name_size] == b"FDO\0":
            found += _dlopen(file, data[text_start : text_start + text_size])
    return tuple(found)


def _dlopen(file: _File, text: bytes) -> list[DlopenNote]:
    try:
        items = json.loads(text.rstrip(b"\0"))
    except (ValueError, RecursionError):
        raise file.damaged("its .note.dlopen is no JSON") from None
    found = []
    for item in items if isinstance(items, list) else [items]:
        sonames = item.get("soname") if isinstance(item, dict) else None
        if not isinstance(sonames, list) or not all(isinstance(name, str) and name for name in sonames):
            raise file.damaged("its .note.dlopen names no libraries")
        feature, priority, description = (
            str(item.get(key, default))
            for key, default in (("feature", ""), ("priority", "recommended"), ("description", ""))
        )
        found.append(DlopenNote(tuple(sonames), feature, priority, description))
    return found
