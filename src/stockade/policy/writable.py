"""Places of a jail that are mounted writable: of what fails with EACCES there only owners and modes can be the cause.

Landlock's rules allow reading and executing everywhere, and writing in these places and in /proc (`contain.compile`).
Where a mount is read-only unlink(2), rename(2), mkdir(2) and the like fail with EROFS before owners and modes count.
"""

from __future__ import annotations

import os

import msgspec

from ..records.lock import Lock, LockDirectory
from ..records.spec import Directory, Mount, Spec
from ..records.text import unescape
from ..records.trace import Access
from . import changes
from .changes import Change

__all__ = ["Place", "handed_over", "mount_of", "refused", "writable_place"]

Place = Mount | LockDirectory


def _covers(target: str, path: str) -> bool:
    return path == target or path.startswith(f"{target}/")


def mount_of(path: str, spec: Spec) -> Mount | None:
    """The innermost mount of the host's that `path` is in."""
    found = [mount for mount in spec.mounts if _covers(mount.target, path)]
    return max(found, key=lambda mount: len(mount.target), default=None)


def writable_place(path: str, spec: Spec, lock: Lock) -> Place | None:
    """The innermost volume, tmpfs directory or mount that `path` is in; None where that is read-only."""
    mount = mount_of(path, spec)
    made = max(
        (found for found in lock.directories if _covers(unescape(found.path), path)),
        key=lambda found: len(unescape(found.path)), default=None,
    )  # fmt: skip
    if mount is not None and (made is None or len(mount.target) >= len(unescape(made.path))):
        return mount if mount.writable else None
    return made


def refused(user: str, place: Place | None) -> str:
    """Why owners and modes refuse in `place`, where Landlock does not; to root though it has the capability."""
    if isinstance(place, Mount):
        return (
            f"it is in `{place.source}` of the host, whose owners and modes do not let `{user}` do that: what belongs "
            "to none of the jail's ids, no capability of the jail's opens"
        )
    if place is not None and user != "root":
        return f"owners and modes in `{place.path}`, which is uid {place.uid}'s, do not let `{user}` do that"
    return "neither Landlock nor the lack of a capability refuses it: see its mode, and how its place is mounted"


def handed_over(access: Access, spec: Spec, place: Place | None) -> Change | None:
    """The change that gives the service's user the directory in which something was to be made or removed.

    None where it is not such a directory of the jail's own, or the user is root.
    """
    if not isinstance(place, LockDirectory) or spec.service.user == "root":
        return None
    path = unescape(place.path)
    if path != os.path.dirname(access.path):
        return None
    found = Directory(mode=f"{place.mode:04o}", kind="volume" if place.volume else "tmpfs")
    known = spec.directories.get(place.path, found)
    return changes.directory(path, msgspec.structs.replace(known, owner=spec.service.user))
