"""What an ordinary user's run gets in place of files and directories of root's, judged by numbers of the host's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stockade.observe.standins import stand_ins
from stockade.records.trace import Access, Operation, Trace


def refused(operation: Operation, path: Path, error: str = "EACCES") -> Trace:
    return Trace(where="outside", accesses=(Access(path=str(path), operation=operation, error=error),))


@pytest.fixture
def others(as_root: None, tmp_path: Path) -> Path:
    """A directory and a file of another id's, in a directory of root's that `os.geteuid` is not told of."""
    directory = tmp_path / "state"
    directory.mkdir(mode=0o755)
    (directory / "log").write_text("kept")
    (directory / "log").chmod(0o640)
    for path in (directory, directory / "log"):
        os.chown(path, 33, 4)
    return directory


@pytest.mark.parametrize(
    ("operation", "name", "uid", "groups", "found"),
    [
        ("create", "new", 0, (0,), "directory"),
        ("mkdir", "new", 33, (33,), "directory"),
        ("unlink", "log", 0, (0,), "directory"),
        ("bind", "new", 0, (0,), "directory"),
        ("mkdir", "new", 34, (4,), ""),
        ("write", "log", 0, (0,), "file"),
        ("create", "log", 33, (33,), "file"),
        ("write", "log", 34, (4,), ""),
        ("chown", "", 0, (0,), "directory"),
        ("read", "log", 0, (0,), ""),
        ("mkdir", "none/new", 0, (0,), ""),
    ],
)
def test_what_the_ids_may_write_on_the_host_is_stood_in_for(
    others: Path, operation: Operation, name: str, uid: int, groups: tuple[int, ...], found: str
) -> None:
    seeds = stand_ins(refused(operation, others / name), uid=uid, groups=groups, seeded=())
    assert [seed.type for seed in seeds] == ([found] if found else [])
    for seed in seeds:
        assert (seed.uid, seed.gid) == (33, 4)
        assert seed.path == str(others if found == "directory" else others / "log")
        assert seed.content == (b"kept" if found == "file" else b"")


def test_what_was_stood_in_for_already_or_not_refused_is_left(others: Path) -> None:
    trace = refused("create", others / "new")
    assert stand_ins(trace, uid=0, groups=(), seeded={str(others)}) == ()
    assert stand_ins(refused("create", others / "new", ""), uid=0, groups=(), seeded=()) == ()
    assert stand_ins(refused("create", others / "new", "ENOSPC"), uid=0, groups=(), seeded=()) == ()


def test_a_place_is_found_behind_symlinks(others: Path) -> None:
    link = others.parent / "link"
    link.symlink_to(others)
    (seed,) = stand_ins(refused("create", link / "new"), uid=0, groups=(), seeded=())
    assert seed.path == str(others)
