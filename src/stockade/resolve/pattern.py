"""Globs over paths: matching, and finding below a root. `*` stays within one name, `**` crosses `/`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .host import Host

__all__ = ["Patterns", "find", "is_glob"]

_MAGIC = re.compile(r"[*?\[]")


def is_glob(text: str) -> bool:
    """`text` holds a character that a glob gives a meaning."""
    return _MAGIC.search(text) is not None


def _name(part: str) -> str:
    """A regular expression for one name of a glob, as glob(7) says."""
    result, position = "", 0
    while position < len(part):
        character = part[position]
        position += 1
        end = part.find("]", position + 1 + (part[position : position + 1] in "!^")) if character == "[" else -1
        if character == "*":
            result += "[^/]*"
        elif character == "?":
            result += "[^/]"
        elif end >= 0:
            inside = part[position:end].replace("\\", "\\\\").replace("[", "\\[")
            result += f"(?!/)[{'^' + inside[1:] if inside[0] in '!^' else inside}]"
            position = end + 1
        else:
            result += re.escape(character)
    return result


def _expression(pattern: str) -> str:
    parts = [part for part in pattern.split("/") if part]
    text = "".join(f"/{_name(part)}" if part != "**" else "(?:/.*)?" for part in parts)
    return text.removesuffix("(?:/.*)?") + "/.+" if parts and parts[-1] == "**" else text


class Patterns:
    """Several globs at once."""

    def __init__(self, patterns: Sequence[str]) -> None:
        texts = [_expression(pattern) for pattern in patterns]
        self._empty = not texts
        self._covers = re.compile("(?:" + "|".join(texts) + r")(?:/.*)?\Z", re.DOTALL)
        self._matches = re.compile("(?:" + "|".join(texts) + r")\Z", re.DOTALL)
        self._literal = frozenset(pattern.rstrip("/") or "/" for pattern in patterns)

    def covers(self, path: str) -> bool:
        """`path` or a directory above it matches."""
        return not self._empty and (self._covers.match(path) is not None or path in self._literal)

    def matches(self, path: str) -> bool:
        """`path` itself matches, as a glob or literally."""
        return not self._empty and (self._matches.match(path) is not None or path in self._literal)


def find(host: Host, pattern: str) -> Iterator[str]:
    """Paths below the root that match `pattern`, sorted; a name that exists as it stands is taken literally."""
    if not is_glob(pattern) or host.walk(pattern, follow=False).status is not None:
        if host.walk(pattern, follow=False).status is not None:
            yield pattern
        return
    yield from _find(host, "", [part for part in pattern.split("/") if part])


def _find(host: Host, base: str, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield base or "/"
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _find(host, base, rest) if rest else ()
        for name in host.names(base or "/"):
            path = f"{base}/{name}"
            if not rest:
                yield path
            if host.walk(path, follow=False).is_directory:
                yield from _find(host, path, parts)
    elif is_glob(part):
        expression = re.compile(_name(part) + r"\Z", re.DOTALL)
        for name in host.names(base or "/"):
            hidden = name.startswith(".") and not part.startswith(".")
            if not hidden and expression.match(name):
                yield from _find(host, f"{base}/{name}", rest)
    elif host.walk(f"{base}/{part}", follow=bool(rest)).status is not None:
        yield from _find(host, f"{base}/{part}", rest)
