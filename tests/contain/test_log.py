"""Reading the log of a jail while its supervisor writes it and puts files aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from stockade import contain, places
from stockade.errors import NotFoundError, UsageError

KEPT = 3


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the log of the jail `test`, which does not exist yet."""
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path))
    places.jail("test").mkdir(parents=True)
    return places.jail("test") / "log"


def put_aside(log: Path) -> None:
    """What the warden does: the oldest is written over, and the log's own name is free for a new file."""
    for number in range(KEPT, 0, -1):
        before = log.with_name(f"log.{number - 1}") if number > 1 else log
        if before.exists():
            before.rename(log.with_name(f"log.{number}"))


def add(log: Path, text: str) -> None:
    with open(log, "a") as file:
        file.write(text)


def read(follower: contain.Follower) -> str:
    return b"".join(follower.pieces()).decode()


def test_what_is_added_before_the_log_is_put_aside_is_read(log: Path) -> None:
    add(log, "1\n")
    with contain.Follower("test") as follower:
        assert read(follower) == "1\n"
        add(log, "2\n")
        put_aside(log)
        add(log, "3\n")
        assert read(follower) == "2\n3\n"
        assert read(follower) == ""


def test_what_is_written_faster_than_it_is_read_has_an_end(log: Path) -> None:
    add(log, "1\n")
    with contain.Follower("test") as follower:
        pieces = follower.pieces()
        assert next(pieces) == b"1\n"
        add(log, "2\n")
        put_aside(log)
        add(log, "3\n")
        assert list(pieces) == []
        assert read(follower) == "2\n3\n"


def test_files_that_come_and_are_put_aside_between_two_looks_are_read(log: Path) -> None:
    add(log, "1\n")
    with contain.Follower("test") as follower:
        for number in (2, 3, 4):
            put_aside(log)
            add(log, f"{number}\n")
        assert read(follower) == "1\n2\n3\n4\n"


def test_a_log_that_is_being_put_aside_is_read_to_its_end(log: Path) -> None:
    add(log, "1\n")
    with contain.Follower("test") as follower:
        put_aside(log)
        assert read(follower) == "1\n"
        add(log, "2\n")
        assert read(follower) == "2\n"


def test_a_follower_that_was_left_behind_goes_on_with_the_oldest(log: Path) -> None:
    missed: list[str] = []
    add(log, "1\n")
    with contain.Follower("test", missed=lambda: missed.append("here")) as follower:
        for number in range(2, KEPT + 4):
            put_aside(log)
            add(log, f"{number}\n")
        pieces = follower.pieces()
        assert (next(pieces), missed) == (b"1\n", [])
        assert (next(pieces), missed) == (b"3\n", ["here"])
        assert b"".join(pieces) == b"4\n5\n6\n"
        put_aside(log)
        add(log, "7\n")
        assert (read(follower), missed) == ("7\n", ["here"])


def test_older_ones_come_first_and_others_files_are_left_alone(log: Path) -> None:
    add(log, "1\n")
    put_aside(log)
    add(log, "2\n")
    log.with_name("log.1.gz").write_bytes(b"an owner's")
    assert b"".join(contain.logs("test")) == b"2\n"
    assert b"".join(contain.logs("test", older=True)) == b"1\n2\n"


def test_a_jail_that_never_logged_has_no_log(log: Path) -> None:
    for name in ("test", "nothing"):
        with pytest.raises(NotFoundError, match="has no log"):
            list(contain.logs(name))
    with pytest.raises(UsageError):
        list(contain.logs("../test"))
