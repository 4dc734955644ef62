"""Write seeds into the tree that is `/` of the calling process. Never follows a symlink at a seed's own place."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import os
import stat
from typing import TypedDict

__all__ = ["OVERFLOW_ID", "SeedMessage", "closed_above", "own", "place", "plant"]

#: What an id without a mapping reads as (user_namespaces(7), /proc/sys/kernel/overflowuid).
OVERFLOW_ID = 65534


class SeedMessage(TypedDict):
    """A seed as it crosses the channel: content in base64."""

    path: str
    type: str
    content: str
    mode: int
    uid: int
    gid: int
    target: str


@functools.cache
def _all_ids() -> bool:
    """Whether this is the initial user namespace, in which 65534 is an id like any other."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() == ["0", "0", "4294967295"]


def own(path: str, uid: int, gid: int) -> None:
    """chown(2) without following a symlink; an id that has no mapping here becomes root's, or stays the caller's."""
    wanted = [uid, gid] if _all_ids() else [0 if number == OVERFLOW_ID else number for number in (uid, gid)]
    # EINVAL: the namespace maps the caller's own id only.
    try:
        os.chown(path, *wanted, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM) or os.geteuid() == 0:
            raise


def place(path: str) -> str:
    """Where the host has `path`: symlinks above it are followed, not one in its own place."""
    above, name = os.path.split(path)
    return f"{os.path.realpath(above).rstrip('/')}/{name}"


def closed_above(seed: SeedMessage) -> str:
    """The outermost directory on the way to a seed in which the caller may not look around; "" if there is none.

    An overlay looks into its lower directory with the rights of who mounted it (overlayfs.rst, "Permission model").
    """
    steps = place(seed["path"] + "/." if seed["type"] == "directory" else seed["path"]).split("/")[1:-1]
    for count in range(1, len(steps) + 1):
        path = "/" + "/".join(steps[:count])
        if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
            return path
    return ""


def plant(seed: SeedMessage) -> None:
    """Make one seed, and missing parents as root's 0755; what stands in a file's place is replaced."""
    path = seed["path"]
    _directories(os.path.dirname(path))
    if seed["type"] == "directory":
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
    else:
        _clear(path)
        if seed["type"] == "symlink":
            os.symlink(seed["target"], path)
            own(path, seed["uid"], seed["gid"])
            return
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(base64.b64decode(seed["content"]))
    own(path, seed["uid"], seed["gid"])
    os.chmod(path, seed["mode"])
    if seed["type"] == "file":
        # As the build does it. Programs treat a file of this moment as unfinished (postfix waits for its main.cf).
        os.utime(path, (0, 0))


def _directories(path: str) -> None:
    """Make `path` and what is missing above it: directories of the view's root, whoever the caller is."""
    if not os.path.lexists(path):
        _directories(os.path.dirname(path))
        os.mkdir(path, 0o755)
        own(path, 0, 0)


def _clear(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            os.rmdir(path)
        else:
            os.unlink(path)
