"""Find private keys, tokens and passwords in plain files, by the patterns of `lists.toml`."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from .catalogue import lists
from .seen import Seen

__all__ = ["limit", "secrets"]


class _Content(NamedTuple):
    code: str
    what: str
    texts: tuple[bytes, ...]
    pattern: re.Pattern[bytes]


class _Name(NamedTuple):
    code: str
    what: str
    path: re.Pattern[str]
    pattern: re.Pattern[bytes] | None


def limit() -> int:
    """Bytes of the beginning of a file that are searched."""
    return int(lists()["secrets"]["limit"])


@functools.cache
def _contents() -> tuple[_Content, ...]:
    return tuple(
        _Content(
            entry["code"], entry["what"], tuple(text.encode() for text in entry["texts"]),
            re.compile(entry["pattern"].encode()),
        )
        for entry in lists()["secrets"]["contents"]
    )  # fmt: skip


@functools.cache
def _names() -> tuple[_Name, ...]:
    return tuple(
        _Name(
            entry.get("code", "CREDENTIALS"), entry["what"], _glob(entry["paths"]),
            re.compile(entry["pattern"].encode()) if "pattern" in entry else None,
        )
        for entry in lists()["secrets"]["files"]
    )  # fmt: skip


def _glob(patterns: list[str]) -> re.Pattern[str]:
    """One expression for globs on paths without the leading `/`; `**/` is any number of directories, none too."""
    parts = []
    for pattern in patterns:
        anywhere = pattern.startswith("**/")
        parts.append(("(?:.*/)?" if anywhere else "") + fnmatch.translate(pattern.removeprefix("**/")))
    return re.compile("|".join(parts))


@functools.cache
def _telling() -> re.Pattern[str]:
    """One expression that no path without any of the names matches."""
    return re.compile("|".join(f"(?:{name.path.pattern})" for name in _names()))


def secrets(path: str, data: bytes) -> Iterator[Seen]:
    """What the beginning `data` of the file at `path` gives away, each kind of secret once. Never shows the secret."""
    for code, what, texts, pattern in _contents():
        if any(text in data for text in texts):
            found = pattern.search(data)
            if found is not None:
                yield Seen(code, path, f"{what}, in line {data.count(10, 0, found.start()) + 1}")
    plain = path[1:]
    if data and _telling().match(plain):
        for name in _names():
            if name.path.match(plain) and (name.pattern is None or name.pattern.search(data)):
                yield Seen(name.code, path, name.what)
