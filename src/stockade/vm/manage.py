"""Guests as a whole: their state, what they hold, wires between them, their disk as an image."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stockade import places
from stockade.errors import StateError, UsageError
from stockade.kernel.libc import syscall
from stockade.records.guest import GuestState
from stockade.records.image import Image
from stockade.records.publish import written

from . import control, cow, images, snapshots, sparse, store, whole

__all__ = ["check_walls", "flatten", "held_memory", "link", "state"]

_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_VM = 1
_LEAST_ROOM = 1 << 16
_NO_ROOM = (
    "the host's disk is full: the guest's file system goes read-only when it writes; make room, then start it again"
)
_WALLS = (("vm",), ("jail", "vm"), ("jail", "vm", "jail"), ("vm", "jail"))


def check_walls(walls: Sequence[str]) -> None:
    """UsageError for walls that no guest can have."""
    if tuple(walls) not in _WALLS:
        raise UsageError(
            f"`{','.join(walls)}` are no walls for a guest", hint="one of `vm`, `jail,vm`, `vm,jail` and `jail,vm,jail`"
        )


def state(name: str) -> GuestState:
    """What the guest is now."""
    guest = store.load(name)
    known = {}
    with contextlib.suppress(StateError):
        known = control.request(name, "status")
    last = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        last = json.loads((places.guest(name) / "last.json").read_bytes())
    return GuestState(
        name=name, image=guest.image,
        state="frozen" if known.get("frozen") else "running" if known else "stopped",
        walls=guest.walls, network=guest.network, pid=known.get("pid"), memory=guest.memory,
        memory_used=held_memory(known["processes"]) if known else None, disk=sparse.allocated(store.disk(name)),
        snapshots=len(snapshots.names(name)),
        publish=tuple(map(written, guest.publish)),
        status=known.get("status") if known else last.get("status"),
        cause=last.get("cause", ""), fault=last.get("fault", "") or (_NO_ROOM if known and _is_full(name) else ""),
    )  # fmt: skip


def _is_full(name: str) -> bool:
    """Whether UML, an ordinary user, can add nothing to the guest's disk."""
    room = os.statvfs(store.disk(name))
    return room.f_bavail * room.f_frsize < _LEAST_ROOM


def held_memory(processes: Sequence[int]) -> int:
    """Bytes that processes hold on the host, what they share counted once: Pss of proc(5), of each address space."""
    total = 0
    counted: list[int] = []
    for pid in processes:
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{pid}/smaps_rollup", encoding="ascii", errors="replace") as file,
        ):
            held = sum(int(line.split()[1]) for line in file if line.startswith("Pss:")) << 10
            # UML's helpers are processes that share its memory, and each has all of it as its own.
            if not any(_same_memory(pid, other) for other in counted):
                counted.append(pid)
                total += held
    return total


def _same_memory(one: int, other: int) -> bool:
    """kcmp(2): whether two processes have one address space."""
    arguments = (ctypes.c_int(one), ctypes.c_int(other), ctypes.c_int(_KCMP_VM), ctypes.c_ulong(0), ctypes.c_ulong(0))
    return syscall(_KCMP[platform.machine()], *arguments) == 0


def link(one: str, other: str) -> None:
    """Give two guests a wire to each other, from their next start on. StateError when they have one."""
    if one == other:
        raise UsageError("a guest has no wire to itself", hint="name two guests")
    first, second = store.load(one), store.load(other)
    if other in first.links and one in second.links:
        raise StateError(f"guests `{one}` and `{other}` have a wire already", hint="start them both")
    store.save(msgspec.structs.replace(first, links=tuple(dict.fromkeys((*first.links, other)))))
    store.save(msgspec.structs.replace(second, links=tuple(dict.fromkeys((*second.links, one)))))


def flatten(name: str, image_name: str) -> Image:
    """Make an image of the guest's disk as it is now; a running guest stands still while it is copied."""
    guest = store.load(name)
    base = images.load(guest.image)
    with whole.scratch(places.guest(name), "flatten") as scratch:
        copy = scratch / "disk.cow"
        with snapshots.held(guest):
            store.copy_disk(store.disk(name), copy, os.geteuid(), os.getegid())

        def fill(disk: Path) -> Image:
            cow.merge(copy, images.file(base.name), disk)
            return msgspec.structs.replace(base, origin="guest", source=name, created=0.0)

        return images.add(image_name, fill)
