"""What becomes of a report that cannot be written: a message and a status, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"


def shell(script: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run `script`, in which `"$@"` is the command line."""
    return subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", "stockade"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "STOCKADE_HOME": str(home)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", ["recipes", "recipes --json", "--help"])
def test_a_report_that_the_disk_has_no_room_for_is_an_error(words: str, tmp_path: Path) -> None:
    done = shell(f'"$@" {words} >/dev/full', tmp_path)
    assert done.returncode == 1
    assert "error: no space left on device: `standard output`\n" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_no_fault(closed: str, tmp_path: Path) -> None:
    done = shell(f'"$@" recipes {closed}', tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_ends_it_silently(tmp_path: Path) -> None:
    done = shell('("$@" recipes --json; echo status $? >&2) | true', tmp_path)
    assert done.stderr.splitlines()[-1] in ("status 0", "status 141")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
