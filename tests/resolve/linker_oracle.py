"""What the dynamic linker itself says, to compare with. Runs ld.so on files of the distribution or of the test."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LINKER = "/lib64/ld-linux-x86-64.so.2"
_LINE = re.compile(r"\t(?:(?P<name>.*) => )?(?P<path>.*?)(?: \(0x[0-9a-f]+\))?\Z")


class Answer(NamedTuple):
    """Paths in loading order, names not found, and the complaint of a linker that gave up."""

    paths: list[str]
    missing: list[str]
    complaint: str


def _answer(done: subprocess.CompletedProcess[bytes]) -> Answer:
    paths, missing = [], []
    for line in os.fsdecode(done.stdout).split("\n"):
        match = _LINE.match(line)
        if match is None or "linux-vdso" in line or match["path"] == "statically linked":
            continue
        if match["path"] == "not found":
            missing.append(match["name"])
        else:
            paths.append(match["path"])
    return Answer(paths, missing, os.fsdecode(done.stderr).strip() if done.returncode else "")


def listed(path: str) -> Answer:
    """`ld.so --list PATH`: nothing of the file itself runs."""
    done = subprocess.run([LINKER, "--list", path], capture_output=True, timeout=30, env={})
    return _answer(done)


def started(path: Path, environment: dict[str, str] | None = None, *, directory: Path | None = None) -> Answer:
    """The program started by the kernel, its linker told to list and end. Only for programs that a test compiled."""
    done = subprocess.run(
        [path], capture_output=True, timeout=30, cwd=directory,
        env={"LD_TRACE_LOADED_OBJECTS": "1", **(environment or {})},
    )  # fmt: skip
    return _answer(done)


def elf_files(*tops: str) -> Iterator[str]:
    """Every 64-bit x86 executable and library below the directories, hard links once."""
    seen = set()
    for top in tops:
        for directory, _, names in os.walk(top):
            for name in names:
                path = f"{directory}/{name}"
                status = os.lstat(path)
                if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) in seen:
                    continue
                with open(path, "rb") as file:
                    head = file.read(20)
                if head[:6] == b"\x7fELF\x02\x01" and head[16:20] in (b"\x02\0\x3e\0", b"\x03\0\x3e\0"):
                    seen.add((status.st_dev, status.st_ino))
                    yield path
