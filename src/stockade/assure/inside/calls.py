"""System calls by number, and errnos by name. Raises nothing: a refusal is what is looked for."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable
from typing import Any

from .results import Result, held, reached

__all__ = ["CAPABILITY_VERSION", "Kernel", "attempt", "capability_sets", "error_name", "opening"]

# include/uapi/linux/capability.h and prctl.h
CAPABILITY_VERSION = 0x20080522
_PR_CAPBSET_READ, _PR_CAP_AMBIENT, _AMBIENT_IS_SET = 23, 47, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.shmat.restype = ctypes.c_void_p

shmat = _libc.shmat


def error_name(number: int) -> str:
    """ENOENT for 2, and so on."""
    return errno.errorcode.get(number, str(number))


class Kernel:
    """System calls of one architecture, by name."""

    def __init__(self, numbers: dict[str, int]) -> None:
        self.numbers = numbers

    def __call__(self, name: str, *arguments: Any) -> tuple[int, str]:
        """Result, and the errno's name ("" on success). Arguments are ints, bytes, None or ctypes values."""
        number = self.numbers.get(name)
        if number is None:
            return -1, "ENOSYS"
        return self.raw(number, *arguments)

    def raw(self, number: int, *arguments: Any) -> tuple[int, str]:
        """The same by number."""
        given = [_argument(argument) for argument in arguments]
        given += [ctypes.c_long(0)] * (6 - len(given))
        ctypes.set_errno(0)
        result = _libc.syscall(ctypes.c_long(number), *given)
        return (result, "") if result >= 0 else (-1, error_name(ctypes.get_errno()))


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, int):
        return ctypes.c_long(value)
    if isinstance(value, bytes):
        return ctypes.c_char_p(value)
    return value


def attempt(
    call: str, result: tuple[int, str], *, reach: Iterable[str] = (), undo: Callable[[int], object] | None = None
) -> Result:
    """Success, and the errnos in `reach` that only the code behind the wall gives, mean reached."""
    value, error = result
    if not error:
        if undo is not None:
            undo(value)
        return reached(f"{call} succeeded")
    if error in reach:
        return reached(f"{call}: {error}, from behind the permission check")
    return held(f"{call}: {error}")


def opening(path: str, flags: int = os.O_RDONLY, *, read: int = 0) -> tuple[str, bytes]:
    """Open and close; the errno's name ("" on success), and up to `read` bytes of content."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        return error_name(error.errno or 0), b""
    try:
        return "", os.read(descriptor, read) if read else b""
    except OSError:
        return "", b""
    finally:
        os.close(descriptor)


def capability_sets(call: Kernel) -> dict[str, int]:
    """The five sets of this process as masks."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    call("capget", header, data)
    bounding = ambient = 0
    for number in range(64):
        held_bit, error = call("prctl", _PR_CAPBSET_READ, number, 0, 0, 0)
        if error:
            break
        bounding |= (held_bit & 1) << number
        ambient |= (call("prctl", _PR_CAP_AMBIENT, _AMBIENT_IS_SET, number, 0, 0)[0] & 1) << number
    return {
        "effective": data[0] | data[3] << 32, "permitted": data[1] | data[4] << 32,
        "inheritable": data[2] | data[5] << 32, "bounding": bounding, "ambient": ambient,
    }  # fmt: skip
