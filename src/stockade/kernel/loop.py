"""Loop devices: whether the caller may mount a file system that lies in a file. Attaches nothing."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["REMEDIES", "lacking"]

_CONTROL = "/dev/loop-control"
_ALL_IDS = "0 0 4294967295"  # /proc/self/uid_map of the first user namespace (user_namespaces(7))

_ORDINARY = "the kernel mounts no file system in a file for an ordinary user"
_NAMESPACE = "the kernel mounts no file system in a file for root of a user namespace"
_NO_DEVICES = f"there are no loop devices: `{_CONTROL}` cannot be opened"

#: What to do about each reason that `lacking` gives.
REMEDIES = {
    _ORDINARY: "build and start the jail as root, or keep its state on a file system of its own, or one with a quota "
    "for the jail's ids",
    _NAMESPACE: "build and start the jail as root of the host, or keep its state on a file system of its own",
    _NO_DEVICES: f"`modprobe loop`; a container has to be given `{_CONTROL}` and the loop devices",
}


def lacking(*, root: bool | None = None) -> str:
    """Why no file system in a file can be mounted, "" where it can. `root`: for root or not (default: the caller)."""
    if not (os.geteuid() == 0 if root is None else root):
        return _ORDINARY
    if " ".join(Path("/proc/self/uid_map").read_text(encoding="ascii").split()) != _ALL_IDS:
        return _NAMESPACE
    try:
        os.close(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return _NO_DEVICES
    return ""
