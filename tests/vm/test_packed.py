"""A stream of files that a guest made up ends in one clear error, and nothing of it is outside of the target."""

from __future__ import annotations

import io
import os
import random
import struct
from pathlib import Path

import pytest

from stockade.errors import StateError
from stockade.vm import packed

MOST = 1 << 20


def entry(kind: bytes, name: bytes = b"", mode: int = 0o644) -> bytes:
    return struct.pack(">cBHH", kind, 0, mode, len(name)) + name


def file(name: bytes, contents: bytes = b"x") -> bytes:
    return entry(b"f", name) + struct.pack(">Q", len(contents)) + contents + bytes(8)


def link(name: bytes, target: bytes) -> bytes:
    return entry(b"l", name) + struct.pack(">H", len(target)) + target


TOP, END = entry(b"d", mode=0o755), entry(b"e")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory beside the target that nothing may reach."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").write_text("untouched")
    return tmp_path / "victim"


def outside(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "target" not in path.parts)


@pytest.mark.parametrize(
    "entries",
    [
        file(b"../victim/new"),
        file(b"/../../victim/new"),
        file(b"a/../../victim/new"),
        link(b"a", b"../victim") + file(b"a/new"),
        link(b"a", b"/") + entry(b"d", b"a/etc-of-somebody"),
        link(b"a", b"../victim/file") + file(b"a"),
        entry(b"d", b"b") + link(b"b/c", b"../../victim") + file(b"b/c/new"),
        file(b"missing/new"),
        file(b"a") + file(b"a"),
        file(b"a") + file(b"a/b"),
        file(b".."),
        file(b""),
        entry(b"d", b"."),
        file(b"n\0ul"),
        entry(b"p", b"pipe"),
        entry(b"f", b"x" * 5000),
        file(b"y" * 300),
        entry(b"f", b"large") + struct.pack(">Q", MOST + 1),
        entry(b"f", b"large") + struct.pack(">Q", 1 << 63 | (1 << 62)),
    ],
)
def test_entry_that_leads_out_or_has_no_place_is_refused(tmp_path: Path, victim: Path, entries: bytes) -> None:
    before = outside(tmp_path)
    try:
        packed.unpack(io.BytesIO(TOP + entries + END), tmp_path / "target", most=MOST)
    except StateError as error:
        assert "cannot be read" in error.message
    else:
        # `..` stops at the target, as it does at a root.
        assert b".." in entries
    assert outside(tmp_path) == before
    assert (victim / "file").read_text() == "untouched"


def test_links_are_made_and_never_followed(tmp_path: Path, victim: Path) -> None:
    packed.unpack(io.BytesIO(TOP + link(b"a", os.fsencode(victim)) + END), tmp_path / "target", most=MOST)
    assert os.readlink(tmp_path / "target/a") == str(victim)


@pytest.fixture
def stream(tmp_path: Path) -> bytes:
    """Of a small tree."""
    root = tmp_path / "source"
    (root / "sub").mkdir(parents=True)
    (root / "sub/file").write_bytes(b"contents" * 10)
    with open(root / "holes", "wb") as sparse:
        sparse.truncate(1 << 16)
        os.pwrite(sparse.fileno(), b"end", (1 << 16) - 3)
    (root / "link").symlink_to("sub/file")
    gathered = bytearray()
    assert packed.pack(root, gathered.extend) == 2
    return bytes(gathered)


def test_stream_that_is_cut_off_anywhere_is_one_clear_error(tmp_path: Path, stream: bytes) -> None:
    for length in range(0, len(stream), 7):
        with pytest.raises(StateError, match="cut off"):
            packed.unpack(io.BytesIO(stream[:length]), tmp_path / f"target{length}", most=MOST)


def test_no_damage_does_anything_but_raise_one_error(tmp_path: Path, stream: bytes) -> None:
    chance = random.Random(3)
    refused = 0
    for number in range(300):
        data = bytearray(stream)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            packed.unpack(io.BytesIO(bytes(data)), tmp_path / f"target{number}", most=MOST)
        except StateError:
            refused += 1
    assert refused
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("target")} == {"source"}


def test_more_than_was_said_is_refused(tmp_path: Path, stream: bytes) -> None:
    with pytest.raises(StateError, match="more than was said"):
        packed.unpack(io.BytesIO(stream), tmp_path / "target", most=60)


def test_directories_get_their_modes_after_what_is_in_them(tmp_path: Path) -> None:
    data = entry(b"d", mode=0o500) + entry(b"d", b"a", 0o511) + file(b"a/b") + END
    assert packed.unpack(io.BytesIO(data), tmp_path / "target", most=MOST) == 1
    modes = [(tmp_path / name).stat().st_mode & 0o7777 for name in ("target", "target/a", "target/a/b")]
    assert modes == [0o500, 0o511, 0o644]
