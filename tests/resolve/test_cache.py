from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.resolve.cache import Cache

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
