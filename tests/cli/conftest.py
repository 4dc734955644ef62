"""What the tests of the command line share: the program as a user starts it, with a home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import Done, Run

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": str(SOURCE),
        "STOCKADE_HOME": str(home),
        "COLUMNS": "80",
    }


@pytest.fixture
def command() -> list[str]:
    return [sys.executable, "-m", "stockade"]


@pytest.fixture
def stockade(command: list[str], environment: dict[str, str], tmp_path: Path) -> Run:
    """Run `stockade WORDS` to its end."""

    def run(*words: str | bytes, **options: object) -> Done:
        done = subprocess.run(
            [*map(os.fsencode, command), *map(os.fsencode, words)],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return Done(
            words,
            done.returncode,
            done.stdout.decode(errors="surrogateescape"),
            done.stderr.decode(errors="surrogateescape"),
        )

    return run
