"""libc through ctypes: prototypes set once, failures raised as OSError. Chooses nothing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

__all__ = ["check", "function", "path_argument", "syscall"]

_library = ctypes.CDLL(None, use_errno=True)


def function(name: str, *argtypes: Any, restype: Any = ctypes.c_int) -> Callable[..., int]:
    """libc's function `name` with its prototype; AttributeError where this libc has none of that name."""
    found = _library[name]
    found.argtypes = list(argtypes)
    found.restype = restype
    return found


_syscall = function("syscall", restype=ctypes.c_long)
_syscall.argtypes = None  # type: ignore[attr-defined]


def syscall(number: int, *arguments: Any) -> int:
    """syscall(2) by number; each argument is a ctypes value. Returns -1 with errno set on failure."""
    return _syscall(ctypes.c_long(number), *arguments)


def check(result: int, call: str, path: str | os.PathLike[str] | None = None) -> int:
    """`result`, or for a negative one the OSError of errno, with `call` in its text and the file name."""
    if result >= 0:
        return result
    code = ctypes.get_errno()
    text = f"{call}: {os.strerror(code)}"
    raise OSError(code, text, os.fspath(path)) if path is not None else OSError(code, text)


def path_argument(path: str | os.PathLike[str] | None) -> bytes | None:
    """A path as libc takes it; ValueError for one with a NUL, which libc would cut off silently."""
    if path is None:
        return None
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    return name
