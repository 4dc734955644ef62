"""The command line with a home of its own, as an ordinary environment has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

Done = subprocess.CompletedProcess[str]


class Home:
    """Everything that Stockade keeps lies below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src"),
            "STOCKADE_HOME": str(directory),
        }
        self.command = [sys.executable, "-m", "stockade"]
        (directory / "config").mkdir(parents=True, exist_ok=True)

    def run(self, *words: str) -> Done:
        """Run `stockade WORDS` to its end."""
        return subprocess.run(
            [*self.command, *words], env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="surrogateescape", timeout=120, check=False,
        )  # fmt: skip

    def good(self, *words: str) -> Done:
        """`stockade WORDS`, which must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def write(self, name: str, text: str) -> None:
        """Write the spec `name`."""
        (self.directory / "config" / f"{name}.toml").write_text(text)
