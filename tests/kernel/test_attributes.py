"""The hint to ext4 that the trees of a directory are to lie apart, as lsattr(1) reads it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from stockade.kernel.attributes import spread_apart


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def flags(directory: Path) -> str:
    return said("lsattr", "-d", directory).split()[0]


def test_directory_becomes_a_top_one_and_keeps_its_other_attributes(tmp_path: Path) -> None:
    if said("stat", "--file-system", "--format", "%T", tmp_path).strip() != "ext2/ext3":
        pytest.skip(f"`{tmp_path}` is not on ext4: run with TMPDIR on one")
    said("chattr", "+d", tmp_path)
    assert "T" not in flags(tmp_path)
    for _ in range(2):
        spread_apart(tmp_path)
        assert {"T", "d"} <= set(flags(tmp_path))
    (tmp_path / "tree").mkdir()
    assert "T" not in flags(tmp_path / "tree")


def test_where_the_file_system_knows_no_such_nothing_happens() -> None:
    spread_apart("/proc/self")
