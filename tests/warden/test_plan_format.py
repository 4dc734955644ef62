"""The plan's format: one table in C, one in Python, and a parser that takes nothing on trust."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from stockade import contain
from stockade.contain import wire

SOURCES = Path(__file__).parents[2] / "warden"


def warden(tmp_path: Path, plan: bytes) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "plan"
    path.write_bytes(plan)
    return subprocess.run([contain.warden_path(), str(path)], capture_output=True, text=True, timeout=20, check=False)


def refusal(tmp_path: Path, plan: bytes) -> str:
    result = warden(tmp_path, plan)
    assert result.returncode == 125
    return result.stderr


def test_python_and_c_number_the_records_alike() -> None:
    header = (SOURCES / "plan.h").read_text()
    in_c = {name: int(number) for name, number in re.findall(r"^    OP_([A-Z_]+) = ([0-9]+),", header, re.M)}
    in_python = {
        name: value for name, value in vars(wire).items() if name in in_c or (isinstance(value, int) and name.isupper())
    }
    others = {"VERSION", "MAP_DIRECT", "MAP_BY_HELPERS", "MAP_SINGLE"} | {
        name for name in in_python if name.startswith(("TREE_", "RESTART_"))
    }
    assert {name: value for name, value in in_python.items() if name not in others} == in_c
    trees = {name: int(number) for name, number in re.findall(r"^    (TREE_[A-Z]+) = ([0-9]+),", header, re.M)}
    assert {name: value for name, value in in_python.items() if name.startswith("TREE_")} == trees
    restarts = {name: int(number) for name, number in re.findall(r"\b(RESTART_[A-Z_]+) = ([0-9]+)", header)}
    assert {name: value for name, value in in_python.items() if name.startswith("RESTART_")} == restarts


def test_unknown_record_is_an_error(tmp_path: Path) -> None:
    assert "`unknown op`" in refusal(tmp_path, wire.plan([wire.record(99)]))
    assert "`unknown op`" in refusal(tmp_path, wire.plan([wire.record(0)]))


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    assert "`magic`" in refusal(tmp_path, b"#!/bin/sh\necho this is no plan\n")
    assert "`length`" in refusal(tmp_path, b"")


def test_later_version_is_refused(tmp_path: Path) -> None:
    plan = bytearray(wire.plan([]))
    plan[8] = 2
    assert "`version`" in refusal(tmp_path, bytes(plan))


def test_string_without_its_end_is_refused(tmp_path: Path) -> None:
    assert "`malformed payload`" in refusal(tmp_path, wire.plan([wire.record(wire.HOSTNAME, payload=b"name")]))
    assert "`malformed payload`" in refusal(tmp_path, wire.plan([wire.record(wire.HOSTNAME, payload=b"a\0b\0")]))
    assert "`malformed payload`" in refusal(tmp_path, wire.plan([wire.record(wire.SYSCTL, payload=b"only one\0")]))


def test_number_out_of_range_is_refused(tmp_path: Path) -> None:
    for record in (wire.record(wire.IDS, 0xFFFFFFFF, 0), wire.record(wire.RLIMIT, 16), wire.record(wire.NAMESPACES, 1),
                   wire.text(wire.ENV, "LISTEN_PID=", numbers=(2,))):  # fmt: skip
        assert "`number out of range`" in refusal(tmp_path, wire.plan([record]))


def test_truncated_plan_is_refused(tmp_path: Path) -> None:
    whole = wire.plan([wire.text(wire.HOSTNAME, "a-name-of-some-length"), wire.record(wire.FORKS)])
    for length in range(len(whole)):
        assert "step `plan`" in refusal(tmp_path, whole[:length])
    assert "`bytes after the last record`" in refusal(tmp_path, whole + bytes(8))


def test_plan_without_what_every_launch_needs_is_refused(tmp_path: Path) -> None:
    assert "`no ids`" in refusal(tmp_path, wire.plan([]))
    ids = wire.record(wire.IDS, 1, 1)
    assert "`no command`" in refusal(tmp_path, wire.plan([ids]))
    assert "`no capabilities`" in refusal(tmp_path, wire.plan([ids, wire.text(wire.ARGV, "/bin/true")]))


def test_warden_needs_no_library() -> None:
    program = Path(contain.warden_path()).read_bytes()
    assert b"/ld-linux" not in program and b"/ld-musl" not in program


def test_parser_survives_damaged_plans(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("`apt-get install gcc libc6-dev` compiles the fuzzer")
    fuzzer = tmp_path / "fuzz_plan"
    subprocess.run(["make", "-s", "-C", str(SOURCES), "fuzz", f"FUZZER={fuzzer}"], check=True, timeout=120)
    seed = tmp_path / "seed"
    seed.write_bytes(
        wire.plan([
            wire.record(wire.NAMESPACES, 0x10000000),
            wire.text(wire.ROOT, "rootfs", numbers=(3, 1 | 2 | 4 | 16)),
            wire.text(wire.BIND, "/dev/null", "/dev/null", numbers=(0, 2)),
            wire.text(wire.MOUNT, "tmpfs", "/tmp", "size=1", "mode=1777"),
            wire.record(wire.GROUPS, payload=bytes(12)),
            wire.text(wire.ARGV, "/bin/sh", "-c", "true"),
            wire.record(wire.SECCOMP, 0, payload=bytes(64)),
            wire.text(wire.LANDLOCK_PATH, "/", numbers=(1, 1)),
            wire.text(wire.ENV, "LISTEN_PID=", numbers=(1,)),
        ])
    )  # fmt: skip
    # Standard output and error go to files: a sanitizer's report must not block on a pipe.
    result = subprocess.run([str(fuzzer), "3", str(os.getpid()), str(seed)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 1000
