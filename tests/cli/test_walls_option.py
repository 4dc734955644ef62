"""`--walls`: no word that was mistyped leaves a wall out."""

from __future__ import annotations

import argparse

import pytest
from commandline import Run

from stockade.cli import behind, machinelife
from stockade.errors import UsageError

JAIL, CHROOT, FULL = ("jail",), ("chroot",), ("jail", "vm", "jail")


@pytest.mark.parametrize(
    ("own", "asked", "walls"),
    [(JAIL, None, JAIL), (FULL, None, FULL), (FULL, "jail", JAIL), (JAIL, "jail,vm", ("jail", "vm")),
     (CHROOT, "chroot", CHROOT)],
)  # fmt: skip
def test_walls_of_a_command_line(
    monkeypatch: pytest.MonkeyPatch, own: tuple[str, ...], asked: str | None, walls: tuple[str, ...]
) -> None:
    monkeypatch.setattr(machinelife, "walls_of", lambda name: own)
    assert behind.walls_of(argparse.Namespace(name="web", walls=asked)) == walls


@pytest.mark.parametrize(("own", "asked"), [(JAIL, "jal"), (JAIL, "jail,jail"), (FULL, "chroot"), (CHROOT, "jail")])
def test_walls_that_a_jail_cannot_have_are_refused(
    monkeypatch: pytest.MonkeyPatch, own: tuple[str, ...], asked: str
) -> None:
    monkeypatch.setattr(machinelife, "walls_of", lambda name: own)
    with pytest.raises(UsageError, match=f"`{asked}` are no walls that can be tried"):
        behind.walls_of(argparse.Namespace(name="web", walls=asked))


@pytest.mark.parametrize("walls", ["jal", "jal,vm", "jail", ""])
def test_an_image_is_booted_behind_walls_that_there_are(stockade: Run, walls: str) -> None:
    done = stockade("boot", "unknown", "--walls", walls)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: `{walls}` are no walls for a guest\n")
