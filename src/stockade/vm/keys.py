"""Have a guest's kernel tell what is typed when it is read, not when there is enough of it for a message.

drivers/tty/tty_audit.c gathers what a process reads from a terminal in a buffer of 4096 bytes. It tells a line at once,
but what is read key by key (a shell that edits its line) only when the buffer is full, the terminal's mode has changed,
or its reader has ended: a guest that is killed before has told nothing of it, and no setting changes that. UML's kernel
is a process on the host, so its copy of one branch is changed there: the buffer counts as full after each read.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Sequence

__all__ = ["always_full", "tell_at_once"]

_LONGEST = 4096
#: A comparison with the size of the buffer, by the opcodes 3D id and 81 /7 id of the instruction set reference, and
#: the jump that follows it if equal or not: 74 and 75 with 8 bits of distance, 0F 84 and 0F 85 with 32.
_FULL = re.compile(
    rb"(?:[\x48\x49](?:\x3d|\x81(?:[\xf8-\xff]|[\x78-\x7b\x7d-\x7f].|\x7c\x24.)))\x00\x10\x00\x00"
    rb"(?P<jump>[\x74\x75].|\x0f[\x84\x85].{4})",
    re.DOTALL,
)
_NO_OPERATION = b"\x90"


def always_full(code: bytes) -> tuple[int, bytes]:
    """Where in the function's code the jump lies that is taken when the buffer is not full, and what to put there.

    ValueError unless there is exactly one.
    """
    found = list(_FULL.finditer(code))
    if len(found) != 1:
        raise ValueError(f"the kernel's code has {len(found)} places where a full buffer is told, not one")
    jump = found[0]["jump"]
    if jump[0] == 0x74:
        fresh = b"\xeb" + jump[1:]
    elif jump[:2] == b"\x0f\x84":
        # One byte shorter than what it replaces, and its distance counts from its end.
        distance = (int.from_bytes(jump[2:], "little") + 1) & 0xFFFFFFFF
        fresh = b"\xe9" + distance.to_bytes(4, "little") + _NO_OPERATION
    else:
        fresh = _NO_OPERATION * len(jump)
    return found[0].start("jump"), fresh


def tell_at_once(processes: Sequence[int], where: bytes) -> None:
    """Change the kernel among a machine's `processes`; `where` is what its guest tells of the function: "START END".

    ValueError for code that is not known, OSError where the kernel's memory cannot be written.
    """
    if platform.machine() != "x86_64":
        raise ValueError(f"the code of kernels for {platform.machine()} is not known")
    start, end = (int(word, 16) for word in where.split())
    if not 0 < end - start <= _LONGEST:
        raise ValueError("the guest tells of no function")
    pid = next((pid for pid in processes if _holds_code(pid, start, end)), None)
    if pid is None:
        raise ValueError("no process of the guest holds its kernel's code")
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        at, fresh = always_full(os.pread(memory, end - start, start))
        if os.pwrite(memory, fresh, start + at) != len(fresh):
            raise ValueError("the kernel's code was not changed as a whole")
    finally:
        os.close(memory)


def _holds_code(pid: int, start: int, end: int) -> bool:
    """Whether a file's code is mapped there in the process (proc(5), maps). The walls' own processes do not tell."""
    with (
        contextlib.suppress(PermissionError, ProcessLookupError, FileNotFoundError),
        open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps,
    ):
        for line in maps:
            addresses, rights, *rest = line.split(maxsplit=5)
            low, high = (int(text, 16) for text in addresses.split("-"))
            if low <= start and end <= high:
                return rights == "r-xp" and rest[2] != "0"
    return False
