"""The image store: whole or not at all, checked before use, the same for the same tree."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from machine import make_image, make_tree, needs, needs_uml, sha256

from stockade import places
from stockade.errors import NotFoundError, StateError, UsageError
from stockade.records.image import Image, ImageStart
from stockade.vm import filesystem, images, sparse, store

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A small file system in a file."""
    needs(("mke2fs", "e2fsprogs"))
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/motd").write_text("hello\n")
    filesystem.make(tmp_path / "root", tmp_path / "disk.ext4", name="disk")
    return tmp_path / "disk.ext4"


def test_the_same_tree_gives_the_same_image(empty_home: Path, tmp_path: Path) -> None:
    needs_uml()
    tree = make_tree(tmp_path / "root")
    one = make_image("one", tree)
    for path in tree.rglob("*"):
        os.utime(path, follow_symlinks=False)
    images.remove("one", [])
    assert make_image("one", tree).sha256 == one.sha256


def test_an_image_is_read_only_sparse_and_its_time_comes_from_its_contents(empty_home: Path, tmp_path: Path) -> None:
    needs_uml()
    image = make_image("one", make_tree(tmp_path / "root"))
    file = images.file("one")
    assert image.sha256 == sha256(file)
    status = file.stat()
    assert status.st_mode & 0o7777 == 0o444
    assert int(status.st_mtime) == image.mtime == images.pinned_time(image.sha256)
    assert sparse.allocated(file) < status.st_size / 2


def test_a_plain_image_is_imported_with_its_digest(empty_home: Path, disk: Path) -> None:
    image = images.add_file("one", disk, sha256=sha256(disk))
    assert image.sha256 == sha256(disk)
    assert image.quarantine
    assert image.start.init == "/sbin/init"


def _compressed(disk: Path, form: str) -> Path:
    target = disk.with_name(f"disk.{form}")
    if form == "xz":
        target.write_bytes(lzma.compress(disk.read_bytes(), preset=0))
    elif form == "gz":
        target.write_bytes(gzip.compress(disk.read_bytes(), 1))
    else:
        needs(("zstd", "zstd"))
        subprocess.run(["zstd", "-q", "-o", str(target), str(disk)], check=True, timeout=60)
    return target


@pytest.mark.parametrize("form", ("xz", "gz", "zst"))
@pytest.mark.parametrize("of", ("the file", "the image in it"))
def test_a_compressed_image_is_imported_with_either_digest(empty_home: Path, disk: Path, form: str, of: str) -> None:
    source = _compressed(disk, form)
    image = images.add_file("one", source, sha256=sha256(source if of == "the file" else disk))
    assert sha256(images.file("one")) == image.sha256 == sha256(disk)
    assert sparse.allocated(images.file("one")) < image.size


@pytest.mark.parametrize("form", ("xz", "gz", "zst"))
def test_a_compressed_image_that_is_cut_off_is_refused(empty_home: Path, disk: Path, form: str) -> None:
    source = _compressed(disk, form)
    os.truncate(source, source.stat().st_size // 2)
    with pytest.raises(StateError, match="is damaged"):
        images.add_file("one", source, sha256=None, unchecked=True)
    assert images.names() == [] and os.listdir(places.images()) == []


@pytest.mark.parametrize("form", ("xz", "gz", "zst"))
def test_a_damaged_compressed_image_is_refused(empty_home: Path, disk: Path, form: str) -> None:
    source = _compressed(disk, form)
    data = bytearray(source.read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 64):
        data[at] ^= 0xFF
    source.write_bytes(data)
    with pytest.raises(StateError, match="is damaged"):
        images.add_file("one", source, sha256=None, unchecked=True)
    assert os.listdir(places.images()) == []


def test_without_a_digest_an_import_is_refused(empty_home: Path, disk: Path) -> None:
    with pytest.raises(UsageError) as caught:
        images.add_file("one", disk, sha256=None)
    assert caught.value.hint is not None and "--unchecked" in caught.value.hint
    images.add_file("one", disk, sha256=None, unchecked=True)


def test_another_digest_is_refused_and_nothing_stays(empty_home: Path, disk: Path) -> None:
    with pytest.raises(StateError, match="is not what was asked for"):
        images.add_file("one", disk, sha256="0" * 64)
    assert os.listdir(places.images()) == []


@pytest.mark.parametrize("digest", ("", "abc", "g" * 64, "A" * 63))
def test_what_is_no_digest_is_a_usage_error(empty_home: Path, disk: Path, digest: str) -> None:
    with pytest.raises(UsageError, match="is no SHA-256"):
        images.add_file("one", disk, sha256=digest)


def test_what_is_no_file_system_is_refused(empty_home: Path, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(os.urandom(1 << 16))
    with pytest.raises(StateError, match="no ext4 file system") as caught:
        images.add_file("one", tmp_path / "junk", sha256=sha256(tmp_path / "junk"))
    assert caught.value.hint is not None and "partition table" in caught.value.hint
    assert os.listdir(places.images()) == []


@pytest.mark.parametrize("name", ("", "Upper", "../escape", "a/b", "a" * 64, ".hidden", "new\nline", "-option"))
def test_what_cannot_be_a_name_is_refused(empty_home: Path, disk: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name for an image"):
        images.add_file(name, disk, sha256=None, unchecked=True)
    assert not places.images().exists() or os.listdir(places.images()) == []


def test_a_second_image_of_one_name_is_refused(empty_home: Path, disk: Path) -> None:
    images.add_file("one", disk, sha256=sha256(disk))
    with pytest.raises(StateError, match="there is an image `one` already"):
        images.add_file("one", disk, sha256=sha256(disk))
    assert images.verify("one")


@pytest.mark.parametrize("form", ("", ".xz", ".gz", ".zst"))
def test_what_is_exported_can_be_imported_by_its_digest(empty_home: Path, disk: Path, tmp_path: Path, form: str) -> None:
    image = images.add_file("one", disk, sha256=sha256(disk))
    if form == ".zst":
        needs(("zstd", "zstd"))
    target = tmp_path / f"out{form}"
    assert images.export("one", target) == sha256(target)
    assert images.add_file("two", target, sha256=sha256(target)).sha256 == image.sha256


def test_an_export_never_overwrites(empty_home: Path, disk: Path, tmp_path: Path) -> None:
    images.add_file("one", disk, sha256=sha256(disk))
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        images.export("one", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_a_changed_file_is_noticed(empty_home: Path, disk: Path) -> None:
    images.add_file("one", disk, sha256=sha256(disk))
    images.file("one").chmod(0o644)
    with open(images.file("one"), "r+b") as file:
        file.seek(5000)
        file.write(b"intruder")
    with pytest.raises(StateError, match="was changed after the image was made"):
        images.load("one")


def test_a_change_that_hides_its_time_is_found_by_verify(empty_home: Path, disk: Path) -> None:
    image = images.add_file("one", disk, sha256=sha256(disk))
    assert images.verify("one")
    images.file("one").chmod(0o644)
    with open(images.file("one"), "r+b") as file:
        file.seek(5000)
        file.write(b"intruder")
    os.utime(images.file("one"), (image.mtime, image.mtime))
    assert not images.verify("one")


def test_a_damaged_record_is_a_clear_error(empty_home: Path, disk: Path) -> None:
    images.add_file("one", disk, sha256=sha256(disk))
    (places.images() / "one/image.json").write_text('{"name": 5}')
    with pytest.raises(StateError, match="the record of image `one` is damaged"):
        images.load("one")


def test_an_image_that_is_not_there_is_not_found(empty_home: Path) -> None:
    with pytest.raises(NotFoundError):
        images.load("nothing")
    with pytest.raises(NotFoundError):
        images.remove("nothing", [])


def test_an_image_with_guests_stays(empty_home: Path, disk: Path) -> None:
    images.add_file("one", disk, sha256=sha256(disk))
    with pytest.raises(StateError, match="is used by `web`"):
        images.remove("one", ["web"])
    images.remove("one", [])
    assert os.listdir(places.images()) == []


def test_all_devices_modes_and_owners_of_a_tree_come_into_the_image(empty_home: Path, tmp_path: Path) -> None:
    needs_uml()
    if os.geteuid() != 0:
        pytest.skip("run as root: files of other owners are made")
    tree = make_tree(tmp_path / "root")
    (tree / "srv/owned").write_text("x")
    os.chown(tree / "srv/owned", 33, 44)
    (tree / "srv/owned").chmod(0o4750)
    os.link(tree / "srv/owned", tree / "srv/second")
    os.mkfifo(tree / "srv/fifo")
    make_image("one", tree)
    from stockade.vm.ext4 import FileSystem

    with FileSystem(images.file("one")) as system:
        nodes = dict(system.walk())
    assert (nodes["/srv/owned"].uid, nodes["/srv/owned"].gid, nodes["/srv/owned"].mode & 0o7777) == (33, 44, 0o4750)
    assert nodes["/srv/owned"].inode == nodes["/srv/second"].inode
    assert nodes["/srv/fifo"].type == "special"
    assert nodes["/.stockade/init"].mode & 0o7777 == 0o755


KILLED = """
import os, signal, sys
from pathlib import Path
from stockade.vm import images
from stockade.records.image import Image
def fill(disk):
    disk.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
images.add("one", fill)
"""


def test_a_killed_import_leaves_nothing_that_the_next_does_not_sweep(empty_home: Path, disk: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": str(SOURCE)}, timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert images.names() == []
    assert len(os.listdir(places.images())) == 1
    images.add_file("one", disk, sha256=sha256(disk))
    assert os.listdir(places.images()) == ["one"]


def test_a_failed_fill_leaves_nothing(empty_home: Path) -> None:
    def fill(disk: Path) -> Image:
        disk.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        images.add("one", fill)
    assert os.listdir(places.images()) == []


def test_a_guests_base_outlives_a_forced_removal_of_its_image(empty_home: Path, tmp_path: Path) -> None:
    needs_uml()
    image = make_image("one", make_tree(tmp_path / "root"))
    store.create("web", image)
    try:
        images.remove("one", [])
        assert sha256(store.machine("web") / "base") == image.sha256
    finally:
        shutil.rmtree(places.guests())


def test_a_record_survives_reading_and_writing(empty_home: Path) -> None:
    image = Image(name="x", sha256="0" * 64, size=1, mtime=2, origin="jail", start=ImageStart(plan={"vm": "/p"}))
    assert msgspec.json.decode(msgspec.json.encode(image), type=Image) == image
