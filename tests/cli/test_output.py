"""How a report is written: its tables, and a message and a status, never a traceback, where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stockade.cli import console

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


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (60, ["NAME   WHAT", "basic  a shell and the file utilities", "x"]),
        (27, ["NAME   WHAT", "basic  a shell and the file", "       utilities", "x"]),
        (20, ["NAME   WHAT", "basic  a shell and the file utilities", "x"]),
    ],
)
def test_last_column_of_a_table_is_folded_between_words_where_there_is_room(
    columns: int, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_columns", lambda: columns)
    console.rows([("basic", "a shell and the file utilities"), ("x", "")], heading=("NAME", "WHAT"))
    assert capsys.readouterr().out.splitlines() == lines
