"""The image store: made the same each time, checked before use, carried away and back."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MEMORY, NewGuest, image_file

from stockade import machines, places
from stockade.errors import HostError, NotFoundError, StateError, UsageError
from stockade.records.image import Image, ImageStart
from stockade.vm import images, kernels, sparse, staging, store
from stockade.vm.ext4 import FileSystem


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Names of images that the test makes; they are removed."""
    made: list[str] = []
    yield made
    for name in made:
        if (places.images() / name).exists():
            images.remove(name, [])


def test_same_tree_gives_the_same_image_to_the_bit(tree: Path, image: Image, tmp_path: Path, names: list[str]) -> None:
    names += ["again"]
    # Another copy, made in another order at another time.
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in sorted(os.listdir(tree), reverse=True):
        staging.copy_tree(tree / name, copy / name)
    copy.chmod(tree.stat().st_mode & 0o7777)
    record = Image(name="again", sha256="", size=0, mtime=0, origin="directory")
    # The name is part of the file system: its label and its identity.
    other = staging.image_of("again", copy, record)
    images.remove("again", [])
    twice = staging.image_of("again", tree, record)
    assert other.sha256 == twice.sha256 != image.sha256


def test_image_is_sound_has_a_journal_and_is_sparse(image: Image) -> None:
    done = subprocess.run(
        ["e2fsck", "-fn", str(image_file(image))], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout
    features = subprocess.run(
        ["dumpe2fs", "-h", str(image_file(image))], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "has_journal" in features
    assert sparse.allocated(image_file(image)) < image.size


def test_digest_is_recorded_and_a_changed_image_is_refused(image: Image, new_guest: NewGuest, tmp_path: Path) -> None:
    assert images.verify("small")
    backup = tmp_path / "backup"
    shutil.copy2(image_file(image), backup)
    os.chmod(image_file(image), 0o644)
    try:
        with open(image_file(image), "r+b") as file:
            file.seek(5 << 20)
            file.write(b"changed")
        with pytest.raises(StateError, match="was changed"):
            images.load("small")
        # Somebody may set the time back: then the digest tells.
        os.utime(image_file(image), (image.mtime, image.mtime))
        assert not images.verify("small")
    finally:
        with open(backup, "rb") as good, open(image_file(image), "r+b") as file:
            shutil.copyfileobj(good, file)
        os.chmod(image_file(image), 0o444)
        os.utime(image_file(image), (image.mtime, image.mtime))
    assert images.verify("small")


def packed(source: Path, target: Path) -> Path:
    data = source.read_bytes()
    if target.suffix == ".gz":
        target.write_bytes(gzip.compress(data, 1))
    elif target.suffix == ".xz":
        target.write_bytes(lzma.compress(data, preset=0))
    elif target.suffix == ".zst":
        subprocess.run(["zstd", "-q", "-1", str(source), "-o", str(target)], check=True, timeout=60)
    else:
        target.write_bytes(data)
    return target


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_import_takes_each_form_and_gives_the_same_image(
    image: Image, tmp_path: Path, names: list[str], suffix: str
) -> None:
    names += ["imported"]
    source = packed(image_file(image), tmp_path / f"small.img{suffix}")
    published = hashlib.sha256(source.read_bytes()).hexdigest()
    taken = images.add_file("imported", source, sha256=published)
    assert (taken.sha256, taken.size, taken.quarantine) == (image.sha256, image.size, True)
    assert sparse.allocated(images.file("imported")) < taken.size


def test_import_takes_the_digest_of_the_image_within_too(image: Image, tmp_path: Path, names: list[str]) -> None:
    names += ["imported"]
    source = packed(image_file(image), tmp_path / "small.img.gz")
    assert images.add_file("imported", source, sha256=image.sha256).sha256 == image.sha256


def test_import_without_a_digest_is_refused_unless_told(image: Image, tmp_path: Path, names: list[str]) -> None:
    names += ["imported"]
    source = packed(image_file(image), tmp_path / "small.img")
    with pytest.raises(UsageError, match="no SHA-256"):
        images.add_file("imported", source, sha256=None)
    assert images.add_file("imported", source, sha256=None, unchecked=True).sha256 == image.sha256


@pytest.mark.parametrize("suffix", ["", ".zst", pytest.param(".gz", marks=pytest.mark.slow)])
def test_import_with_another_digest_leaves_nothing(image: Image, tmp_path: Path, suffix: str) -> None:
    source = packed(image_file(image), tmp_path / f"small.img{suffix}")
    with pytest.raises(StateError, match="not what was asked for"):
        images.add_file("imported", source, sha256="0" * 64)
    assert "imported" not in images.names()
    assert not list(places.images().glob(".new-*"))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_import_of_a_file_that_is_cut_off_leaves_nothing(image: Image, tmp_path: Path, suffix: str) -> None:
    source = packed(image_file(image), tmp_path / f"small.img{suffix}")
    os.truncate(source, source.stat().st_size // 2)
    with pytest.raises(StateError, match="damaged"):
        images.add_file("imported", source, sha256=None, unchecked=True)
    assert "imported" not in images.names()


def test_import_of_what_is_no_file_system_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(os.urandom(100000))
    with pytest.raises(StateError, match="no ext4"):
        images.add_file("imported", tmp_path / "noise", sha256=None, unchecked=True)
    assert "imported" not in images.names()


def test_first_boot_of_an_imported_image_has_no_network_and_a_disk_that_vanishes(
    image: Image, tmp_path: Path, names: list[str]
) -> None:
    names += ["imported"]
    source = packed(image_file(image), tmp_path / "small.img")
    taken = images.add_file("imported", source, sha256=image.sha256, start=ImageStart())
    store.create("first", taken, memory=MEMORY, walls=("vm",), network="publish")
    try:
        with pytest.raises(StateError, match="never been booted"):
            machines.start_guest("first")
        images.tried("imported")
        machines.start_guest("first").close()
    finally:
        machines.discard("first")


@pytest.mark.parametrize("suffix", ["", ".zst", ".gz", pytest.param(".xz", marks=pytest.mark.slow)])
def test_exported_image_can_be_imported_again(image: Image, tmp_path: Path, names: list[str], suffix: str) -> None:
    names += ["back"]
    target = tmp_path / f"out{suffix}"
    digest = images.export("small", target)
    assert digest == hashlib.sha256(target.read_bytes()).hexdigest()
    assert images.add_file("back", target, sha256=digest).sha256 == image.sha256
    with pytest.raises(FileExistsError):
        images.export("small", target)


def test_image_in_use_is_kept_and_its_guests_survive_when_it_goes(tree: Path, image: Image, names: list[str]) -> None:
    names += ["brief"]
    brief = staging.image_of("brief", tree, Image(name="brief", sha256="", size=0, mtime=0, origin="directory"))
    store.create("user", brief, memory=MEMORY, walls=("vm",))
    try:
        with pytest.raises(StateError, match="is used by `user`"):
            images.remove("brief", ["user"])
        images.remove("brief", [])
        assert (store.machine("user") / "base").stat().st_size == brief.size
    finally:
        machines.discard("user")
    with pytest.raises(NotFoundError):
        images.load("brief")


def test_module_that_no_kernel_has_is_refused_and_one_that_is_there_comes_with_what_it_needs(
    tree: Path, names: list[str]
) -> None:
    record = Image(name="modules", sha256="", size=0, mtime=0, origin="directory", source="tree")
    before = images.names()
    with pytest.raises(HostError, match="has the module `nosuchmodule`"):
        staging.image_of("modules", tree, record, modules=["overlay", "nosuchmodule"])
    assert images.names() == before
    if not kernels.modules(kernels.find()):
        pytest.skip("the kernel here has no modules: install Debian's user-mode-linux")
    names.append("modules")
    staging.image_of("modules", tree, record, modules=["ipip"])
    with FileSystem(images.file("modules")) as disk:
        found = [Path(path).name for path, _ in disk.walk() if path.endswith(".ko")]
    tunnel, needed, also = (
        next(name for name in found if name.endswith(f"-{part}.ko")) for part in ("ipip", "ip_tunnel", "tunnel4")
    )
    assert max(needed, also) < tunnel  # they are loaded in the order of their names


def test_image_that_does_not_fit_says_so_and_leaves_nothing(tree: Path) -> None:
    record = Image(name="tight", sha256="", size=0, mtime=0, origin="directory")
    with pytest.raises(StateError, match="no file system of"):
        staging.image_of("tight", tree, record, size=1 << 20)
    assert "tight" not in images.names()
    assert not list(places.images().glob(".new-*"))
