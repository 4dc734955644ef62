"""A tree is removed whatever its maker thought of, and nothing beside it."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from stockade.kernel.removal import remove_tree

DEEP = 1200


def deep(path: Path, levels: int) -> None:
    """Directories within directories, deeper than any path can name."""
    path.mkdir()
    at = os.open(path, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("x", dir_fd=at)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        inner = os.open("x", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)


@pytest.mark.slow
def test_tree_deeper_than_any_path_is_removed_with_a_few_descriptors(tmp_path: Path) -> None:
    deep(tmp_path / "tree", DEEP)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, before[1]))
    try:
        remove_tree(tmp_path / "tree")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == used


def test_every_type_and_a_wide_directory_is_removed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a/b/c").mkdir(parents=True)
    for number in range(500):
        (tree / f"a/{number}").write_bytes(b"")
    for number in range(100):
        (tree / f"a/b/d{number}/e").mkdir(parents=True)
    os.mkfifo(tree / "fifo")
    (tree / os.fsdecode(b"\xff\n")).write_bytes(b"")
    remove_tree(tree)
    assert os.listdir(tmp_path) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(b"")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(kept)
    (tree / "up").symlink_to("..")
    remove_tree(tree)
    (tmp_path / "link").symlink_to(kept)
    remove_tree(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["kept"]
    assert os.listdir(kept) == ["file"]


def test_what_is_not_there_is_removed_already(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")


def test_directories_that_their_owner_closed_are_removed_by_their_owner(tmp_path: Path) -> None:
    (tmp_path / "tree/closed/inner").mkdir(parents=True)
    (tmp_path / "tree/closed/inner/file").write_bytes(b"")
    for name in ("tree/closed/inner", "tree/closed", "tree"):
        (tmp_path / name).chmod(0)
    code = (
        "import sys; from pathlib import Path; from stockade.kernel.removal import remove_tree\n"
        "remove_tree(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tree")]
    if os.geteuid() == 0:
        for path in (tmp_path, tmp_path / "tree", tmp_path / "tree/closed", tmp_path / "tree/closed/inner"):
            os.chown(path, 4242, 4242)
        for path in tmp_path.parents:
            if path.stat().st_mode & 0o001 == 0:
                path.chmod(path.stat().st_mode | 0o111)
        command = ["setpriv", "--reuid=4242", "--regid=4242", "--clear-groups", *command]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == []


def test_directory_that_is_moved_away_meanwhile_is_an_error_and_nothing_above_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    (tree / "one/two").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "one").mkdir()
    unlink = os.unlink

    def move(name: str, *, dir_fd: int) -> None:
        os.rename(tree / "one", elsewhere / "moved")
        unlink(name, dir_fd=dir_fd)

    (tree / "one/two/file").write_bytes(b"")
    monkeypatch.setattr(os, "unlink", move)
    with pytest.raises(OSError, match="Stale") as caught:
        remove_tree(tree)
    assert caught.value.errno == errno.ESTALE
    assert (elsewhere / "one").is_dir()
