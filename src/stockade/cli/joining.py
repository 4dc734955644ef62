"""A guest's console on this terminal."""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import tty

__all__ = ["LEAVE", "join"]

LEAVE = "Ctrl-]"  # as telnet(1) has it
_LEAVE_BYTE = b"\x1d"
_READ = 65536


def join(connection: socket.socket, *, keys: bool) -> bool:
    """Pass on what a console says, and with `keys` what is typed, until it ends or `LEAVE` is typed: then False.

    A terminal is raw meanwhile. The end of what is typed is as `LEAVE`.
    """
    connection.settimeout(None)
    wanted = [connection.fileno(), *([0] if keys else [])]
    before = termios.tcgetattr(0) if keys and sys.stdin.isatty() else None
    if before is not None:
        tty.setraw(0)
    try:
        while True:
            for ready in select.select(wanted, [], [])[0]:
                data = os.read(0, _READ) if ready == 0 else connection.recv(_READ)
                if not data or (ready == 0 and _LEAVE_BYTE in data):
                    return ready != 0
                if ready == 0:
                    connection.sendall(data)
                else:
                    os.write(1, data)
    finally:
        if before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
