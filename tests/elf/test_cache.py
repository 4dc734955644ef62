from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.elf.cache import Cache, CacheEntry, encode

HOST = Path("/etc/ld.so.cache")


def test_the_hosts_cache_has_what_ldconfig_prints() -> None:
    if not HOST.exists():
        pytest.skip("needs a host with /etc/ld.so.cache; run `ldconfig`")
    printed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=30, check=True).stdout
    lines = re.findall(r"^\t(\S+) \([^)]*\) => (.+)$", printed, re.MULTILINE)
    cache = Cache(HOST.read_bytes())
    assert len(lines) > 10
    for name, path in lines:
        assert path in [entry.path for entry in cache.entries(name)]


def test_hardware_subdirectories_are_told_by_name(tmp_path: Path) -> None:
    """ldconfig itself writes the cache: a plain library and one for x86-64-v3."""
    lib = tmp_path / "usr/lib"
    fast = lib / "glibc-hwcaps/x86-64-v3"
    fast.mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.conf").write_text("/usr/lib\n")
    data = Path("/lib/x86_64-linux-gnu/libz.so.1").resolve().read_bytes()
    for directory in (lib, fast):
        (directory / "libz.so.1").write_bytes(data)
    subprocess.run(["/sbin/ldconfig", "-r", tmp_path, "-X"], check=True, timeout=30)
    entries = Cache((tmp_path / "etc/ld.so.cache").read_bytes()).entries("libz.so.1")
    assert {(entry.path, entry.hwcaps) for entry in entries} == {
        ("/usr/lib/glibc-hwcaps/x86-64-v3/libz.so.1", "x86-64-v3"),
        ("/usr/lib/libz.so.1", ""),
    }


def test_the_new_format_is_found_behind_the_old_one() -> None:
    if not HOST.exists():
        pytest.skip("needs a host with /etc/ld.so.cache; run `ldconfig`")
    old = b"ld.so-1.7.0\0" + (3).to_bytes(4, "little") + bytes(3 * 12)
    padded = old + bytes(-len(old) % 8)
    name = "libc.so.6"
    assert Cache(padded + HOST.read_bytes()).entries(name) == Cache(HOST.read_bytes()).entries(name) != []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_a_damaged_cache_has_no_entries_or_sound_ones(data: bytes) -> None:
    Cache(data)
    for entry in Cache(b"glibc-ld.so.cache1.1" + data).entries("libc.so.6"):
        assert entry.path


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8))
def test_a_mutated_real_cache_never_raises(position: int, patch: bytes) -> None:
    data = bytearray(HOST.read_bytes() if HOST.exists() else b"glibc-ld.so.cache1.1" + bytes(64))
    position %= len(data)
    data[position : position + len(patch)] = patch
    assert isinstance(Cache(bytes(data)).entries(os.fsdecode(b"libc.so.6")), list)


def printed(cache: bytes, directory: Path) -> list[str]:
    """What ldconfig reads in a cache, in the file's order."""
    file = directory / "printed.cache"
    file.write_bytes(cache)
    command = ["/sbin/ldconfig", "-p", "-C", file]
    done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    return re.findall(r"^\t.*$", done.stdout.decode("utf-8", "surrogateescape"), re.MULTILINE)


def names(cache: bytes) -> list[str]:
    return list(dict.fromkeys(os.fsdecode(name) for name in Cache(cache)._last))


def test_the_hosts_cache_is_written_as_ldconfig_wrote_it(tmp_path: Path) -> None:
    if not HOST.exists():
        pytest.skip("needs a host with /etc/ld.so.cache; run `ldconfig`")
    host = HOST.read_bytes()
    known = names(host)
    random.Random(1).shuffle(known)
    ours = encode((name, entry) for name in known for entry in Cache(host).entries(name))
    assert printed(ours, tmp_path) == printed(host, tmp_path) != []


def test_names_stand_in_the_order_that_the_linkers_search_needs(tmp_path: Path) -> None:
    """By ldconfig itself, on libraries without a SONAME: those have the name of their file."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.conf").write_text("")
    lib = tmp_path / "usr/lib"
    (lib / "glibc-hwcaps/x86-64-v3").mkdir(parents=True)
    compiling = ["cc", "-shared", "-nostdlib", "-x", "c", "/dev/null", "-o", tmp_path / "bare"]
    subprocess.run(compiling, timeout=60, check=True)
    bare = (tmp_path / "bare").read_bytes()
    parts = ("", "a", "b", "9", "10", "1a", "1.2", "a1", "-", "_", "Z", "4294967298", "\u00e9")
    wanted = sorted({f"lib{first}{second}.so" for first in parts for second in parts if len(first + second) < 12})
    for name in wanted:
        (lib / name).write_bytes(bare)
    for name in ("liba.so", "lib9.so"):
        (lib / "glibc-hwcaps/x86-64-v3" / name).write_bytes(bare)
    subprocess.run(["/sbin/ldconfig", "-r", tmp_path, "-X", "-i"], check=True, timeout=30, capture_output=True)
    theirs = (tmp_path / "etc/ld.so.cache").read_bytes()
    libraries = [(name, CacheEntry(0x0303, f"/usr/lib/{name}", "")) for name in wanted]
    libraries += [
        (name, CacheEntry(0x0303, f"/usr/lib/glibc-hwcaps/x86-64-v3/{name}", "x86-64-v3"))
        for name in ("liba.so", "lib9.so")
    ]
    ours = encode(libraries)
    assert printed(ours, tmp_path) == printed(theirs, tmp_path)
    assert len(printed(ours, tmp_path)) == len(libraries)


def test_an_empty_cache_is_one() -> None:
    assert Cache(encode([])).entries("libc.so.6") == []


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8),
            st.builds(CacheEntry, st.integers(0, 0xFFFF), st.sampled_from(["/a", "/b/c"]), st.sampled_from(["", "v2"])),
        )
    )
)
def test_what_was_written_is_read(libraries: list[tuple[str, CacheEntry]]) -> None:
    cache = Cache(encode(libraries))
    for name, entry in libraries:
        found = cache.entries(name)
        assert entry in found
        assert sorted(found) == sorted(entry for known, entry in libraries if known == name)
