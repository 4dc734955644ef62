"""The reader of ext4 sees what debugfs(8) and the tree say, and no damage makes it do anything but complain."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from machine import needs, sha256

from stockade.errors import HostError, StateError
from stockade.vm import filesystem
from stockade.vm.ext4 import FileSystem


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs(("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs"))
    root: Path = tmp_path_factory.mktemp("ext4") / "root"
    (root / "deep/er/down").mkdir(parents=True)
    (root / "empty").write_bytes(b"")
    (root / "small").write_bytes(b"text\n")
    (root / "large").write_bytes(random.Random(5).randbytes(3_000_001))
    with open(root / "holes", "wb") as file:
        file.write(b"begin")
        file.truncate(9 << 20)
        file.seek(8 << 20)
        file.write(b"end")
    (root / "many").mkdir()
    for number in range(1500):  # more than one block of names: an index in the directory
        (root / f"many/name-{number:05}-{'x' * 30}").write_bytes(b"")
    (root / "short").symlink_to("small")
    (root / "long").symlink_to("/" + "y" * 200)
    (root / os.fsdecode(b"\xff odd\nname")).write_bytes(b"odd")
    (root / "setuid").write_bytes(b"s")
    (root / "setuid").chmod(0o4755)
    os.mkfifo(root / "fifo")
    for directory, below, files in os.walk(root):
        for name in (*below, *files):
            os.utime(os.path.join(directory, name), (1_000_000_000, 1_000_000_000), follow_symlinks=False)
    return root


@pytest.fixture(scope="module")
def image(tree: Path) -> Path:
    target = tree.parent / "image"
    filesystem.make(tree, target, name="test")
    return target


def test_every_path_type_mode_size_and_target_is_that_of_the_tree(tree: Path, image: Path) -> None:
    with FileSystem(image) as system:
        found = {path: node for path, node in system.walk() if not path.startswith("/lost+found")}
    expected = {}
    for directory, below, files in os.walk(tree):
        for name in (*below, *files):
            path = Path(directory) / name
            expected[f"/{path.relative_to(tree)}"] = path
    assert set(found) - {"/"} == set(expected)
    for name, path in expected.items():
        status = path.lstat()
        assert found[name].mode == status.st_mode, name
        assert (found[name].uid, found[name].gid) == (status.st_uid, status.st_gid)
        if found[name].type == "file":
            assert found[name].size == status.st_size, name
        if found[name].type == "symlink":
            assert found[name].target == os.readlink(path)


def test_contents_are_those_of_the_tree(tree: Path, image: Path) -> None:
    with FileSystem(image) as system:
        nodes = dict(system.walk())
        for name in ("empty", "small", "large", "holes"):
            assert system.read(nodes[f"/{name}"]) == (tree / name).read_bytes(), name
        assert system.text("/short") in ("", "text\n")
        assert system.text("/small") == "text\n"
        assert system.text("/not/there") == ""


def test_debugfs_agrees_about_a_file(image: Path) -> None:
    done = subprocess.run(
        ["debugfs", "-R", "stat /large", str(image)], capture_output=True, text=True, timeout=20, check=True
    )
    with FileSystem(image) as system:
        node = dict(system.walk())["/large"]
    assert f"Inode: {node.inode} " in done.stdout
    assert f"Size: {node.size}" in done.stdout
    first = node.extents[0][2]
    assert f"{first}-" in done.stdout


def test_the_same_tree_gives_the_same_file_system_at_another_time(tree: Path, image: Path, tmp_path: Path) -> None:
    for path in tree.rglob("*"):  # reading changes its time of access, and this its time of change
        os.utime(path, (1_000_000_000, 1_000_000_000), follow_symlinks=False)
    time.sleep(1.1)
    filesystem.make(tree, tmp_path / "again", name="test")
    assert sha256(tmp_path / "again") == sha256(image)


def test_a_new_file_system_is_sound_has_a_journal_and_holes(image: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    features = subprocess.run(["dumpe2fs", "-h", str(image)], capture_output=True, text=True, timeout=20, check=True)
    assert "has_journal" in features.stdout
    assert image.stat().st_blocks * 512 < image.stat().st_size / 2


def test_a_size_that_is_too_small_is_refused_and_nothing_stays(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        filesystem.make(tree, tmp_path / "small", name="small", size=2 << 20)
    assert caught.value.hint is not None and "--size" in caught.value.hint
    assert not (tmp_path / "small").exists()


def test_owners_can_be_given_afterwards(image: Path, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(image.read_bytes())
    filesystem.give(tmp_path / "image", {"/small": (33, 44)})
    with FileSystem(tmp_path / "image") as system:
        node = dict(system.walk())["/small"]
    assert (node.uid, node.gid) == (33, 44)


def test_an_owner_for_what_is_not_there_is_an_error(image: Path, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(image.read_bytes())
    with pytest.raises(StateError, match="owners could not be written"):
        filesystem.give(tmp_path / "image", {"/nowhere": (33, 44)})


def _read_all(path: Path) -> None:
    with FileSystem(path) as system:
        for name, node in system.walk():
            if node.type == "file" and node.size < 1 << 24:
                system.read(node)
            system.text(name)


@pytest.mark.parametrize("size", (0, 1024, 2048, 100_000, 1_000_000))
def test_a_file_system_that_is_cut_off_is_a_clear_error(image: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "image").write_bytes(image.read_bytes()[:size])
    with pytest.raises(StateError, match="is damaged"):
        _read_all(tmp_path / "image")


def test_damage_anywhere_in_its_structure_ends_in_time_with_contents_or_a_clear_error(tmp_path: Path) -> None:
    needs(("mke2fs", "e2fsprogs"))
    root = tmp_path / "root"
    (root / "directory").mkdir(parents=True)
    (root / "directory/file").write_bytes(b"x" * 10000)
    (root / "link").symlink_to("directory/file")
    filesystem.make(root, tmp_path / "image", name="fuzzed")
    whole = (tmp_path / "image").read_bytes()
    with FileSystem(tmp_path / "image") as system:
        nodes = [system.node(2), *(node for _, node in system.walk())]
    directories = {block * 4096 for node in nodes if node.type == "directory" for _, _, block in node.extents}
    # The superblock, the descriptors of groups, the first inodes, names in directories: where they hold anything.
    places = (range(1024, 2048, 4), range(4096, 4160, 4), *(range(at, at + 64, 4) for at in directories))
    used = [at for place in places for at in place]
    used += [at for at in range(2048, len(whole) // 4, 4) if whole[at : at + 4] != bytes(4)][:4000]
    chance = random.Random(7)
    complained = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice(used)
            data[at : at + 4] = chance.choice((chance.randbytes(4), b"\xff\xff\xff\xff", b"\0\0\0\0"))
        (tmp_path / "hostile").write_bytes(data)
        try:
            _read_all(tmp_path / "hostile")
        except StateError as error:
            complained += 1
            assert "file system in" in error.message
    assert complained


def test_a_directory_that_contains_itself_is_walked_once(tmp_path: Path) -> None:
    needs(("mke2fs", "e2fsprogs"))
    root = tmp_path / "root"
    (root / "one/two").mkdir(parents=True)
    filesystem.make(root, tmp_path / "image", name="loop")
    subprocess.run(
        ["debugfs", "-w", "-R", "link /one /one/two/again", str(tmp_path / "image")],
        capture_output=True, timeout=20, check=True,
    )  # fmt: skip
    with FileSystem(tmp_path / "image") as system:
        assert sorted(path for path, _ in system.walk()) == ["/lost+found", "/one", "/one/two", "/one/two/again"]


def test_without_mke2fs_the_package_is_named(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("mke2fs")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(HostError) as caught:
        filesystem.make(tree, tmp_path / "image", name="none")
    assert caught.value.hint == "`apt-get install e2fsprogs`"
