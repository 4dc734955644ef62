"""The ids of an ordinary user's view: the own id as itself, 0 and the rest from the subordinate range."""

from __future__ import annotations

import shutil
import subprocess

from ..errors import HostError
from ..kernel.userns import Range

__all__ = ["apply", "segments"]

_TIMEOUT_S = 30


def segments(own: int, first: int, count: int) -> list[tuple[int, int, int]]:
    """Lines of a uid_map or gid_map (inside, outside, how many): `own` maps to itself, all else to `first` and on."""
    if own >= count:
        return [(0, first, count), (own, own, 1)]
    parts = [(0, first, own), (own, own, 1), (own + 1, first + own + 1, count - own - 1)]
    return [part for part in parts if part[2] > 0]


def apply(pid: int, ids: Range, *, uid: int, gid: int) -> None:
    """Map the ids of process `pid`'s user namespace by newuidmap(1) and newgidmap(1); HostError if refused."""
    for command, own, first in (("newuidmap", uid, ids.first_uid), ("newgidmap", gid, ids.first_gid)):
        program = shutil.which(command)
        if program is None:
            raise HostError(
                f"`{command}` is not installed, and without it a range of ids cannot be used",
                hint="install it: `apt-get install uidmap`",
            )
        numbers = [str(number) for part in segments(own, first, ids.count) for number in part]
        done = subprocess.run(
            [program, str(pid), *numbers],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise HostError(
                f"`{command}` refused the ids of `/etc/sub{command[3]}id`: {done.stderr.strip() or 'no message'}",
                hint=f"`{command}` must be setuid root or have its file capability "
                "(`apt-get install --reinstall uidmap`)",
            )
