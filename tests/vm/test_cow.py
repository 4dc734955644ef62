"""Copy-on-write files: made, read, merged, and refused when they are damaged."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from conftest import NewGuest, image_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stockade import machines
from stockade.errors import StateError
from stockade.records.guest import Guest
from stockade.records.image import Image
from stockade.vm import control, cow, sparse, store
from stockade.vm.start import stop


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base of 3 MB with some data."""
    path = tmp_path / "base"
    with open(path, "wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(os.urandom(5000))
    os.utime(path, (1234567890, 1234567890))
    return path


def test_new_file_takes_a_few_blocks_and_says_what_it_is_for(tmp_path: Path, base: Path) -> None:
    disk = tmp_path / "disk"
    made = cow.create(disk, backing="base", base=base)
    assert cow.read(disk) == made == cow.Header(backing="base", mtime=1234567890, size=3 << 20)
    assert sparse.allocated(disk) <= 65536
    assert list(cow.written_sectors(disk, made)) == []
    assert cow.written(disk) == 0


def test_header_is_the_one_that_uml_itself_writes(tmp_path: Path, base: Path) -> None:
    # uml_mkcow makes what the kernel's driver makes; only the place of the base differs: it writes it in full.
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    subprocess.run(["uml_mkcow", str(theirs), str(base)], check=True, capture_output=True, timeout=20)
    cow.create(ours, backing=str(base), base=base)
    assert ours.read_bytes()[:8192] == theirs.read_bytes()[:8192]
    assert cow.read(theirs) == cow.read(ours)


def test_merging_gives_what_uml_moo_gives(new_guest: NewGuest, image: Image, tmp_path: Path) -> None:
    guest = new_guest()
    machines.start_guest(guest.name).close()
    control.execute(guest.name, ["sh", "-c", "yes text | head -c 3000000 > /root/big; rm /etc/shadow; sync"])
    stop(guest.name)
    disk = store.disk(guest.name)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    cow.merge(disk, image_file(image), ours)
    subprocess.run(
        ["uml_moo", "-b", str(image_file(image)), str(disk), str(theirs)], check=True, capture_output=True, timeout=60
    )
    assert sparse.file_sha256(ours) == sparse.file_sha256(theirs)
    done = subprocess.run(["e2fsck", "-fn", str(ours)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_merging_takes_marked_sectors_from_the_disk_and_the_rest_from_the_base(tmp_path: Path, base: Path) -> None:
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    header = cow.create(disk, backing="base", base=base)
    sectors = {0, 7, 8, 2050, 6143}
    with open(disk, "r+b") as file:
        for sector in sectors:
            file.seek(8192 + sector // 8)
            old = file.read(1)[0]
            file.seek(8192 + sector // 8)
            file.write(bytes([old | 1 << sector % 8]))
            file.seek(header.data_start + sector * 512)
            file.write(bytes([sector % 251 + 1]) * 512)
    assert list(cow.written_sectors(disk, header)) == [(0, 1), (7, 9), (2050, 2051), (6143, 6144)]
    cow.merge(disk, base, whole)
    expected = bytearray(base.read_bytes())
    for sector in sectors:
        expected[sector * 512 : sector * 512 + 512] = bytes([sector % 251 + 1]) * 512
    assert whole.read_bytes() == bytes(expected)


@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (0, b"XXXX", "does not begin"),
        (4, struct.pack(">I", 2), "version 2"),
        (12, struct.pack(">Q", 0), "bytes cannot be"),
        (12, struct.pack(">Q", 1 << 60), "bytes cannot be"),
        (20, struct.pack(">I", 4096), "not known"),
        (24, struct.pack(">I", 0), "not known"),
    ],
)
def test_damaged_header_is_one_clear_error(tmp_path: Path, base: Path, offset: int, data: bytes, why: str) -> None:
    disk = tmp_path / "disk"
    cow.create(disk, backing="base", base=base)
    with open(disk, "r+b") as file:
        file.seek(offset)
        file.write(data)
    with pytest.raises(StateError, match=why) as error:
        cow.check(disk, base)
    assert error.value.hint


def test_truncated_file_is_one_clear_error(tmp_path: Path, base: Path) -> None:
    disk = tmp_path / "disk"
    cow.create(disk, backing="base", base=base)
    for size in (0, 100, 5000, 8192):
        os.truncate(disk, size)
        with pytest.raises(StateError, match="damaged"):
            cow.check(disk, base)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64), st.integers(0, 40))
def test_no_header_does_anything_but_raise_one_error(tmp_path: Path, base: Path, data: bytes, offset: int) -> None:
    disk = tmp_path / "fuzzed"
    disk.unlink(missing_ok=True)
    cow.create(disk, backing="base", base=base)
    with open(disk, "r+b") as file:
        file.seek(offset)
        file.write(data)
    try:
        header = cow.check(disk, base)
    except StateError:
        return
    assert sum(end - start for start, end in cow.written_sectors(disk, header)) <= header.size // 512


@pytest.mark.parametrize("change", ["time", "size", "missing"])
def test_disk_is_refused_once_its_base_has_changed(guest: Guest, change: str, tmp_path: Path) -> None:
    place = store.machine(guest.name) / "base"
    # A copy, so that the image in the store stays as it is.
    copy = tmp_path / "copy"
    shutil.copy2(place, copy)
    place.unlink()
    if change != "missing":
        shutil.move(copy, place)
    if change == "time":
        os.utime(place, (1, 1))
    elif change == "size":
        status = place.stat()
        os.truncate(place, status.st_size + 4096)
        os.utime(place, (status.st_mtime, status.st_mtime))
    with pytest.raises(StateError, match="changed after|is missing"):
        machines.start_guest(guest.name)
    assert not control.is_running(guest.name)


def test_damaged_disk_is_refused_before_anything_is_started(guest: Guest) -> None:
    os.truncate(store.disk(guest.name), 9000)
    with pytest.raises(StateError, match="damaged"):
        machines.start_guest(guest.name)
