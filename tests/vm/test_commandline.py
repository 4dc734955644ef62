"""Kernels and their command lines: what each version needs, and what a guest must never be able to do without it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from machine import needs_uml

from stockade import places
from stockade.errors import HostError
from stockade.records.image import ImageStart
from stockade.vm import kernels
from stockade.vm.commandline import CONSOLE_FD, LINE_FD, Interface, words
from stockade.vm.kernels import Kernel


def kernel(version: str = "6.1.176") -> Kernel:
    return Kernel(path="/usr/bin/linux.uml", version=version)


def line(version: str = "6.1.176", **options: object) -> dict[str, str]:
    """The words of a command line, by what stands before the first `=`."""
    given = {"name": "web", "memory": 64 << 20, "lpj": 1234, "start": ImageStart(), "walls": ("jail", "vm")} | options
    found = words(kernel(version), **given)  # type: ignore[arg-type]
    return dict(word.partition("=")[::2] for word in found)


@pytest.mark.parametrize("version", ("6.1.176", "6.6.1", "6.12.9", "6.16.0", "7.2.1"))
def test_hostfs_is_off_in_every_version(version: str) -> None:
    assert "init_hostfs" in line(version)["initcall_blacklist"].split(",")


@pytest.mark.parametrize(
    ("version", "raid", "seccomp"),
    (
        ("6.1.176", False, False), ("6.12.9", True, False), ("6.15", True, False), ("6.16.0", True, True),
        ("7.2.1", True, True),
    ),
)
def test_what_later_versions_need_is_given_to_them_alone(version: str, raid: bool, seccomp: bool) -> None:
    found = line(version)
    assert ("raid6_init" in found["initcall_blacklist"].split(",")) == raid
    assert (found.get("seccomp") == "off") == seccomp


def test_versions_are_compared_as_numbers() -> None:
    assert kernel("6.9").number < kernel("6.12").number < kernel("7.0-rc1").number
    assert kernel("6").number == (6, 0)


def test_memory_disk_console_and_line_are_as_uml_has_them() -> None:
    found = line()
    assert found["mem"] == "65536K"
    assert found["ubd0"] == "disk.cow,base"
    assert found["con0"] == f"fd:{CONSOLE_FD},fd:{CONSOLE_FD}"
    assert found["ssl0"] == f"fd:{LINE_FD},fd:{LINE_FD}"
    assert found["lpj"] == "1234"
    assert "lpj" not in line(lpj=None)


def test_an_image_with_a_pid_1_of_its_own_gets_no_settings_of_ours() -> None:
    found = line(start=ImageStart(init="/sbin/init"))
    assert found["init"] == "/sbin/init"
    assert not [word for word in found if word.startswith("stockade_")]
    assert "ssl0" not in found


def test_a_system_is_told_to_the_warden_which_stays_the_first_program() -> None:
    found = line(start=ImageStart(system="/lib/systemd/systemd", options=("systemd.show_status=1",)))
    assert (found["init"], found["stockade_system"]) == ("/.stockade/init", "/lib/systemd/systemd")
    assert found["systemd.show_status"] == "1"
    assert "ssl0" in found
    assert "stockade_system" not in line()


def test_the_plan_is_the_one_for_the_walls_within() -> None:
    start = ImageStart(plan={"vm": "/p/vm", "jail": "/p/jail"}, mounts="/p/mounts")
    bare, walled = line(start=start), line(start=start, walls=("jail", "vm", "jail"))
    assert (bare["stockade_plan"], bare["stockade_mounts"]) == ("/p/vm", "/p/mounts")
    assert walled["stockade_plan"] == "/p/jail"
    assert "stockade_mounts" not in walled


def test_an_interface_is_a_device_and_a_setting() -> None:
    found = line(interfaces=(Interface(transport="fd,fd=5", address="10.1.0.1/30", mtu=1500),))
    assert found["vec0:transport"].startswith("fd,fd=5,")
    assert found["stockade_net0"] == "vec0,10.1.0.1/30,,"


def test_the_record_is_asked_for_by_name_alone() -> None:
    assert line(record=True)["stockade_record"] == "1"
    assert "stockade_record" not in line()


def _program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


def test_what_is_no_kernel_is_refused(empty_home: Path, tmp_path: Path) -> None:
    for text in ("echo hello", "exit 3", "echo 6.1; exit 1"):
        with pytest.raises(HostError, match="no User-Mode Linux kernel"):
            kernels.find(str(_program(tmp_path / "program", text)))
    with pytest.raises(HostError, match="no User-Mode Linux kernel"):
        kernels.find(str(tmp_path / "nothing"))


def test_without_a_kernel_the_package_is_named(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PATTERNS", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError) as caught:
        kernels.find()
    assert caught.value.hint == "`apt-get install user-mode-linux`"


def test_the_hosts_kernel_is_found_and_asked_once(empty_home: Path) -> None:
    needs_uml()
    found = kernels.find()
    assert found.number >= (5, 0)
    assert kernels.find() == found
    assert len(os.listdir(places.kernels())) >= 1


def test_loops_per_jiffy_are_measured_once_and_kept(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_uml()
    found = kernels.find()
    # On a machine that is busy a boot may not tell; the next start asks again.
    tries = (kernels.loops_per_jiffy(found) for _ in range(5))
    measured = next((value for value in tries if value is not None), None)
    assert measured is not None and measured > 10_000

    def never(_: list[str]) -> int:
        raise AssertionError("measured again")

    monkeypatch.setattr(kernels, "_measure", never)
    assert kernels.loops_per_jiffy(found) == measured


def test_a_damaged_cache_is_measured_again(empty_home: Path) -> None:
    needs_uml()
    found = kernels.find()
    for path in places.kernels().iterdir():
        path.write_text("{not json")
    assert kernels.find() == found
