"""Be an ordinary user who is known only to one process: accounts are bound over /etc in a private mount namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

UID = 64123
FIRST_UID = 700_000
FIRST_GID = 900_000
SOURCE = Path(__file__).resolve().parents[2] / "src"

SCRIPT = """
for name in passwd group subuid subgid; do mount --bind "$ETC/$name" "/etc/$name"; done
for bound in $BOUND; do mount --bind /dev/null "$bound"; done
exec setpriv --reuid 64123 --regid 64123 --clear-groups "$@"
"""


class User:
    """An ordinary user with a home, and with `count` subordinate ids."""

    def __init__(self, home: Path, *, count: int) -> None:
        self.home = home
        self.etc = home.parent / "etc"
        self.etc.mkdir()
        for name in ("passwd", "group"):
            shutil.copy(f"/etc/{name}", self.etc / name)
        with open(self.etc / "passwd", "a") as file:
            file.write(f"walluser:x:{UID}:{UID}::{home}:/bin/sh\n")
        with open(self.etc / "group", "a") as file:
            file.write(f"walluser:x:{UID}:\n")
        for name, first in (("subuid", FIRST_UID), ("subgid", FIRST_GID)):
            (self.etc / name).write_text(f"walluser:{first}:{count}\n" if count else "")

    def run(self, *command: str, hide: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command; `hide` names files of the host that are empty and not executable for it."""
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-euc", SCRIPT, "sh", *command],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": str(self.home),
                "STOCKADE_HOME": str(self.home / "stockade"),
                "PYTHONPATH": f"{SOURCE}:{Path(__file__).parent}",
                "PYTHONDONTWRITEBYTECODE": "1",
                "ETC": str(self.etc),
                "BOUND": hide,
                **environment,
            },
            cwd=self.home, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def python(self, code: str, *, hide: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python code."""
        return self.run(sys.executable, "-c", code, hide=hide, **environment)


def home() -> Iterator[Path]:
    """A home that the user can reach: pytest's own directories are root's alone."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    if shutil.which("newuidmap") is None:
        pytest.skip("needs newuidmap: `apt-get install uidmap`")
    directory = Path(tempfile.mkdtemp(prefix="stockade-user-"))
    try:
        directory.chmod(0o755)
        (directory / "home").mkdir()
        os.chown(directory / "home", UID, UID)
        (directory / "home").chmod(0o700)
        yield directory / "home"
    finally:
        shutil.rmtree(directory)
