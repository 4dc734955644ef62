from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
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


@pytest.mark.parametrize(
    "size", [0, 1, 4096, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 4096, 5_000_000]
)
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


def test_a_large_file_goes_to_the_disk_and_takes_no_memory(tmp_path: Path) -> None:
    if said("stat", "--file-system", "--format", "%T", str(tmp_path)) not in ("ext2/ext3", "xfs"):
        pytest.skip(f"`{tmp_path}` is on a file system that may keep it in memory: run with TMPDIR on ext4 or xfs")
    (tmp_path / "source").write_bytes(os.urandom(3_000_001))
    descriptor = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    with open(descriptor, "rb"):
        copy(str(tmp_path / "source"), descriptor)
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    assert int(said("fincore", "--bytes", "--noheadings", "--output", "PAGES", str(tmp_path / "copy"))) <= 1


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


@pytest.mark.parametrize("size", [1 << 18, 3_000_001])
def test_where_nothing_can_be_written_past_the_cache_the_copy_is_the_same(
    as_root: None, size: int, tmp_path: Path
) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    code = """
import hashlib, os, sys
from stockade.kernel.mount import MS_PRIVATE, MS_REC, mount
from stockade.kernel.namespaces import CLONE_NEWNS, unshare
from stockade.build.copying import copy
unshare(CLONE_NEWNS)
mount(None, "/", None, MS_REC | MS_PRIVATE)
mount("r", "/mnt", "ramfs")
try:
    os.open("/mnt/direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    sys.exit("ramfs has O_DIRECT here")
except OSError:
    pass
done = copy(sys.argv[1], os.open("/mnt/copy", os.O_CREAT | os.O_RDWR))
assert hashlib.sha256(open("/mnt/copy", "rb").read()).hexdigest() == done.sha256
print(done.sha256)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "source")], env={"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{hashlib.sha256(data).hexdigest()}\n", "")


def test_a_write_that_cannot_be_aligned_goes_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_BLOCK", 1)
    data = os.urandom(3_000_001)
    (tmp_path / "source").write_bytes(data)
    assert copied(tmp_path / "source", tmp_path / "copy")[0] == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "copy").read_bytes() == data


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


@pytest.mark.parametrize("size", [4, 300_000])
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
