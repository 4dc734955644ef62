"""Stockade inside of a guest: a host with the unified control groups and a systemd, whatever this host has."""

from __future__ import annotations

import importlib.util
import io
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

import stockade
from stockade.vm import control

PLACE = "/opt/stockade"
USER = "alice"
#: Beside the standard library: what the verbs that are driven here import.
_NEEDED = ("msgspec",)
_TIMEOUT_S = 120.0


class Result(NamedTuple):
    """How a command in the guest ended."""

    status: int
    out: str
    err: str


class Host:
    """A running guest in which commands run as `user`, for an ordinary one in a login session."""

    def __init__(self, guest: str, user: str) -> None:
        self.guest = guest
        self.user = user

    def run(self, script: str, *, check: bool = True) -> Result:
        """Run a script of sh's, in which `stockade` is the one under test."""
        script = f'stockade() {{ PYTHONPATH={PLACE} python3 -m stockade "$@"; }}\ncd\n{script}'
        argv = ["sh", "-c", script] if self.user == "root" else ["su", "-s", "/bin/sh", self.user, "-c", script]
        status, out, err = control.execute(self.guest, argv, timeout_s=_TIMEOUT_S)
        result = Result(status, out.decode(), err.decode())
        assert status == 0 or not check, result
        return result

    def __call__(self, script: str) -> str:
        """Standard output of a script that succeeds, without the last newline."""
        return self.run(script).out.rstrip("\n")


def put_in(guest: str) -> None:
    """Copy the Stockade under test and what it imports into the running guest."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for package in (Path(stockade.__file__).parent, *(_package(name) for name in _NEEDED)):
            archive.add(package, package.name, filter=_without_caches)
    script = f"mkdir -p {PLACE} && tar -xzf - -C {PLACE} && python3 -m compileall -q {PLACE}"
    status, out, err = control.execute(guest, ["sh", "-c", script], input=packed.getvalue(), timeout_s=_TIMEOUT_S)
    assert status == 0, (out, err)


def needs_same_python(suite: str, version: tuple[int, int]) -> None:
    """Skip where this interpreter's compiled modules cannot be used by that of the suite."""
    if sys.version_info[:2] != version:
        pytest.skip(f"needs {suite}'s Python here, {version[0]}.{version[1]}: its msgspec is copied into the guest")


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return None if entry.name.endswith("__pycache__") else entry
