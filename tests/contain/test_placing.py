"""Mounts, volumes and tmpfs in one another: the outer one comes first, whatever the order of the spec."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Builder, output

from stockade.errors import SpecError
from stockade.records.lock import LockDirectory

RUN = LockDirectory(path="/run", mode=0o755)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Two directories of the host, the second with a place for the first, and a file."""
    for name, mode in (("inner", 0o777), ("outer", 0o755), ("outer/place", 0o755), ("outer/data", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "inner/in").write_text("inner\n")
    (tmp_path / "outer/out").write_text("outer\n")
    (tmp_path / "file").write_text("a file\n")
    return tmp_path


def mount(source: Path, target: str) -> dict[str, object]:
    return {"source": str(source), "target": target}


def test_mount_in_a_mount_that_is_named_first_is_not_hidden(jail: Builder, host: Path) -> None:
    jail(spec={"mounts": [mount(host / "inner", "/mnt/place"), mount(host / "outer", "/mnt")]})
    assert output("test", "/bin/cat", "/mnt/out", "/mnt/place/in") == (0, "outer\ninner\n", "")


def test_volume_in_a_mount_is_not_hidden(jail: Builder, host: Path) -> None:
    jail(spec={"mounts": [mount(host / "outer", "/var/lib")]},
         directories=(LockDirectory(path="/var/lib/data", mode=0o755, volume="data"),))  # fmt: skip
    assert output("test", "/bin/cat", "/var/lib/out", "/var/lib/data/seed") == (0, "outer\nfrom the rootfs\n", "")
    assert list((host / "outer/data").iterdir()) == []


def test_mounts_on_a_tmpfs_find_their_places_made(jail: Builder, host: Path) -> None:
    jail(spec={"mounts": [mount(host / "file", "/run/a/b/file"), mount(host / "inner", "/run/c/inner")]},
         directories=(RUN,))  # fmt: skip
    assert output("test", "/bin/cat", "/run/a/b/file", "/run/c/inner/in") == (0, "a file\ninner\n", "")


def test_nothing_is_made_in_a_mount_on_a_tmpfs(jail: Builder, host: Path) -> None:
    jail(spec={"mounts": [mount(host / "outer", "/run/c")]},
         directories=(RUN, LockDirectory(path="/run/c/place", mode=0o700)))  # fmt: skip
    assert output("test", "/bin/cat", "/run/c/out") == (0, "outer\n", "")
    assert (host / "outer/place").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("size", [0, 8 << 20])
def test_volume_on_a_tmpfs_needs_no_place_in_the_rootfs(jail: Builder, size: int) -> None:
    jail(directories=(RUN, LockDirectory(path="/run/kept", mode=0o750, uid=33, gid=33, volume="kept", size=size)))
    assert output("test", "/bin/stat", "-c", "%a %u", "/run/kept") == (0, "750 33\n", "")
    output("test", "/bin/touch", "/run/kept/word", user="www")
    assert "word" in output("test", "/bin/ls", "/run/kept", user="www")[1]


def test_mount_in_a_volume_on_a_tmpfs_works_again_and_again(jail: Builder, host: Path) -> None:
    generation = jail(directories=(RUN, LockDirectory(path="/run/kept", mode=0o755, volume="kept")),
                      spec={"mounts": [mount(host / "file", "/run/kept/file")]})  # fmt: skip
    (generation.parent.parent / "volumes/kept/file").touch()
    for _ in range(2):
        assert output("test", "/bin/cat", "/run/kept/file") == (0, "a file\n", "")


def test_one_volume_at_two_places_is_refused(jail: Builder) -> None:
    places = tuple(LockDirectory(path=path, mode=0o755, volume="mnt") for path in ("/home", "/mnt"))
    with pytest.raises(SpecError, match="`/home` and `/mnt` are both the volume `mnt`"):
        jail(directories=places)
