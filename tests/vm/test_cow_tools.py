"""Copy-on-write files beside UML's own tools: the same to the bit, and any writes give the disk that was written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import blocks, needs

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


def test_merging_over_a_file_leaves_it_alone(tmp_path: Path) -> None:
    disk = Written(tmp_path, 64)
    (tmp_path / "whole").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        cow.merge(disk.path, disk.base, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"mine"
