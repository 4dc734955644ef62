"""Copy-on-write files: the same to the bit as UML's own tools make them, and refused when anything is wrong."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import blocks, needs, needs_uml, sha256

from stockade.errors import StateError
from stockade.vm import cow

SIZES = (512, 4096, 65536, 1 << 20, (1 << 20) + 512, 24 << 20)


def _base(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    os.utime(path, (1_234_567_890, 1_234_567_890))
    return path


@pytest.mark.parametrize("size", SIZES)
def test_a_new_file_is_what_uml_mkcow_makes(tmp_path: Path, size: int) -> None:
    needs(("uml_mkcow", "uml-utilities"))
    base = _base(tmp_path / "base", size)
    subprocess.run(["uml_mkcow", str(tmp_path / "theirs"), str(base)], check=True, capture_output=True, timeout=20)
    theirs = cow.read(tmp_path / "theirs")
    cow.create(tmp_path / "ours", backing=theirs.backing, base=base)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory where anybody may write: pytest's own are root's alone, and UML never runs as root."""
    with tempfile.TemporaryDirectory(prefix="stockade-cow-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def test_a_new_file_is_what_the_kernel_makes(open_place: Path) -> None:
    needs_uml()
    base = _base(open_place / "base", 1 << 20)
    base.chmod(0o444)
    user = 65534 if os.geteuid() == 0 else None
    subprocess.run(
        ["linux.uml", "mem=32M", "ubd0=kernel.cow,base", "con=none", "con0=null,fd:1", "ssl=none", "panic=1"],
        cwd=open_place, user=user, extra_groups=[] if user else None, capture_output=True, timeout=30, check=False,
        stdin=subprocess.DEVNULL, env={"PATH": "/usr/bin", "HOME": str(open_place), "TMPDIR": "/dev/shm"},
    )  # fmt: skip
    theirs = cow.read(open_place / "kernel.cow")
    assert (theirs.size, theirs.mtime) == (1 << 20, 1_234_567_890)
    cow.create(open_place / "ours", backing=theirs.backing, base=base)
    head = theirs.data_start
    assert (open_place / "ours").read_bytes()[:head] == (open_place / "kernel.cow").read_bytes()[:head]


def test_a_new_file_takes_12_kib_whatever_its_base_holds(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 1 << 30)
    cow.create(tmp_path / "disk.cow", backing="base", base=base)
    assert blocks(tmp_path / "disk.cow") <= 12 << 10


def test_a_file_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 4096)
    (tmp_path / "disk.cow").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        cow.create(tmp_path / "disk.cow", backing="base", base=base)
    assert (tmp_path / "disk.cow").read_bytes() == b"mine"


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 4096)
    (tmp_path / "disk.cow").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        cow.create(tmp_path / "disk.cow", backing="base", base=base)
    assert not (tmp_path / "elsewhere").exists()


class Written:
    """A copy-on-write file and the disk that it stands for, written the way ubd_kern.c does."""

    def __init__(self, directory: Path, sectors: int) -> None:
        self.base = directory / "base"
        self.plain = bytearray(os.urandom(sectors * cow.SECTOR))
        self.base.write_bytes(self.plain)
        self.path = directory / "disk.cow"
        self.header = cow.create(self.path, backing="base", base=self.base)

    def write(self, sector: int, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            for number in range(sector, sector + len(data) // cow.SECTOR):
                # arch/um/drivers/ubd_kern.c, ubd_set_bit: little-endian within bytes.
                file.seek(8192 + number // 8)
                byte = file.read(1)[0] | 1 << (number % 8)
                file.seek(8192 + number // 8)
                file.write(bytes([byte]))
            file.seek(self.header.data_start + sector * cow.SECTOR)
            file.write(data)
        self.plain[sector * cow.SECTOR : sector * cow.SECTOR + len(data)] = data


WRITES = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(1, 23), st.sampled_from([b"\0", b"\xff", b"a"])), max_size=20
)


@given(writes=WRITES)
@settings(max_examples=30, deadline=None)
def test_merging_gives_the_disk_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, int, bytes]]
) -> None:
    directory = tmp_path_factory.mktemp("merge")
    disk = Written(directory, 1024)
    marked = set()
    for sector, count, byte in writes:
        disk.write(sector, byte * (count * cow.SECTOR))
        marked |= set(range(sector, sector + count))
    cow.merge(disk.path, disk.base, directory / "whole")
    assert (directory / "whole").read_bytes() == disk.plain
    assert cow.written(disk.path) == len(marked) * cow.SECTOR
    runs = list(cow.written_sectors(disk.path, disk.header))
    assert {sector for start, end in runs for sector in range(start, end)} == marked
    assert all(one[1] < other[0] for one, other in zip(runs, runs[1:], strict=False)), "neighbours are joined"
    shutil.rmtree(directory)


def test_merging_gives_what_uml_moo_gives(tmp_path: Path) -> None:
    needs(("uml_moo", "uml-utilities"))
    disk = Written(tmp_path, 4096)
    for sector in (0, 7, 8, 9, 100, 4088):
        disk.write(sector, os.urandom(3 * cow.SECTOR) if sector < 4000 else os.urandom(8 * cow.SECTOR))
    subprocess.run(
        ["uml_moo", "-b", str(disk.base), str(disk.path), str(tmp_path / "theirs")],
        check=True, capture_output=True, timeout=20,
    )  # fmt: skip
    cow.merge(disk.path, disk.base, tmp_path / "ours")
    assert sha256(tmp_path / "ours") == sha256(tmp_path / "theirs")


def test_merging_over_a_file_leaves_it_alone(tmp_path: Path) -> None:
    disk = Written(tmp_path, 64)
    (tmp_path / "whole").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        cow.merge(disk.path, disk.base, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"mine"


# Offsets of struct cow_header_v3 (arch/um/drivers/cow_user.c): magic, version, mtime, size, sectorsize, alignment,
# cow_format.
DAMAGES = {
    "another magic": (0, struct.pack(">I", 0x4F4F4F4E), "does not begin as"),
    "version 2": (4, struct.pack(">I", 2), "version 2"),
    "size 0": (12, struct.pack(">Q", 0), "cannot be the copy-on-write file"),
    "an enormous size": (12, struct.pack(">Q", 1 << 62), "cannot be the copy-on-write file"),
    "sectors of 1 byte": (20, struct.pack(">I", 1), "sectors of 1 bytes"),
    "no alignment": (24, struct.pack(">I", 0), "aligned to 0"),
    "an unknown format": (28, struct.pack(">I", 9), "format 9"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_header_is_a_clear_error(tmp_path: Path, name: str) -> None:
    disk = Written(tmp_path, 64)
    offset, data, why = DAMAGES[name]
    with open(disk.path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    with pytest.raises(StateError, match=why) as caught:
        cow.check(disk.path, disk.base)
    assert str(disk.path) in caught.value.message
    assert caught.value.hint is not None and "snapshot" in caught.value.hint


@pytest.mark.parametrize("size", (0, 1, 31, 4127, 8191))
def test_a_file_that_is_cut_off_is_a_clear_error(tmp_path: Path, size: int) -> None:
    disk = Written(tmp_path, 64)
    os.truncate(disk.path, size)
    with pytest.raises(StateError, match="is damaged"):
        cow.read(disk.path)


@given(st.binary(max_size=9000))
@settings(max_examples=200, deadline=None)
def test_no_bytes_are_anything_but_a_header_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.cow"
    path.write_bytes(b"OOOM\0\0\0\3" + data)
    try:
        assert cow.read(path).size > 0
    except StateError as error:
        assert "is damaged" in error.message


def test_a_base_with_another_time_is_refused(tmp_path: Path) -> None:
    disk = Written(tmp_path, 64)
    os.utime(disk.base, (1, 1))
    with pytest.raises(StateError, match="was changed after") as caught:
        cow.check(disk.path, disk.base)
    assert caught.value.hint is not None and "image inspect" in caught.value.hint


def test_a_base_with_another_size_is_refused(tmp_path: Path) -> None:
    disk = Written(tmp_path, 64)
    when = disk.base.stat().st_mtime
    os.truncate(disk.base, 63 * 512)
    os.utime(disk.base, (when, when))
    with pytest.raises(StateError, match="was changed after"):
        cow.check(disk.path, disk.base)


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    disk = Written(tmp_path, 64)
    disk.base.unlink()
    with pytest.raises(StateError, match="base of .* is missing"):
        cow.check(disk.path, disk.base)


def test_a_path_that_does_not_fit_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 4096)
    with pytest.raises(StateError, match="too long"):
        cow.create(tmp_path / "disk.cow", backing="x" * 4096, base=base)
    assert not (tmp_path / "disk.cow").exists()
