"""Read what the dynamic linker needs to know from an ELF file. Never runs code, never trusts an offset."""

from __future__ import annotations

import os
import stat
import struct
import sys
from typing import Literal

import msgspec

from stockade.errors import ElfError

__all__ = ["EM_386", "EM_AARCH64", "EM_RISCV", "EM_X86_64", "DlopenNote", "ElfFile", "read"]

# elf(5) and the System V gABI.
EM_386, EM_X86_64, EM_AARCH64, EM_RISCV = 3, 62, 183, 243
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

_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()  # as os.fsdecode, at half the time
_WINDOW = 256  # bytes read for a string at first
_MAX_WINDOW = 8192

# For each class and byte order: program header, the places of offset, address and size in it, the words of a
# dynamic entry, and the file header from e_type to e_phnum.
_LAYOUTS = {
    (1, 1): (struct.Struct("<IIIIIIII"), (1, 2, 4), ("<", "I", 4), struct.Struct("<16xHHIIIIIHHH4x")),
    (1, 2): (struct.Struct(">IIIIIIII"), (1, 2, 4), (">", "I", 4), struct.Struct(">16xHHIIIIIHHH4x")),
    (2, 1): (struct.Struct("<IIQQQQQQ"), (2, 3, 5), ("<", "Q", 8), struct.Struct("<16xHHIQQQIHHH6x")),
    (2, 2): (struct.Struct(">IIQQQQQQ"), (2, 3, 5), (">", "Q", 8), struct.Struct(">16xHHIQQQIHHH6x")),
}


class DlopenNote(msgspec.Struct, frozen=True):
    """Libraries that a file may open while it runs: any one of `sonames` brings the feature."""

    sonames: tuple[str, ...]
    feature: str = ""
    priority: str = "recommended"
    description: str = ""


class ElfFile(msgspec.Struct, frozen=True):
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
        window = _WINDOW
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


_Segment = tuple[int, int, int]  # offset in the file, address, bytes in the file


def _parse(file: _File) -> ElfFile:
    head = file.head
    if len(head) < 20:
        raise file.damaged("its header is cut off")
    class_, data = head[4], head[5]
    layout = _LAYOUTS.get((class_, data))
    if layout is None:
        raise file.damaged(f"class {class_} and byte order {data} are unknown")
    program_header, (at_offset, at_address, at_size), dynamic_format, header = layout
    order: Literal["little", "big"] = "little" if data == 1 else "big"
    if len(head) < header.size:
        raise file.damaged("its header ends beyond the file")
    number, machine, _, _, table, _, _, _, entry_size, count = header.unpack_from(head)
    kind = _TYPES.get(number, "OTHER")
    if count == 0 or kind not in ("EXEC", "DYN"):
        return ElfFile(32 * class_, data == 1, machine, kind)
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
        type_ = values[0]
        if type_ > _PT_NOTE:
            continue
        if type_ == _PT_LOAD:
            segments.append((values[at_offset], values[at_address], values[at_size]))
        elif type_ == _PT_INTERP and interpreter is None:
            interpreter = file.string(values[at_offset], values[at_size], "its interpreter's name")
        elif type_ == _PT_DYNAMIC and values[at_size]:
            dynamic = (values[at_offset], values[at_size])
        elif type_ == _PT_NOTE and values[at_size]:
            offset, end = values[at_offset], values[at_offset] + values[at_size]
            if end > len(head) or b"FDO\0" in head[offset:end]:
                notes += _notes(file, offset, end - offset, order)
    if dynamic is None:
        return ElfFile(32 * class_, data == 1, machine, kind, interpreter=interpreter, dlopen=notes)
    offset, size = dynamic
    if size > _MAX_DYNAMIC:
        raise file.damaged(f"its dynamic section claims {size} bytes")
    byte_order, letter, width = dynamic_format
    section = file.bytes(offset, size, "its dynamic section")
    flat = struct.unpack_from(f"{byte_order}{size // (2 * width) * 2}{letter}", section)
    found = _dynamic(file, flat[::2], flat[1::2], segments)
    return ElfFile(32 * class_, data == 1, machine, kind, True, interpreter, *found, notes)


def _dynamic(
    file: _File, tags: tuple[int, ...], values: tuple[int, ...], segments: list[_Segment]
) -> tuple[
    tuple[str, ...], tuple[str, ...], tuple[str, ...], str | None, str | None, str | None, bool, bool
]:
    """The fields of ElfFile from `needed` to `pie`, from a dynamic section given as two columns."""
    if _DT_NULL in tags:
        tags = tags[: tags.index(_DT_NULL)]
    entries = list(zip(tags, values, strict=False))
    last = dict(entries)  # ld.so keeps the last of each
    lists = [
        [value for tag, value in entries if tag == wanted] if wanted in last else []
        for wanted in (_DT_NEEDED, _DT_FILTER, _DT_AUXILIARY)
    ]
    singles = [last.get(tag) for tag in (_DT_SONAME, _DT_RPATH, _DT_RUNPATH)]
    wanted = [offset for offset in singles if offset is not None]
    for offsets in lists:
        wanted += offsets
    strings = _strings(file, wanted, last, segments) if wanted else {}
    needed, filters, auxiliaries = (tuple([strings[offset] for offset in offsets]) for offsets in lists)
    soname, rpath, runpath = (None if offset is None else strings[offset] for offset in singles)
    flags = last.get(_DT_FLAGS_1, 0)
    if runpath is not None:
        rpath = None  # ld.so ignores DT_RPATH beside DT_RUNPATH
    nodeflib, pie = bool(flags & _DF_1_NODEFLIB), bool(flags & _DF_1_PIE)
    return needed, filters, auxiliaries, soname, rpath, runpath, nodeflib, pie


def _strings(file: _File, wanted: list[int], last: dict[int, int], segments: list[_Segment]) -> dict[int, str]:
    """The strings at the offsets `wanted` of the dynamic string table."""
    if len(wanted) > _MAX_STRINGS:
        raise file.damaged(f"its dynamic section names {len(wanted)} strings")
    address = last.get(_DT_STRTAB)
    if address is None:
        raise file.damaged("its dynamic section has no string table")
    for offset, start, size in segments:
        if start <= address < start + size:
            table = offset + address - start
            break
    else:
        raise file.damaged("its string table lies in no segment")
    length = last.get(_DT_STRSZ, start + size - address)
    if max(wanted) >= length:
        raise file.damaged("a string lies beyond its string table")
    first, window = min(wanted), max(wanted) - min(wanted) + _WINDOW
    window = min(window, length - first, file.size - table - first)
    text = file.bytes(table + first, window, "a string") if window <= _MAX_WINDOW else b""
    result = {}
    for position in wanted:  # linkers put these strings side by side: one read has them all
        end = text.find(b"\0", position - first)
        if end < 0:
            result[position] = file.string(table + position, length - position, "a string")
        else:
            result[position] = text[position - first : end].decode(_ENCODING, _ERRORS)
    return result


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
        items = msgspec.json.decode(text.rstrip(b"\0"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
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
