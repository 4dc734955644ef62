"""The process outside that must stay out of reach: started beside a jail, it ends when its standard input does.

Runs by itself with nothing but Python's own library; it makes what the request names and takes all of it away again.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import struct
import sys
import threading
from typing import Any

_IPC_CREAT, _IPC_EXCL, _IPC_RMID = 0o1000, 0o2000, 0
_PR_SET_NAME = 15
_AT_FDCWD, _LARGEST_HANDLE = -100, 128

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p


def main() -> None:
    """Make the canaries, say where they are, wait for the end."""
    request = json.loads(sys.stdin.readline())
    marks: dict[str, str] = request["marks"]
    _rise_to(request["lowest_pid"])
    _libc.prctl(_PR_SET_NAME, request["comm"].encode(), 0, 0, 0)
    memory = ctypes.create_string_buffer(marks["memory"].encode())
    descriptor = os.memfd_create("canary")
    os.write(descriptor, marks["descriptor"].encode())
    made: dict[str, Any] = {
        "address": ctypes.addressof(memory), "length": len(memory), "descriptor": descriptor, "pid": os.getpid(),
    }  # fmt: skip
    made |= _listeners(request, marks) | {"handle": _handle(**request["handle"])}
    segment = _segment(request["shm_key"], marks["shared"])
    queue = request["queue"].encode()
    opened = _libc.mq_open(b"/" + queue, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644, None)
    made["shm"], made["mqueue"] = segment >= 0, opened >= 0
    try:
        sys.stdout.write(json.dumps(made) + "\n")
        sys.stdout.flush()
        select.select([sys.stdin], [], [])
    finally:
        if segment >= 0:
            _libc.shmctl(segment, _IPC_RMID, None)
        if opened >= 0:
            _libc.mq_unlink(b"/" + queue)


def _rise_to(lowest: int) -> None:
    """Go on in a child whose number is at least `lowest`: a low one may be a process of the jail's own too.

    Threads have numbers as well, and cost less.
    """
    if os.getpid() >= lowest:
        return
    reached: list[int] = [0]
    while 0 <= reached[-1] < lowest:
        thread = threading.Thread(target=lambda: reached.append(threading.get_native_id()))
        thread.start()
        thread.join()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)


def _handle(path: str, number: int) -> dict[str, object] | None:
    """name_to_handle_at(2), by its number, of `path`; None where the file system gives none."""
    handle = ctypes.create_string_buffer(_LARGEST_HANDLE.to_bytes(4, sys.byteorder), 8 + _LARGEST_HANDLE)
    mount = ctypes.c_int()
    arguments = (ctypes.c_int(_AT_FDCWD), os.fsencode(path), handle, ctypes.byref(mount), ctypes.c_int(0))
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        return None
    length, kind = struct.unpack_from("=Ii", handle.raw)
    return {"type": kind, "bytes": handle.raw[8 : 8 + length].hex()}


def _segment(key: int, mark: str) -> int:
    segment = int(_libc.shmget(key, 4096, _IPC_CREAT | _IPC_EXCL | 0o644))
    if segment >= 0:
        address = ctypes.c_void_p(_libc.shmat(segment, None, 0))
        ctypes.memmove(address, mark.encode(), len(mark))
        _libc.shmdt(address)
    return segment


def _listeners(request: dict[str, Any], marks: dict[str, str]) -> dict[str, int]:
    _serve(socket.AF_UNIX, "\0" + request["abstract"], marks["abstract"])
    return {
        "port4": _serve(socket.AF_INET, ("127.0.0.1", 0), marks["loopback"]),
        "port6": _serve(socket.AF_INET6, ("::1", 0), marks["loopback"]),
        "host_port": _serve(socket.AF_INET, (request["host_address"], 0), marks["address"])
        if request["host_address"] else 0,
    }  # fmt: skip


def _serve(family: int, address: str | tuple[str, int], mark: str) -> int:
    """Greet whoever connects with the mark; the port, 0 where there is none to have."""
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen()
    except OSError:
        return 0

    def greet() -> None:
        while True:
            link, _ = listener.accept()
            with link:
                link.sendall(mark.encode())

    threading.Thread(target=greet, daemon=True).start()
    return 0 if family == socket.AF_UNIX else int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
