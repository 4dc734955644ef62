"""Ctrl-C and kill -9 at any moment leave no process and no mount."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("as_root", "strace")

PROGRAM = """
import sys
from stockade import observe
from stockade.records.spec import Exercise, Ready, Service, Spec
command = ("sh", "-c", "trap '' INT TERM; while :; do sleep 1; done", sys.argv[1])
service = Service(command=command, ready=Ready(file="/run/never"))
print("go", flush=True)
observe.outside(Spec(name="x", service=service), seeds=(), substitutions={}, identity=observe.Identity())
"""


def holding(token: str) -> list[str]:
    """Processes whose command line or parent's names `token`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if token.encode() in line:
            found.append(f"{path.parent.name} {line!r}")
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.6])
def test_nothing_is_left_after(number: signal.Signals, delay_s: float) -> None:
    token = f"token-{os.urandom(6).hex()}"
    mounts = Path("/proc/self/mountinfo").read_text()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, token], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    helpers: set[str] = set()
    deadline = time.monotonic() + delay_s
    while time.monotonic() < deadline:
        helpers |= set(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        time.sleep(0.005)
    os.killpg(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode in (-number, 1, 130)
    deadline = time.monotonic() + 10
    while (left := holding(token)) or any(Path(f"/proc/{pid}").exists() for pid in helpers):
        assert time.monotonic() < deadline, f"left: {left}, {helpers}"
        time.sleep(0.02)
    assert Path("/proc/self/mountinfo").read_text() == mounts
