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


def stockade(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return user(place, "-m", "stockade", *words)


def user(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry and Path(entry).exists())
    return subprocess.run(
        ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all", sys.executable, *words],
        env={"PATH": "/usr/bin:/bin", "HOME": str(place / "own"), "STOCKADE_HOME": str(place / "own/home"),
             "PYTHONPATH": path},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False, cwd="/",
    )  # fmt: skip


#: Types at a shell that edits its line, so reads key by key, and never ends the line.
TYPES = """
import sys, time
from stockade import places
from stockade.vm import control
from stockade.vm.record import NAME, typed
with control.Session(sys.argv[1], ["/bin/sh"], terminal=(24, 80)) as session:
    assert session.read(20)
    session.write(b"never ended")
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if b"never ended" in b"".join(data for _, data in typed(places.guest(sys.argv[1]) / NAME)):
            print("recorded")
            break
        time.sleep(0.02)
"""


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


@pytest.mark.parametrize("walls", ["vm", "jail,vm"])
def test_ordinary_user_copies_large_files_and_records_keys(place: Path, walls: str) -> None:
    name = f"recorded-{walls.replace(',', '-')}"
    source = place / "own/large"
    source.write_bytes(os.urandom(3_000_001))
    os.chown(source, UID, UID)
    for words in (
        ("image", "create", name, "--directory", str(place / "tree")),
        ("guest", "create", name, "--image", name, "--memory", "64M", "--walls", walls, "--record", "--start"),
        ("guest", "cp", str(source), f"{name}:/root/large"),
        ("guest", "cp", f"{name}:/root/large", f"{source}.back"),
    ):
        done = stockade(place, *words)
        assert done.returncode == 0, done.stderr
    try:
        assert Path(f"{source}.back").read_bytes() == source.read_bytes()
        assert Path(f"{source}.back").stat().st_uid == UID
        done = user(place, "-c", TYPES, name)
        assert (done.returncode, done.stdout) == (0, "recorded\n"), done.stderr
    finally:
        Path(f"{source}.back").unlink(missing_ok=True)
        done = stockade(place, "guest", "rm", "--force", name)
    assert done.returncode == 0, done.stderr
