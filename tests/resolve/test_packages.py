from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stockade.resolve import PackageIndex

INFO = Path("/var/lib/dpkg/info")


@pytest.fixture(scope="module")
def index() -> PackageIndex:
    if not INFO.is_dir():
        pytest.skip("needs a Debian host, whose packages it reads")
    return PackageIndex.load()


def listing(root: Path, package: str, *paths: str, version: str = "1") -> None:
    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True, exist_ok=True)
    (info / f"{package}.list").write_bytes(b"".join(os.fsencode(path) + b"\n" for path in ("/.", *paths)))
    with (root / "var/lib/dpkg/status").open("a") as file:
        file.write(f"Package: {package.partition(':')[0]}\nStatus: install ok installed\nDescription: x\n y\n")
        file.write(f"Version: {version}\n\n")


@pytest.mark.parametrize("path", ["/bin/true", "/usr/bin/env", "/lib/x86_64-linux-gnu/libc.so.6", "/usr/bin/dpkg"])
def test_owner_and_version_are_dpkgs_own_answer(index: PackageIndex, path: str) -> None:
    real = os.path.realpath(path)
    found = index.owner(real)
    assert found is not None
    owned = [name for name in (real, real.removeprefix("/usr")) if subprocess.run(
        ["dpkg", "-S", name], capture_output=True, timeout=30).returncode == 0]  # fmt: skip
    theirs = subprocess.run(["dpkg", "-S", owned[0]], capture_output=True, text=True, timeout=30, check=True).stdout
    assert found[0] == theirs.split(":")[0]
    version = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}\n", found[0]], capture_output=True, text=True, timeout=30, check=True
    ).stdout.splitlines()
    assert found[1] in version


def test_nearly_every_program_and_library_of_the_host_has_an_owner(index: PackageIndex) -> None:
    paths = [
        entry.path
        for directory in ("/usr/bin", "/usr/sbin", "/usr/lib/x86_64-linux-gnu", "/usr/lib/python3")
        if os.path.isdir(directory)
        for entry in os.scandir(directory)
        if entry.is_file(follow_symlinks=False)
    ]
    known = sum(index.owner(path) is not None for path in paths)
    assert known / len(paths) >= 0.97


def test_the_whole_index_costs_little_more_than_the_lists_it_is_read_from(index: PackageIndex) -> None:
    del index

    def lists() -> None:
        for path in INFO.glob("*.list"):
            set(path.read_bytes().split(b"\n"))

    def once(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    taken = [(once(PackageIndex.load), once(lists)) for _ in range(5)]
    assert min(ours for ours, _ in taken) < 8 * min(plain for _, plain in taken)


def test_merged_usr_makes_one_path_of_two(tmp_path: Path) -> None:
    listing(tmp_path, "libc6:amd64", "/lib/x86_64-linux-gnu/libc.so.6", version="2.36-9")
    listing(tmp_path, "tool", "/usr/bin/tool")
    index = PackageIndex.load(str(tmp_path))
    assert index.owner("/usr/lib/x86_64-linux-gnu/libc.so.6") == ("libc6", "2.36-9")
    assert index.owner("/bin/tool") == ("tool", "1")
    assert index.owner("/usr/local/bin/tool") is None


@pytest.mark.parametrize(
    "compiled",
    [
        "/usr/lib/python3/dist-packages/a/__pycache__/b.cpython-311.pyc",
        "/usr/lib/python3/dist-packages/a/__pycache__/b.cpython-311.opt-1.pyc",
        "/usr/lib/python3/dist-packages/a/b.pyc",
    ],
)
def test_compiled_python_belongs_to_its_source(tmp_path: Path, compiled: str) -> None:
    listing(tmp_path, "python3-a", "/usr/lib/python3/dist-packages/a/b.py")
    assert PackageIndex.load(str(tmp_path)).owner(compiled) == ("python3-a", "1")


def test_a_diverted_file_belongs_to_who_diverted_it_and_its_new_name_to_the_old_owner(tmp_path: Path) -> None:
    listing(tmp_path, "old", "/usr/bin/tool")
    listing(tmp_path, "new", "/usr/bin/other")
    (tmp_path / "var/lib/dpkg/diversions").write_text("/usr/bin/tool\n/usr/bin/tool.old\nnew\n")
    index = PackageIndex.load(str(tmp_path))
    assert index.owner("/usr/bin/tool") == ("new", "1")
    assert index.owner("/usr/bin/tool.old") == ("old", "1")


def test_names_of_any_bytes_are_known(tmp_path: Path) -> None:
    name = os.fsdecode(b"/usr/share/a b;'\"\xff")
    listing(tmp_path, "odd", name)
    assert PackageIndex.load(str(tmp_path)).owner(name) == ("odd", "1")


def test_a_root_without_dpkg_knows_no_package(tmp_path: Path) -> None:
    assert PackageIndex.load(str(tmp_path)).owner("/usr/bin/tool") is None


def test_saved_index_answers_as_the_one_that_was_read(index: PackageIndex, tmp_path: Path) -> None:
    cache = tmp_path / "packages"
    PackageIndex.load(cache=cache)
    assert cache.exists()
    saved = PackageIndex.load(cache=cache)
    paths = [entry.path for directory in ("/usr/bin", "/usr/lib", "/etc") for entry in os.scandir(directory)]
    assert [saved.owner(path) for path in paths] == [index.owner(path) for path in paths]


def test_saved_index_is_made_anew_when_a_package_comes(tmp_path: Path) -> None:
    cache = tmp_path / "packages"
    listing(tmp_path, "one", "/opt/one")
    assert PackageIndex.load(str(tmp_path), cache=cache).owner("/opt/two") is None
    listing(tmp_path, "two", "/opt/two", version="2")
    assert PackageIndex.load(str(tmp_path), cache=cache).owner("/opt/two") == ("two", "2")
