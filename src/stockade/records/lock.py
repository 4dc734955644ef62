"""The exact result of a build, path by path."""

from __future__ import annotations

import msgspec

from .closure import Evidence, FileType

LOCK_VERSION = 1


class LockEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One path of the rootfs as it was made.

    Paths and targets are escaped by `records.text.escape`. A generated secret has neither digest
    nor size. `mtime` is in whole seconds.
    """

    path: str
    type: FileType
    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    sha256: str = ""
    target: str = ""
    secret: bool = False
    capabilities: str = ""    # the file's `security.capability`, hexadecimal
    source: str = ""          # host path, when it was copied and differs from `path`
    package: str = ""
    package_version: str = ""
    evidence: tuple[Evidence, ...] = ()


class LockDirectory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A directory that the launch makes: on a tmpfs, or as a volume's mount point.

    `size` (bytes) and `inodes` (files) are a volume's limits; 0: none, for inodes of a volume with a size as many as
    go with it.
    """

    path: str
    mode: int
    uid: int = 0
    gid: int = 0
    volume: str = ""          # name of the volume mounted here, "" for a tmpfs directory
    size: int = 0
    inodes: int = 0


class LockedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The spec that the lock was made from, by digest."""

    name: str
    sha256: str


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """What a rootfs holds and why. Two builds from one host and one spec give the same bytes."""

    version: int = LOCK_VERSION
    spec: LockedSpec
    architecture: str
    entries: tuple[LockEntry, ...] = ()
    directories: tuple[LockDirectory, ...] = ()
    devices: tuple[str, ...] = ()
    proc: str = "none"        # "none", "pid" (subset=pid), "full"
    syslog: bool = False
    capabilities: tuple[str, ...] = ()   # what the service may use; the plan grants exactly these
    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()
    false_positives: tuple[tuple[str, int], ...] = ()   # reason, count
