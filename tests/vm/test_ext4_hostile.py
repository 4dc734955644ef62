"""A file system that somebody made to keep its reader busy, or to fill its memory, is refused at once."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from machine import needs

from stockade.errors import StateError
from stockade.vm import filesystem
from stockade.vm.ext4 import FileSystem

BLOCK = 4096
ENTRIES = (BLOCK - 12) // 12
#: A block that no small file system uses for its own.
SPARE = 900


def header(entries: int, below: int) -> bytes:
    return struct.pack("<HHHHI", 0xF30A, entries, ENTRIES, below, 0)


def index(block: int) -> bytes:
    return struct.pack("<IIHH", 0, block, 0, 0)


def extent(first: int, length: int, block: int) -> bytes:
    return struct.pack("<IHHI", first, length, 0, block)


#: The root of the tree in the inode, then the blocks from SPARE on.
TREES = {
    "an index that leads to itself": [
        header(4, 4) + index(SPARE) * 4,
        header(ENTRIES, 4) + index(SPARE) * ENTRIES,
    ],
    "levels that all lead to one block": [
        header(4, 4) + index(SPARE) * 4,
        *(header(ENTRIES, below) + index(SPARE + 4 - below) * ENTRIES for below in (3, 2, 1)),
        header(1, 0) + extent(0, 1, 1),
    ],
    "levels that lead to nothing": [
        header(4, 4) + index(SPARE) * 4,
        *(header(ENTRIES, below) + index(SPARE + 4 - below) * ENTRIES for below in (3, 2, 1)),
        header(0, 0),
    ],
    "one extent many times": [header(1, 1) + index(SPARE), header(ENTRIES, 0) + extent(0, 32768, 1) * ENTRIES],
    "extents of no length": [header(4, 0) + extent(0, 0, 1) * 4],
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    needs(("mke2fs", "e2fsprogs"))
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").write_bytes(b"x" * 100)
    filesystem.make(tmp_path / "root", tmp_path / "image", name="hostile")
    return tmp_path / "image"


def place_of(image: Path, path: str) -> int:
    """Where the inode lies in the file."""
    with FileSystem(image) as system:
        found = system.find(path)
        assert found is not None and system.block_size == BLOCK
        group, number = divmod(found.inode - 1, system._per_group)
        descriptor = system._at(system._table + group * system._descriptor, system._descriptor)
        table: int = struct.unpack_from("<I", descriptor, 8)[0]
        return table * BLOCK + number * system._inode_size


def write(image: Path, at: int, data: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_extents_that_lead_in_circles_are_refused_at_once(image: Path, tree: list[bytes]) -> None:
    inode = place_of(image, "/file")
    write(image, inode + 40, tree[0])
    for number, block in enumerate(tree[1:]):
        write(image, (SPARE + number) * BLOCK, block)
    begun = time.process_time()
    with FileSystem(image) as system, pytest.raises(StateError, match="extent"):
        for _, node in system.walk():
            if node.type == "file":
                system.read(node)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("path", ["/file", "/"])
def test_text_and_directories_of_gigabytes_are_refused(image: Path, path: str) -> None:
    with FileSystem(image) as system:
        assert system.text("/file") == "x" * 100
    write(image, place_of(image, path) + 4, (900 << 20).to_bytes(4, "little"))
    with FileSystem(image) as system, pytest.raises(StateError, match="has 943718400 bytes"):
        system.text("/file")
