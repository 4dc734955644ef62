"""What the probes are told before they start: places to try, never what stands there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from stockade.kernel import syscalls

from .canaries import LOWEST_PID, Canaries
from .probetree import REQUEST, ProbeTree

__all__ = ["NAMESPACES", "write"]

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user")

_TIME_LIMIT_S = 5.0
_NO_LIMITS = {"processes": None, "memory": None, "open_files": None, "cpus": None}


def write(
    tree: ProbeTree, canaries: Canaries, *, place: str, probes: tuple[str, ...], granted: int = 0,
    groups: tuple[int, ...] = (), masks: tuple[str, ...] = (), writable: tuple[str, ...] = (),
    launchers: tuple[str, ...] = (), tmpfs: tuple[str, ...] = (), volumes: tuple[str, ...] = (),
    sized: tuple[str, ...] = (), unknown_storage: bool = False, limits: dict[str, Any] | None = None,
    namespaces: dict[str, int] | None = None, disk: tuple[int, int] | None = None, beyond: Canaries | None = None,
    time_limit_s: float = _TIME_LIMIT_S,
) -> None:  # fmt: skip
    """Write the request for one run in which the tree is seen at `place`.

    `granted` is the mask of the policy's capabilities, `groups` the service's. `masks` are mounts that hide something,
    `writable` directories to write to, `launchers` paths of the launcher's program. For the limits: `tmpfs`, `sized`
    volumes and other `volumes` are writable places, `limits` numbers that are in force and small. `namespaces` and
    `disk` are those that must stay out of reach, by default the host's. `beyond` are the canaries of the host where
    `canaries` are those of a machine that the run is in. `time_limit_s` is for each probe.
    """
    architecture = syscalls.host_architecture()
    told = {
        "architecture": architecture, "numbers": syscalls.numbers(architecture), "probes": probes, "tree": place,
        "python": tree.command(place), "helpers": tree.helpers,
        "time_limit_s": time_limit_s, "lowest_pid": LOWEST_PID, "canary": canaries.told, "disk": disk or _disk(),
        "namespaces": namespaces or {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in NAMESPACES},
        "host_release": os.uname().release, "granted": granted,
        "groups": groups, "masks": masks, "writable": writable, "launchers": launchers, "tmpfs": tmpfs,
        "beyond": {"canary": (beyond or canaries).told, "disk": _disk()},
        "volumes": volumes, "sized": sized, "unknown_storage": unknown_storage, "limits": _NO_LIMITS | (limits or {}),
    }  # fmt: skip
    fresh = tree.path / f".{REQUEST}"
    fresh.write_text(json.dumps(told), encoding="utf-8")
    fresh.chmod(0o444)
    fresh.replace(tree.path / REQUEST)


def _disk() -> tuple[int, int] | None:
    """Major and minor number of the block device that holds the host's root; another disk's where it is on none."""
    device = os.stat("/").st_dev
    if Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").exists():
        return os.major(device), os.minor(device)
    for path in sorted(Path("/dev").glob("[svn][dv]*")):
        status = path.stat()
        if stat.S_ISBLK(status.st_mode):
            return os.major(status.st_rdev), os.minor(status.st_rdev)
    return None
