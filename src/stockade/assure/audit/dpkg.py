"""Debian's package database: versions, and which of two is the newer. Never runs dpkg."""

from __future__ import annotations

import functools
import re
from pathlib import Path

__all__ = ["compare", "release", "versions"]

_STANZA = re.compile(r"^Package: (\S+)$(?:\n(?!\n).*)*?\nVersion: (\S+)$", re.MULTILINE)
_PART = re.compile(r"([^0-9]*)([0-9]*)")
_FIELD = re.compile(r'^(ID|VERSION_ID|VERSION_CODENAME)="?([^"\n]*)"?$', re.MULTILINE)


def versions(status: bytes) -> dict[str, str]:
    """Versions by package, from the text of /var/lib/dpkg/status."""
    return dict(_STANZA.findall(status.decode("utf-8", "replace")))


@functools.cache
def of_host(host: Path) -> dict[str, str]:
    """Versions of the packages of the host at `host`; none where it has no dpkg."""
    try:
        return versions((host / "var/lib/dpkg/status").read_bytes())
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return {}


def release(text: bytes) -> str:
    """Which release an os-release(5) is of, "debian 12"; "" when it does not say."""
    fields = dict(_FIELD.findall(text.decode("utf-8", "replace")))
    return f"{fields.get('ID', '')} {fields.get('VERSION_ID', '') or fields.get('VERSION_CODENAME', '')}".strip()


def compare(one: str, other: str) -> int:
    """Negative, 0 or positive as version `one` is older than, the same as or newer than `other`: deb-version(7)."""
    epoch, upstream, revision = _split(one)
    other_epoch, other_upstream, other_revision = _split(other)
    return (epoch - other_epoch) or _text(upstream, other_upstream) or _text(revision, other_revision)


def _split(version: str) -> tuple[int, str, str]:
    epoch, colon, rest = version.partition(":")
    if not colon or not epoch.isdecimal():
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return int(epoch), upstream, revision


def _text(one: str, other: str) -> int:
    """Runs of other characters, then of digits, in turn; `~` sorts before everything, the end included."""
    parts, others = _PART.findall(one), _PART.findall(other)
    for index in range(max(len(parts), len(others))):
        text, digits = parts[index] if index < len(parts) else ("", "")
        other_text, other_digits = others[index] if index < len(others) else ("", "")
        ordered, other_ordered = _order(text), _order(other_text)
        if ordered != other_ordered:
            return -1 if ordered < other_ordered else 1
        number, other_number = int(digits or "0"), int(other_digits or "0")
        if number != other_number:
            return -1 if number < other_number else 1
    return 0


def _order(text: str) -> list[int]:
    """Weights that sort as dpkg does: `~`, the end of the part, letters, the rest."""
    return [*(-1 if c == "~" else ord(c) if c.isalpha() else ord(c) + 256 for c in text), 0]
