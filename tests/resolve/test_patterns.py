"""Globs of several kinds at once match what each of them matches by itself, name by name."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.resolve.pattern import Patterns

GLOBS = st.lists(st.sampled_from(["a", "b", "ab", ".x", "*", "a*", "?", "*.c", "**"]), min_size=1, max_size=4)
NAMES = st.lists(st.sampled_from(["a", "b", "ab", ".x", "x.c", "a*"]), min_size=1, max_size=5)


def matches(glob: list[str], names: list[str]) -> bool:
    """Whether `glob` matches the whole of `names`; `**` stands for any number of names, at the end for at least one."""
    if not glob:
        return not names
    if glob[0] == "**":
        return bool(names) if len(glob) == 1 else any(matches(glob[1:], names[n:]) for n in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], glob[0]) and matches(glob[1:], names[1:])


@settings(max_examples=400, deadline=None)
@given(globs=st.lists(GLOBS, max_size=4), names=NAMES)
def test_patterns_match_and_cover_as_each_glob_does_name_by_name(globs: list[list[str]], names: list[str]) -> None:
    patterns = Patterns([f"/{'/'.join(glob)}" for glob in globs])
    path = f"/{'/'.join(names)}"
    literal = any(glob == names for glob in globs)
    assert patterns.matches(path) == (literal or any(matches(glob, names) for glob in globs))
    above = [names[:count] for count in range(1, len(names) + 1)]
    assert patterns.covers(path) == (literal or any(matches(glob, place) for glob in globs for place in above))
    assert not patterns.matches(path[1:]) and not patterns.covers(path[1:])
