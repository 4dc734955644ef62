"""Guests of an ordinary user: no root anywhere, with and without a range of ids."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import busybox_tree
from guest_processes import uids_of_kernels

pytestmark = pytest.mark.slow

UID = 4321


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory of a user that has no account and no range."""
    if os.geteuid() != 0:
        pytest.skip("another user can only be played by root: run the tests as root")
    with tempfile.TemporaryDirectory(prefix="stockade-guest-user-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        busybox_tree(directory / "tree")
        own = directory / "own"
        own.mkdir(mode=0o700)
        os.chown(own, UID, UID)
        yield directory


def stockade(place: Path, *words: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry and Path(entry).exists())
    return subprocess.run(
        ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all", sys.executable, "-m",
         "stockade", *words],
        env={"PATH": "/usr/bin:/bin", "HOME": str(place / "own"), "STOCKADE_HOME": str(place / "own/home"),
             "PYTHONPATH": path},
        input=input, capture_output=True, text=True, timeout=60, check=False, cwd="/",
    )  # fmt: skip


@pytest.mark.parametrize("walls", ["vm", "jail,vm"])
def test_ordinary_user_makes_starts_publishes_snapshots_and_ends_a_guest(place: Path, walls: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    name = walls.replace(",", "-")
    image = f"small-{name}"
    for words in (
        ("image", "create", image, "--directory", str(place / "tree")),
        (
            "guest",
            "create",
            name,
            "--image",
            image,
            "--memory",
            "64M",
            "--walls",
            walls,
            "--publish",
            f"{port}:80",
            "--start",
        ),
        ("guest", "exec", name, "--", "sh", "-c", "httpd -p 80 -h /srv"),
    ):
        done = stockade(place, *words)
        assert done.returncode == 0, done.stderr
    try:
        answer = subprocess.run(
            ["curl", "-sS", "-f", "-m", "10", f"http://127.0.0.1:{port}/"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert answer.stdout == "served from a guest\n", answer.stderr
        assert uids_of_kernels(name) == {UID}
        assert stockade(place, "snapshot", "create", name, "kept").returncode == 0
        assert stockade(place, "guest", "stop", name).returncode == 0
        assert stockade(place, "snapshot", "restore", name, "kept").returncode == 0
    finally:
        done = stockade(place, "guest", "rm", "--force", name)
    assert done.returncode == 0, done.stderr
