"""Find the line of a key in TOML text that has been parsed already, for messages. Never parses values."""

from __future__ import annotations

import re
import tomllib
from collections import Counter

from stockade.specfile.problem import Place

_HEADER = re.compile(r"^\s*(\[\[?)([^\[\]]+?)\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"""^\s*((?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*'))*)\s*="""
)
_MULTILINE = re.compile(r'"""|\'\'\'')


def line_of(text: str, place: Place) -> int:
    """Return the number of the line that sets `place`, or of the nearest table around it; 0 if there is none."""
    best = 0
    depth = 0
    header: Place = ()
    seen = Counter[Place]()
    inside = ""
    for number, line in enumerate(text.splitlines(), 1):
        if inside:
            inside = "" if line.count(inside) % 2 else inside
            continue
        if match := _HEADER.match(line):
            keys = _keys(match[2])
            if match[1] == "[[":
                header = (*keys, seen[keys])
                seen[keys] += 1
            else:
                header = _within(keys, seen)
            found = header
        elif match := _KEY.match(line):
            found = (*header, *_keys(match[1]))
            rest = line[match.end() :]
            opened = _MULTILINE.search(rest)
            inside = opened[0] if opened and rest.count(opened[0]) % 2 else ""
        else:
            continue
        if len(found) > depth and found == place[: len(found)]:
            best, depth = number, len(found)
    return best


def _keys(text: str) -> Place:
    """Split a dotted key by letting the TOML parser read it."""
    keys: list[str] = []
    try:
        inner = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return (text,)
    while isinstance(inner, dict):
        [(name, inner)] = inner.items()
        keys.append(name)
    return tuple(keys)


def _within(keys: Place, seen: Counter[Place]) -> Place:
    """A table below an array of tables belongs to the array's latest element."""
    for length in range(len(keys) - 1, 0, -1):
        if count := seen[keys[:length]]:
            return (*keys[:length], count - 1, *keys[length:])
    return keys
