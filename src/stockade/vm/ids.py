"""Who UML runs as: never root, and for root's guests an id of its own for each."""

from __future__ import annotations

import os
from collections.abc import Iterable

from stockade.contain.ids import allocate
from stockade.errors import HostError

__all__ = ["JAIL", "STEP", "choose"]

#: Ids of each guest: those of its jail, of which UML is the second. Nothing runs as the first, the jail's root.
STEP = 16
#: The jail of the kernel's program, whose range of ids the guests share out.
JAIL = "uml"


def choose(taken: Iterable[int]) -> tuple[int, int]:
    """uid and gid for a new guest; `taken` are those of the others. An ordinary user's guests are the user's own."""
    if os.geteuid() != 0:
        return os.getuid(), os.getgid()
    ids = allocate(JAIL)
    used = set(taken)
    for first in range(ids.first, ids.first + ids.count, STEP):
        if first + 1 not in used:
            return first + 1, first + 1
    raise HostError("there are no ids left for another guest", hint="`stockade guest rm` those that are not needed")
