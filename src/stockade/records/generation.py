"""What a build gives: a generation of a jail, and the ids of its service."""

from __future__ import annotations

from pathlib import Path

import msgspec

from .lock import Lock

#: In a generation's directory: names of the exercises that passed inside before it became current.
EXERCISES = "exercises.json"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Ids with which a service runs, as numbers that its jail sees."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One built state of a jail, in `path`.

    `unresolved` holds the symlinks whose target is neither in the rootfs nor made at launch.
    """

    number: int
    path: Path
    lock: Lock
    unresolved: tuple[str, ...] = ()

    @property
    def rootfs(self) -> Path:
        """The tree that becomes `/`."""
        return self.path / "rootfs"
