"""What the tests of policies share: jails of a Python that makes the calls it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
PYTHON = "/usr/bin/python3"

#: Everything that the snippets import; `call` makes a system call by its number on x86_64.
PRELUDE = """
import ctypes, errno, fcntl, json, os, resource, signal, socket, struct, subprocess, sys
_libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


def python(code: str) -> list[str]:
    """The command that runs `code` behind the prelude."""
    return [PYTHON, "-c", PRELUDE + code]


def spec(name: str, code: str = "", *lines: str) -> str:
    """TOML of a jail whose command runs `code`; `lines` come after it."""
    return "\n".join([f'name = "{name}"', "[service]", f"command = {json.dumps(python(code))}", *lines, ""])


class Home:
    """The command line with everything that it keeps in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(SOURCE),
            "STOCKADE_HOME": str(directory),
        }
        (directory / "config").mkdir(parents=True, exist_ok=True)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `stockade WORDS` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "stockade", *words], env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="surrogateescape", timeout=120, check=False,
        )  # fmt: skip

    def good(self, *words: str) -> str:
        """Standard output of `stockade WORDS`, which must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def build(self, name: str, text: str) -> dict[str, Any]:
        """Write the spec `name`, build it, and return the report."""
        self.write(name, text)
        report: dict[str, Any] = json.loads(self.good("build", name, "--json"))
        return report

    def write(self, name: str, text: str) -> None:
        """Write the spec `name`."""
        (self.directory / "config" / f"{name}.toml").write_text(text)

    def why(self, name: str, command: Sequence[str]) -> dict[str, Any]:
        """The report of `stockade why`."""
        report: dict[str, Any] = json.loads(self.good("why", name, "--json", "--", *command))
        return report


#: Why the tests with jails cannot be done here, "" if they can.
UNABLE = "" if os.geteuid() == 0 else "these jails run as root of their own: run the tests as root"
