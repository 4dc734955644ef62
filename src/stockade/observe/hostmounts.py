"""The host's mounts, as /proc/self/mountinfo lists them, and which of them a view must show. Mounts nothing."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

__all__ = ["FRESH", "HostMount", "parse", "visible"]

#: File systems that hold no files of the host's: kernel interfaces and what a view makes afresh.
_INTERFACES = frozenset((
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs",
    "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "rpc_pipefs", "securityfs", "selinuxfs", "smackfs",
    "sysfs", "tracefs",
))  # fmt: skip

#: Trees that a view makes afresh, whatever the host has mounted there.
FRESH = ("/dev", "/proc", "/run", "/sys", "/tmp")

_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class HostMount:
    """One line of mountinfo (proc(5)). `flags` are the per-mount options, such as "ro" and "nosuid"."""

    id: int
    point: str
    fstype: str
    flags: frozenset[str]


def parse(text: bytes) -> tuple[HostMount, ...]:
    """The mounts of a mountinfo file, in its order."""
    mounts = []
    for line in text.splitlines():
        fields = line.split(b" ")
        dash = fields.index(b"-", 6)
        mounts.append(
            HostMount(
                id=int(fields[0]),
                point=os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), fields[4])),
                fstype=fields[dash + 1].decode("ascii", "replace"),
                flags=frozenset(fields[5].decode("ascii", "replace").split(",")),
            )
        )
    return tuple(mounts)


def visible(mounts: tuple[HostMount, ...]) -> tuple[HostMount, ...]:
    """The mounts with files of the host's, `/` first, parents before children; the last of one place wins."""
    chosen = {
        mount.point: mount
        for mount in mounts
        if mount.fstype not in _INTERFACES
        and not any(mount.point == top or mount.point.startswith(f"{top}/") for top in FRESH)
    }
    return tuple(chosen[point] for point in sorted(chosen, key=lambda point: (point != "/", point.split("/"))))
