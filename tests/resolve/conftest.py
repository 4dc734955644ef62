from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from little_world import World

Compile = Callable[..., Path]


@pytest.fixture
def compile(tmp_path: Path) -> Compile:
    """Compile `void NAME(void)` into a shared library, or with `main=True` a program, linked with `needs`."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc to make programs with unusual library paths (package `gcc`)")

    def run(path: str, *flags: str, needs: tuple[Path, ...] = (), main: bool = False, with_: str = compiler) -> Path:
        output = tmp_path / path
        output.parent.mkdir(parents=True, exist_ok=True)
        source = "int main(void) { return 0; }" if main else "void nothing(void) {}"
        command = [with_, "-x", "c", "-", "-o", output, "-Wl,--no-as-needed", "-Wl,--disable-new-dtags"]
        command += [] if main else ["-shared", "-fPIC"]
        command += ["-x", "none", *flags, *needs]
        directories = dict.fromkeys(str(need.parent) for need in needs)
        command += [f"-Wl,-rpath-link,{directory}" for directory in directories]
        subprocess.run(command, input=source, text=True, check=True, timeout=60)
        return output

    return run


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A small host of the test's own, with a service in it that is no ELF file and no script."""
    made = World(tmp_path / "world")
    made.file("/usr/bin/service", "service", mode=0o755)
    return made
