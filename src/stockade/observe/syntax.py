"""How strace writes a call: strings, descriptors with paths, results, addresses. Knows no call by name."""

from __future__ import annotations

import os
import re

__all__ = [
    "ADDRESSES",
    "CHANGED",
    "CLONE_FLAGS",
    "DESCRIPTOR",
    "FAMILY",
    "FLAGS",
    "IDS",
    "MODE",
    "NAME",
    "NUMBER",
    "OPEN",
    "OPENAT",
    "PIECES",
    "SOCKET",
    "STRINGS",
    "result_of",
    "unescape",
]

_STRING = r'"((?:[^"\\]|\\.)*)"(?:\.\.\.)?'
# A descriptor is written with its path in angle brackets, in which `<` and `>` are escaped.
DESCRIPTOR = r"(AT_FDCWD|-?\d+)(?:<([^>]*)>(?:\(deleted\))?)?"
_PATH = rf"(?:{_STRING}|NULL|0x[0-9a-f]+)"
PIECES = {"p": _PATH, "d": rf"{DESCRIPTOR}, {_PATH}", "f": DESCRIPTOR, "_": DESCRIPTOR}

_RESULT = re.compile(
    r"\) += (-?\d+|\?|0x[0-9a-f]+)(?:<[^>]*>)?(?: (E[A-Z0-9]+))?(?: /\* (\d+) in strace's PID NS \*/)?"
)
OPEN = re.compile(PIECES["p"])
OPENAT = re.compile(PIECES["d"])
STRINGS = re.compile(_STRING)
FLAGS = re.compile(r", (?:\{flags=)?([A-Z_|0-9a-fx]+)(?:, (?:mode=)?(0[0-7]*)\b)?")
CLONE_FLAGS = re.compile(r"flags=([A-Z_|0-9a-fx]+)")
MODE = re.compile(r", (?:[A-Z_|]*\|)?(0[0-7]*)\b")
IDS = re.compile(r", (-?\d+), (-?\d+)")
NUMBER = re.compile(r"-?\d+")
SOCKET = re.compile(r"\d+<socket:\[(\d+)\]>")
ADDRESSES = (
    ("unix", re.compile(rf"sa_family=AF_UNIX, sun_path=(@?){_STRING}")),
    ("inet", re.compile(r'sa_family=AF_INET, sin_port=htons\((\d+)\), sin_addr=inet_addr\("([^"]*)"\)')),
    (
        "inet6",
        re.compile(r'sa_family=AF_INET6, sin6_port=htons\((\d+)\),.* inet_pton\(AF_INET6, "([^"]*)"'),
    ),
)
FAMILY = re.compile(r"sa_family=AF_([A-Z0-9]+)")
NAME = re.compile(r"[a-z_][a-z0-9_]*\Z")
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-f]{2})|(.))")
_LETTERS = {"n": 10, "t": 9, "r": 13, "v": 11, "f": 12, "a": 7, "b": 8, "e": 27}
CHANGED = re.compile(r" <pid changed to (\d+) \.\.\.>\n\Z")


def unescape(text: str) -> str:
    """A string as it was, from strace's C escapes; bytes that are no UTF-8 become surrogates (os.fsdecode)."""
    if "\\" not in text:
        return text
    data = bytearray()
    position = 0
    for match in _ESCAPE.finditer(text):
        data += text[position : match.start()].encode()
        octal, hexadecimal, letter = match.groups()
        if octal is not None:
            data.append(int(octal, 8))
        elif hexadecimal is not None:
            data.append(int(hexadecimal, 16))
        else:
            data.append(_LETTERS.get(letter, ord(letter)))
        position = match.end()
    data += text[position:].encode()
    return os.fsdecode(bytes(data))


def result_of(text: str, position: int) -> tuple[str, str] | None:
    """The value and error name at the end of a call; None if it was cut short or will be restarted."""
    found = _RESULT.search(text, position)
    if found is None:
        return None
    value, error, outer = found.groups()
    if value == "?" or (error or "").startswith("ERESTART"):
        return None
    return outer or value, error or ""
