"""Run a function in a forked child, so that what it does to its process stays there."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_NUMBER = {"x86_64": 317, "aarch64": 277}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def system_call(number: int, *arguments: int) -> str:
    """Make one call; "0" for any success, else the name of the errno."""
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments))
    return "0" if result != -1 else errno.errorcode[ctypes.get_errno()]


def load_filter(program: bytes) -> None:
    """no_new_privs, then the filter, for the calling thread."""
    description = _Program(len(program) // 8, program)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    number = SECCOMP_NUMBER[os.uname().machine]
    if libc.syscall(ctypes.c_long(number), SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(description)) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def in_child(function: Callable[[], Any], *, timeout_s: float = 20.0) -> Any:
    """The (JSON) result of `function` in a forked child; ("signal", N) when a signal ended it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            os.write(writer, json.dumps(function()).encode())
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    try:
        text = b"".join(_chunks(reader, timeout_s))
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return ("signal", os.WTERMSIG(status))
    assert status == 0, f"the child failed with {status:#x}"
    return json.loads(text)


def _chunks(reader: int, timeout_s: float) -> Iterator[bytes]:
    while True:
        readable, _, _ = select.select([reader], [], [], timeout_s)
        if not readable:
            raise TimeoutError(f"the child said nothing for {timeout_s} s")
        chunk = os.read(reader, 65536)
        if not chunk:
            return
        yield chunk
