"""Ids of jails: never anybody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stockade import contain, places
from stockade.contain import ids
from stockade.contain.ids import COUNT, FIRST
from stockade.errors import HostError, StateError
from stockade.records.launch import IdRange


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    directory = tmp_path / "etc"
    directory.mkdir()
    return directory


def test_first_jail_gets_the_first_range_and_keeps_it(etc: Path) -> None:
    expected = IdRange(first=FIRST, first_gid=FIRST, count=COUNT, kind="root-range")
    assert ids.allocate("a", etc=etc) == expected
    assert ids.allocate("a", etc=etc) == expected
    assert (places.jail("a") / "ids").read_text() == f"{FIRST} {COUNT}\n"


def test_no_two_jails_share_a_range(etc: Path) -> None:
    firsts = [ids.allocate(name, etc=etc).first for name in "abcd"]
    assert firsts == [FIRST + number * COUNT for number in range(4)]
    (places.jail("b") / "ids").unlink()
    assert ids.allocate("e", etc=etc).first == FIRST + COUNT, "a range that was given back is free"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("subuid", f"user:{FIRST}:65536\n"),
        ("subgid", f"user:{FIRST + 65535}:1\n"),
        ("subuid", "user:1879000000:100000\n"),
        ("passwd", f"user:x:{FIRST + 7}:100::/:/bin/sh\n"),
        ("group", f"group:x:{FIRST}:\n"),
    ],
)
def test_range_that_anybody_else_uses_is_left_alone(etc: Path, file: str, line: str) -> None:
    (etc / file).write_text("malformed\n" + line)
    assert ids.allocate("a", etc=etc).first == FIRST + COUNT


def test_damaged_ids_are_an_error(etc: Path) -> None:
    for text in ("", "0 65536\n", "1879048192 1\n", "x\n", f"{FIRST} {COUNT}\n\n"):
        place = places.jail("a") / "ids"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        with pytest.raises(StateError, match="does not hold a range of ids"):
            ids.allocate("a", etc=etc)


def test_all_ranges_taken_is_an_error(etc: Path) -> None:
    (etc / "subuid").write_text("user:1879048192:268435456\n")
    with pytest.raises(HostError, match="no 65536 ids are free"):
        ids.allocate("a", etc=etc)


def test_jails_made_at_the_same_time_get_different_ranges(etc: Path) -> None:
    code = "import sys\nfrom stockade.contain import ids\nprint(ids.allocate(sys.argv[1]).first)"
    source = str(Path(ids.__file__).parents[2])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"jail{number}"], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": source},
        )
        for number in range(12)
    ]  # fmt: skip
    firsts = {int(process.communicate(timeout=30)[0]) for process in started}
    assert len(firsts) == 12


def test_caller_without_a_range_has_its_one_id(etc: Path) -> None:
    own = IdRange(first=os.getuid(), first_gid=os.getgid(), count=1, kind="single")
    assert ids.of_caller(etc=etc) == own
    (etc / "subuid").write_text("root:500000:65536\n")
    assert ids.of_caller(etc=etc) == own, "a range of uids alone is of no use"


def test_callers_range_is_found_by_name_or_number(etc: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("run as root, whose name is known")
    (etc / "subuid").write_text("other:100000:65536\nroot:200000:70000\n")
    (etc / "subgid").write_text("0:300000:65536\n")
    assert ids.of_caller(etc=etc) == IdRange(first=200000, first_gid=300000, count=65536, kind="subid")


def test_root_gets_ranges_of_its_own_and_never_its_callers(etc: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("run as root")
    assert contain.for_jail("a").kind == "root-range"
