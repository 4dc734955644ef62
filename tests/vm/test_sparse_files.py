"""Files with holes, whatever is in them: contents and holes stay, and digests do not depend on where the holes lie."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import blocks

from stockade.vm import sparse

MEGABYTE = 1 << 20
Piece = tuple[int, bytes]
PIECES = st.lists(
    st.tuples(st.integers(0, 3 * MEGABYTE), st.sampled_from([b"x" * 4096, b"\0" * 8192, b"tail", b"\0" * 5 + b"z"])),
    max_size=6,
)


def _write(path: Path, size: int, pieces: list[Piece]) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        for at, data in pieces:
            file.seek(at)
            file.write(data)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as one, open(target, "xb") as other:
        sparse.copy(one.fileno(), other.fileno())


@given(pieces=PIECES, size=st.integers(0, 3 * MEGABYTE))
@settings(max_examples=30, deadline=None)
def test_a_copy_has_the_same_contents_and_no_more_blocks(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[Piece], size: int
) -> None:
    place = tmp_path_factory.mktemp("sparse")
    _write(place / "one", size, pieces)
    _copy(place / "one", place / "two")
    assert (place / "two").read_bytes() == (place / "one").read_bytes()
    assert blocks(place / "two") <= blocks(place / "one")


@given(pieces=PIECES, size=st.integers(0, 3 * MEGABYTE))
@settings(max_examples=30, deadline=None)
def test_both_digests_are_the_same_without_holes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[Piece], size: int
) -> None:
    place = tmp_path_factory.mktemp("digest")
    _write(place / "holes", size, pieces)
    (place / "full").write_bytes((place / "holes").read_bytes())
    assert sparse.digest(place / "holes") == sparse.digest(place / "full")
    assert sparse.file_sha256(place / "holes") == hashlib.sha256((place / "full").read_bytes()).hexdigest()


@given(pieces=PIECES, at=st.integers(0, 3 * MEGABYTE - 1))
@settings(max_examples=30, deadline=None)
def test_one_changed_byte_changes_the_digest(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[Piece], at: int
) -> None:
    path = tmp_path_factory.mktemp("digest") / "file"
    _write(path, 4 * MEGABYTE, pieces)
    before = sparse.digest(path)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert sparse.digest(path) != before


def test_the_size_is_part_of_the_digest(tmp_path: Path) -> None:
    for name, size in (("one", 4096), ("two", 8192)):
        _write(tmp_path / name, size, [])
    assert sparse.digest(tmp_path / "one") != sparse.digest(tmp_path / "two")


def test_a_digest_of_16_gb_of_nothing_takes_no_time(tmp_path: Path) -> None:
    _write(tmp_path / "file", 16 << 30, [(8 << 30, b"something")])
    began = time.monotonic()
    sparse.digest(tmp_path / "file")
    assert time.monotonic() - began < 1.0


def test_a_file_that_is_not_there_takes_nothing(tmp_path: Path) -> None:
    assert sparse.allocated(tmp_path / "none") == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("run as root: a small file system is mounted")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(place)], check=True, timeout=10)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=10)


def test_a_full_disk_is_an_error_and_not_a_short_copy(tmp_path: Path, small_disk: Path) -> None:
    _write(tmp_path / "source", 2 * MEGABYTE, [(at, os.urandom(4096)) for at in range(0, 2 * MEGABYTE, 4096)])
    with pytest.raises(OSError) as caught:
        _copy(tmp_path / "source", small_disk / "target")
    assert caught.value.errno == errno.ENOSPC
