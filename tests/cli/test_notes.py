"""How a build's notes are shown: many of one kind in one line."""

from __future__ import annotations

from stockade.cli.building import _notes
from stockade.records.closure import Advice


def advice(code: str, *paths: str) -> list[Advice]:
    return [Advice(code=code, path=path, message=f"about {code}") for path in paths]


def test_few_notes_of_a_kind_have_a_line_each() -> None:
    assert list(_notes(advice("a", "/x/1", "/x/2", "/x/3"))) == ["about a (/x/1)", "about a (/x/2)", "about a (/x/3)"]


def test_many_notes_of_a_kind_are_one_line_with_the_directory_above_them() -> None:
    given = [*advice("a", *(f"/var/lib/db/{number}/f" for number in range(40))), *advice("b", "/y")]
    assert list(_notes(given)) == ["about a (40 paths below /var/lib/db)", "about b (/y)"]
