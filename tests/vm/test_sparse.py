"""Files with holes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from stockade.vm import sparse


def make(path: Path, *, written_zeros: bool) -> None:
    with open(path, "wb") as file:
        file.truncate(64 << 20)
        for offset in (0, 5 << 20, (40 << 20) + 123):
            file.seek(offset)
            file.write(b"data" * 1000)
        if written_zeros:
            file.seek(20 << 20)
            file.write(bytes(1 << 20))


def test_copy_has_the_same_bytes_and_as_few_blocks(tmp_path: Path) -> None:
    make(tmp_path / "a", written_zeros=True)
    with open(tmp_path / "a", "rb", buffering=0) as source, open(tmp_path / "b", "xb", buffering=0) as target:
        assert sparse.copy(source.fileno(), target.fileno()) == 64 << 20
    subprocess.run(["cmp", str(tmp_path / "a"), str(tmp_path / "b")], check=True, timeout=30)
    assert sparse.allocated(tmp_path / "b") < sparse.allocated(tmp_path / "a") < 4 << 20


def test_digest_is_of_the_contents_and_not_of_the_holes(tmp_path: Path) -> None:
    make(tmp_path / "a", written_zeros=False)
    make(tmp_path / "b", written_zeros=True)
    assert sparse.digest(tmp_path / "a") == sparse.digest(tmp_path / "b")
    with open(tmp_path / "b", "r+b") as file:
        file.seek(30 << 20)
        file.write(b"x")
    assert sparse.digest(tmp_path / "a") != sparse.digest(tmp_path / "b")
    os.truncate(tmp_path / "a", (64 << 20) + 1)
    make(tmp_path / "c", written_zeros=False)
    assert sparse.digest(tmp_path / "a") != sparse.digest(tmp_path / "c")


def test_sha256_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name, size in (("empty", 0), ("hole", 3 << 20), ("odd", 1_234_567)):
        path = tmp_path / name
        path.write_bytes(b"")
        os.truncate(path, size)
        if name == "odd":
            with open(path, "r+b") as file:
                file.seek(600_000)
                file.write(os.urandom(10))
        done = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, timeout=30, check=True)
        assert sparse.file_sha256(path) == done.stdout.split()[0]
