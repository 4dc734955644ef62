from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stockade import elf
from stockade.errors import ElfError

REAL = [path for path in ("/usr/sbin/sshd", "/bin/true", "/lib/x86_64-linux-gnu/libc.so.6") if os.path.exists(path)]


def readelf(path: str) -> dict[str, list[str]]:
    """What binutils says: the dynamic section's strings by tag, and the interpreter."""
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("needs readelf (package `binutils`)")
    text = subprocess.run([tool, "-dlW", path], capture_output=True, text=True, timeout=30, check=True).stdout
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "[" in line and "(" in line:
            tag = line.split("(")[1].split(")")[0]
            found.setdefault(tag, []).append(line.split("[")[1].rsplit("]")[0])
        if "interpreter:" in line:
            found["INTERP"] = [line.split("interpreter: ")[1].rstrip("]")]
    return found


@pytest.mark.parametrize("path", REAL)
def test_reads_what_readelf_reads(path: str) -> None:
    file = elf.read(path)
    theirs = readelf(path)
    assert file is not None
    assert list(file.needed) == theirs.get("NEEDED", [])
    assert file.soname == theirs.get("SONAME", [None])[0]
    assert file.interpreter == theirs.get("INTERP", [None])[0]
    assert (file.bits, file.machine, file.little_endian, file.type) == (64, 62, True, "DYN")


@pytest.mark.parametrize("content", [b"", b"\x7fEL", b"#!/bin/sh\n", b"\0" * 100])
def test_what_is_no_elf_file_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert elf.read(path) is None


def test_a_directory_a_pipe_and_a_device_are_no_elf_files_and_never_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert elf.read(tmp_path) is None
    assert elf.read(tmp_path / "pipe") is None
    assert elf.read("/dev/null") is None


def test_a_missing_file_is_the_operating_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        elf.read(tmp_path / "none")


def header(count: int = 0, *, table: int = 64, size: int = 56) -> bytes:
    rest = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, table, 0, 0, 64, size, count, 0, 0, 0)
    return b"\x7fELF\x02\x01\x01" + bytes(9) + rest


def segment(type_: int, offset: int, size: int) -> bytes:
    return struct.pack("<IIQQQQQQ", type_, 4, offset, 0, 0, size, 0, 1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x7fELF\x02\x01\x01", "its header is cut off"),
        (b"\x7fELF\x07\x01" + bytes(60), "class 7 and byte order 1 are unknown"),
        (header()[:40], "its header ends beyond the file"),
        (header(9), "its program header table ends beyond the file"),
        (header(1, table=1 << 63), "its program header table ends beyond the file"),
        (header(1, size=40) + bytes(56), "its program headers claim 40 bytes each instead of 56"),
        (header(60000) + bytes(60000 * 56), "it claims 60000 program headers"),
        (header(1) + segment(3, 1 << 62, 10), "its interpreter's name ends beyond the file"),
        (header(1) + segment(3, 0, 4), "its interpreter's name does not end"),
        (header(1) + segment(2, 0, 1 << 40), f"its dynamic section claims {1 << 40} bytes"),
        (header(1) + segment(4, 0, 1 << 40), f"its notes claim {1 << 40} bytes"),
        (
            header(1) + segment(2, 120, 32) + struct.pack("<qQqQ", 1, 5, 0, 0),
            "its dynamic section has no string table",
        ),
        (
            header(1) + segment(2, 120, 32) + struct.pack("<qQqQ", 1, 5, 5, 9),
            "its string table lies in no segment",
        ),
    ],
)  # fmt: skip
def test_a_hostile_claim_is_one_clear_error(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(content)
    with pytest.raises(ElfError) as caught:
        elf.read(path)
    assert caught.value.message == f"cannot read the ELF file `{path}`: {why}"
    assert caught.value.hint


def test_rpath_beside_runpath_is_ignored_as_ld_so_ignores_it(tmp_path: Path) -> None:
    strings = b"\0old\0new\0"
    entries = struct.pack("<12Q", 15, 1, 29, 5, 5, 0x1000, 10, len(strings), 1, 1, 0, 0)
    place = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 4, place + len(entries), 0x1000, 0, len(strings), 0, 1)
    path = tmp_path / "both"
    path.write_bytes(header(2) + load + segment(2, place, len(entries)) + entries + strings)
    file = elf.read(path)
    assert file is not None
    assert (file.rpath, file.runpath, file.needed) == (None, "new", ("old",))


def test_a_sparse_giant_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "giant"
    with path.open("wb") as file:
        file.write(header(1) + segment(3, 4096, 1 << 40))
        file.truncate(1 << 41)
        file.seek(4096)
        file.write(b"x" * (1 << 17))
    began = time.monotonic()
    with pytest.raises(ElfError, match="does not end"):
        elf.read(path)
    assert time.monotonic() - began < 1


def note(text: bytes, *, owner: bytes = b"FDO\0", type_: int = 0x407C0C0A) -> bytes:
    padded = text + bytes(-len(text) % 4)
    return struct.pack("<III", len(owner), len(text), type_) + owner + padded


def with_notes(path: Path, notes: bytes) -> Path:
    path.write_bytes(header(1) + segment(4, 120, len(notes)) + notes)
    return path


def test_dlopen_notes_are_read(tmp_path: Path) -> None:
    text = json.dumps(
        [
            {"soname": ["libx.so.2", "libx.so.1"], "feature": "x", "priority": "suggested", "description": "X"},
            {"soname": ["liby.so.1"]},
        ]
    ).encode()
    other = note(b"GNU text", owner=b"GNU\0", type_=3)
    file = elf.read(with_notes(tmp_path / "file", other + note(text + b"\0") + other))
    assert file is not None
    assert file.dlopen == (
        elf.DlopenNote(("libx.so.2", "libx.so.1"), "x", "suggested", "X"),
        elf.DlopenNote(("liby.so.1",), "", "recommended", ""),
    )


@pytest.mark.parametrize(
    ("notes", "why"),
    [
        (note(b"{no json"), "its .note.dlopen is no JSON"),
        (note(b"[" * 5000), "its .note.dlopen is no JSON"),
        (note(b'[{"soname": "libx.so.1"}]'), "its .note.dlopen names no libraries"),
        (note(b"[7]"), "its .note.dlopen names no libraries"),
        (struct.pack("<III", 4, 1 << 30, 0x407C0C0A) + b"FDO\0", "a note ends beyond its segment"),
    ],
)
def test_a_damaged_dlopen_note_is_one_clear_error(tmp_path: Path, notes: bytes, why: str) -> None:
    path = with_notes(tmp_path / "file", notes)
    with pytest.raises(ElfError) as caught:
        elf.read(path)
    assert caught.value.message == f"cannot read the ELF file `{path}`: {why}"


def read_or_refuse(path: Path) -> None:
    """Anything but an answer, None or ElfError is a bug, and so is taking long."""
    began = time.monotonic()
    try:
        elf.read(path)
    except ElfError as error:
        assert error.hint
    assert time.monotonic() - began < 2


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2000))
def test_arbitrary_bytes_behind_the_magic_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz"
    path.write_bytes(b"\x7fELF" + data)
    read_or_refuse(path)


@pytest.mark.parametrize("real", REAL)
def test_mutated_real_files_are_read_or_refused(tmp_path: Path, real: str) -> None:
    original = Path(real).read_bytes()
    random_ = random.Random(7)
    path = tmp_path / "mutant"
    file = elf.read(real)
    assert file is not None
    interesting = [*range(64), *range(64, 64 + 56 * 14)]
    for _ in range(400):
        data = bytearray(original[: 1 << 18])
        for _ in range(random_.choice((1, 2, 8))):
            position = random_.choice(interesting) if random_.random() < 0.8 else random_.randrange(len(data))
            data[position] = random_.choice((0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)))
        if random_.random() < 0.1:
            del data[random_.randrange(len(data)) :]
        path.write_bytes(data)
        read_or_refuse(path)
