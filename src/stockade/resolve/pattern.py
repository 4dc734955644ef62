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
    """Several globs at once. What is a plain path, or one name anywhere, is looked up; other globs are compiled when a
    path begins as they do.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._literal = {pattern.rstrip("/") or "/" for pattern in patterns}
        self._plain: set[str] = set()
        self._names: set[str] = set()
        self._globs: dict[str, list[str]] = {}
        self._compiled: dict[tuple[str, str], re.Pattern[str]] = {}
        for pattern in patterns:
            plain = "/" + "/".join(filter(None, pattern.split("/")))
            magic = _MAGIC.search(plain)
            if magic is None:
                self._plain.add(plain)
            elif plain.startswith("/**/") and not _MAGIC.search(plain, 4) and "/" not in plain[4:]:
                self._names.add(plain[4:])
            else:
                self._globs.setdefault(plain[: magic.start()], []).append(plain)

    def covers(self, path: str) -> bool:
        """`path` or a directory above it matches."""
        if path in self._literal or self._glob(path, r"(?:/.*)?\Z"):
            return True
        if self._names and path.startswith("/") and not self._names.isdisjoint(path.split("/")):
            return True
        place = path if self._plain and path.startswith("/") else ""
        while place:
            if place in self._plain:
                return True
            place = place.rpartition("/")[0]
        return "/" in self._plain and path.startswith("/")

    def matches(self, path: str) -> bool:
        """`path` itself matches, as a glob or literally."""
        if path in self._literal or path in self._plain or self._glob(path, r"\Z"):
            return True
        return path.startswith("/") and path.rpartition("/")[2] in self._names

    def _glob(self, path: str, end: str) -> bool:
        """A glob, followed by the expression `end`, matches the whole of `path`."""
        for start, patterns in self._globs.items():
            if not path.startswith(start):
                continue
            compiled = self._compiled.get((start, end))
            if compiled is None:
                texts = "|".join(_expression(pattern) for pattern in patterns)
                compiled = self._compiled[start, end] = re.compile(f"(?:{texts}){end}", re.DOTALL)
            if compiled.match(path) is not None:
                return True
        return False


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
