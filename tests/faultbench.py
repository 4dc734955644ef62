"""A home with one jail in it for tests that break something, and ways to see that nothing is left of what broke."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAME = "fault"
SPEC = """
name = "fault"

[service]
command = ["/bin/sh", "-c", "cat /etc/motd"]

[files]
programs = ["cat"]
content = { "/etc/motd" = "sound\\n" }

[[exercises]]
command = ["cat", "/etc/motd"]
where = "inside"
"""
LIMIT_S = 60
_PR_SET_CHILD_SUBREAPER = 36

Done = subprocess.CompletedProcess[str]


class Bench:
    """The command line with a home of its own. `jail` is what it keeps of the jail `fault`."""

    def __init__(self, home: Path, *, under: Sequence[str] = ()) -> None:
        self.home = home
        self.spec = home / "config" / f"{NAME}.toml"
        self.jail = home / "state/jails" / NAME
        self.command = ["env", "--default-signal=INT", *under, sys.executable, "-m", "stockade"]
        self.environment = {
            "PATH": PATH,
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(SOURCE),
            "STOCKADE_HOME": str(home),
        }

    def write(self, text: str) -> None:
        """Make `text` the jail's spec."""
        self.spec.parent.mkdir(parents=True, exist_ok=True)
        self.spec.write_text(text, encoding="utf-8", errors="surrogateescape")

    def popen(self, *words: str | bytes) -> subprocess.Popen[str]:
        """Start `stockade WORDS` as a terminal would: in a process group of its own."""
        return subprocess.Popen(
            [*map(os.fsencode, self.command), *map(os.fsencode, words)],
            env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="surrogateescape", start_new_session=True,
        )  # fmt: skip

    def run(self, *words: str | bytes, **environment: str) -> Done:
        """Run `stockade WORDS` to its end."""
        return subprocess.run(
            [*map(os.fsencode, self.command), *map(os.fsencode, words)],
            env=self.environment | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="surrogateescape", timeout=LIMIT_S, check=False,
        )  # fmt: skip

    def good(self, *words: str | bytes) -> str:
        """Standard output of what must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sound(self) -> None:
        """The jail that was built first still runs, and nothing that a failure leaves is there."""
        assert self.good("run", NAME) == "sound\n"
        self.clean()

    def clean(self) -> None:
        """No half-made directory, no mount and no process is left."""
        assert not self.hidden(), self.hidden()
        assert not self.mounts(), self.mounts()
        left = processes_left()
        assert not left, left

    def mounts(self) -> list[str]:
        """Mounts on something in the home, and those whose source is called as Stockade calls its own."""
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
        return [line for line in lines if str(self.home) in line or " stockade " in line]

    def hidden(self) -> list[str]:
        """What a build, a removal or a launch makes for the time being."""
        jails = self.home / "state/jails"
        places = [jails, *jails.glob("*"), *jails.glob("*/generations"), *jails.glob("*/generations/*")]
        found = [str(path) for place in places if place.is_dir() for path in place.iterdir() if path.name[0] == "."]
        run = self.home / "run"
        return found + ([str(path) for path in run.iterdir()] if run.is_dir() else [])


@contextmanager
def adopting() -> Iterator[None]:
    """Become the parent of every process whose own parent ends before it (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def processes_left(patience_s: float = 10) -> list[str]:
    """Command lines of the processes that are still there after `patience_s` seconds; those that end are reaped."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return []
        if time.monotonic() > deadline:
            return _end_children()
        time.sleep(0.01)


def _end_children() -> list[str]:
    found = []
    for pid in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
        found.append(f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()!r}")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def errors(done: Done) -> tuple[str, str]:
    """The one error and its hint, without the lines that tell of progress."""
    lines = [line for line in done.stderr.splitlines() if not line.endswith(" …")]
    assert "Traceback" not in done.stderr
    [error] = [line for line in lines if line.startswith("error: ")]
    [hint] = [line for line in lines if line.startswith("hint: ")] or [""]
    return error.removeprefix("error: "), hint.removeprefix("hint: ")
