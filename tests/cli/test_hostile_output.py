"""What a service or a guest has written cannot speak to the terminal of whoever reads it."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest
from commandline import Run

from stockade.cli import console

# A title, a paste that types, 8-bit control characters, text that runs backwards, and half a character at the end.
HOSTILE = b"\x1b]0;owned\x07\x1b[201~rm -rf /\r\n\xc2\x9b31m \xe2\x80\xae\x7f\x9b\x00 \xc3\xa4 \\n\tend\n\xe2\x80"
SHOWN = (
    "\\x1b]0;owned\\x07\\x1b[201~rm -rf /\n\\x9b31m \\u202e\\x7f\\x9b\\x00 \u00e4 \\n\tend\n\\xe2\\x80"
)  # fmt: skip


def log_of(home: Path) -> None:
    jail = home / "state" / "jails" / "test"
    (jail / "generations" / "0001").mkdir(parents=True)
    (jail / "log").write_bytes(HOSTILE)


def test_log_on_a_terminal_has_its_control_characters_written_out(
    home: Path, environment: dict[str, str], command: list[str]
) -> None:
    log_of(home)
    parent, child = pty.openpty()
    with subprocess.Popen(
        [*command, "logs", "test"], env=environment, stdin=subprocess.DEVNULL, stdout=child, stderr=subprocess.PIPE
    ) as process:
        os.close(child)
        seen = b""
        try:
            while piece := os.read(parent, 4096):
                seen += piece
        except OSError:  # EIO: the program has ended
            pass
        assert process.wait(timeout=30) == 0, process.stderr
    os.close(parent)
    assert seen.decode().replace("\r\n", "\n") == SHOWN


def test_log_through_a_pipe_is_as_it_was_written(home: Path, stockade: Run) -> None:
    log_of(home)
    done = stockade("logs", "test")
    assert (done.returncode, os.fsencode(done.stdout)) == (0, HOSTILE)


def test_names_in_reports_have_their_control_characters_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    console.text("\x1b[2J\u202etxt\x9b\udc9b\ta\u00e4")
    console.note("\x07")
    seen = capsys.readouterr()
    assert seen.out == "\\x1b[2J\\u202etxt\\x9b\\x9b\ta\u00e4\n"
    assert seen.err == "\\x07\n"
