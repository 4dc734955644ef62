from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from stockade.kernel.beneath import RESOLVE_IN_ROOT, RESOLVE_NO_SYMLINKS, Root, openat2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root, with a secret beside it and links that point there."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("outside")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/file").write_text("inside")
    (root / "absolute").symlink_to(tmp_path / "outside")
    (root / "climbing").symlink_to("../outside")
    (root / "to-etc").symlink_to("/etc")
    return root


def test_links_are_followed_as_chroot_would(tree: Path) -> None:
    with Root.open(tree) as root:
        descriptor = root.openat("/to-etc/../../../etc/file", os.O_RDONLY, follow=True)
        with open(descriptor) as file:
            assert file.read() == "inside"


@pytest.mark.parametrize("path", ["absolute/secret", "climbing/secret", "../outside/secret", "/../outside/secret"])
def test_no_path_leaves_the_root(tree: Path, path: str) -> None:
    with Root.open(tree) as root, pytest.raises(FileNotFoundError):
        root.openat(path, os.O_RDONLY, follow=True)


@pytest.mark.parametrize("path", ["absolute/new", "climbing/new", "to-etc/new"])
def test_nothing_is_made_behind_a_link(tree: Path, path: str) -> None:
    with Root.open(tree) as root:
        for make in (root.create, root.mkdirat, lambda name: root.symlinkat("x", name)):
            with pytest.raises(OSError, match="symbolic links") as caught:
                make(path)
            assert caught.value.errno == errno.ELOOP
    assert os.listdir(tree.parent / "outside") == ["secret"]


def test_a_link_in_a_files_place_is_not_written_through(tree: Path) -> None:
    (tree / "etc/link").symlink_to(tree.parent / "outside/secret")
    with Root.open(tree) as root, pytest.raises(FileExistsError):
        root.create("/etc/link")
    assert (tree.parent / "outside/secret").read_text() == "outside"


def test_directories_are_made_component_by_component(tree: Path) -> None:
    with Root.open(tree) as root:
        root.makedirs("/etc/a/b")
        root.makedirs("etc/a/b")
    assert (tree / "etc/a/b").is_dir()


def test_an_error_names_the_path(tree: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, Root.open(tree) as root:
        root.openat("nothing/here", os.O_RDONLY)
    assert caught.value.filename == "nothing/here"


def test_descriptors_are_closed_on_exec_and_none_is_left(tree: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Root.open(tree) as root:
        for number in range(3):
            root.mkdirat(f"/etc/{number}")
            root.mkdirat(f"/etc/{number}/below")
        descriptor = root.openat("etc", os.O_RDONLY)
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_resolve_flags_reach_the_kernel(tree: Path) -> None:
    descriptor = os.open(tree, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            openat2(descriptor, "to-etc", os.O_RDONLY, resolve=RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)
        with pytest.raises(ValueError, match="null byte"):
            openat2(descriptor, "a\0b", os.O_RDONLY)
    finally:
        os.close(descriptor)
