"""Carry paths of any bytes through JSON and TOML, which know only Unicode."""

from __future__ import annotations

import os
import re

_ESCAPE = re.compile(r"\\x([0-9a-f]{2})|\\\\")
_UNSAFE = re.compile("[\\\\\udc80-\udcff]")


def escape(path: str) -> str:
    """Return `path` (as `os.fsdecode` gives it) with each undecodable byte as `\\xNN`.

    A backslash becomes two. The result is plain Unicode and `unescape` undoes it exactly.
    """
    return _UNSAFE.sub(
        lambda match: "\\\\" if match[0] == "\\" else f"\\x{ord(match[0]) - 0xDC00:02x}", path
    )


def unescape(text: str) -> str:
    """Undo `escape`; the result can be given to any function that takes a path."""
    return _ESCAPE.sub(
        lambda match: "\\" if match[1] is None else os.fsdecode(bytes([int(match[1], 16)])), text
    )


def portable(value: object) -> object:
    """`value`, made of dicts, lists and plain values, with every text in it escaped."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, dict):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    return value
