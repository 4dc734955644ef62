from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from stockade.build import copying
from stockade.build.copying import copy, digest
from stockade.errors import BuildError


def copied(source: Path, destination: Path) -> tuple[str, int, int]:
    descriptor = os.open(destination, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        return copy(str(source), descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("size", [0, 1, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_content_and_digest_are_those_of_the_source(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    os.utime(tmp_path / "source", (1_000_000, 1_234_567.75))
    assert copied(tmp_path / "source", tmp_path / "copy") == (hashlib.sha256(data).hexdigest(), size, 1_234_567)
    assert (tmp_path / "copy").read_bytes() == data
    assert (tmp_path / "copy").stat().st_ino != (tmp_path / "source").stat().st_ino


@pytest.mark.parametrize("tail", [b"", b"end"])
def test_holes_stay_holes(tail: bytes, tmp_path: Path) -> None:
    size = 64 << 20
    with open(tmp_path / "source", "wb") as file:
        file.write(b"start")
        file.seek(20 << 20)
        file.write(b"middle")
        file.truncate(size)
        file.seek(size - len(tail))
        file.write(tail)
    sha256, copied_size, _ = copied(tmp_path / "source", tmp_path / "copy")
    expected = hashlib.sha256((tmp_path / "source").read_bytes()).hexdigest()
    assert copied_size == size
    assert sha256 == expected == hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20


def test_a_link_or_fifo_in_the_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/shadow")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BuildError, match="was a file and is a symbolic link now"):
        copied(tmp_path / "link", tmp_path / "copy-of-link")
    with pytest.raises(BuildError, match="was a file and is something else now"):
        copied(tmp_path / "fifo", tmp_path / "copy-of-fifo")


def append_while_copying(source: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `source` grow by a byte each of the next `times` times that it has been read."""
    read = copying._content
    left = iter(range(times))

    def read_and_append(descriptor: int, destination: int, status: os.stat_result) -> str:
        digest = read(descriptor, destination, status)
        for _ in left:
            with open(source, "ab") as file:
                file.write(b"+")
            break
        return digest

    monkeypatch.setattr(copying, "_content", read_and_append)


@pytest.mark.parametrize("size", [4, 3_000_000])
def test_a_file_that_changes_while_it_is_read_is_read_again(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    append_while_copying(tmp_path / "source", 2, monkeypatch)
    expected = hashlib.sha256(data + b"++").hexdigest()
    assert copied(tmp_path / "source", tmp_path / "copy")[:2] == (expected, size + 2)
    assert (tmp_path / "copy").read_bytes() == data + b"++"


def test_a_file_that_keeps_changing_is_not_copied_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"data")
    append_while_copying(tmp_path / "source", 1000, monkeypatch)
    with pytest.raises(BuildError, match="changes faster than it can be copied"):
        copied(tmp_path / "source", tmp_path / "copy")


def test_digest_leaves_the_position_alone(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with open(tmp_path / "x", "rb") as file:
        file.seek(1)
        assert digest(file.fileno()) == hashlib.sha256(b"abc").hexdigest()
        assert file.read() == b"bc"
