"""The launch plan: all that the warden needs to put walls around a service, as data."""

from __future__ import annotations

from typing import Literal

import msgspec

from .policy import CgroupPlan, LandlockPlan, ResourceLimit


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    pass


class IdRange(_Record, frozen=True, kw_only=True):
    """Host ids that a jail's ids are mapped to.

    root-range: `count` ids from `first` (uid) and `first_gid`, mapped by root. subid: the same from the caller's
    subordinate ranges, mapped by newuidmap(1). single: one id, the caller's own, seen inside as the service's.
    """

    first: int
    count: int
    kind: Literal["root-range", "subid", "single"]
    first_gid: int


class _Step(_Record, frozen=True, kw_only=True, tag=True, tag_field="step"):
    pass


class Bind(_Step, frozen=True, kw_only=True):
    """Mount `source` of the host on `target` of the jail, without setuid and (but for a device) without devices.

    own: Stockade made the source, and no symlink may lie on it. volume: state, which `ephemeral` puts aside: a
    directory, or a file with an ext4 file system in it; sized: it must be such a file. submounts: with the mounts
    below it. optional: skipped where either path is missing. executable: programs in it can be executed.
    """

    source: str
    target: str
    writable: bool = False
    own: bool = False
    volume: bool = False
    sized: bool = False
    executable: bool = True
    device: bool = False
    submounts: bool = False
    optional: bool = False


class Filesystem(_Step, frozen=True, kw_only=True):
    """Mount a new file system on `target`; options as in mount(8). Always without setuid and devices.

    optional: skipped where the target is missing.
    """

    type: str
    target: str
    options: tuple[str, ...] = ()
    executable: bool = False
    writable: bool = True
    optional: bool = False


class MakeDirectory(_Step, frozen=True, kw_only=True):
    """Make a directory on a new file system, or give the one that is there this mode and owner (ids inside)."""

    path: str
    mode: int
    uid: int = 0
    gid: int = 0


class MakeFile(_Step, frozen=True, kw_only=True):
    """Make an empty file, to mount something on."""

    path: str


class MakeSymlink(_Step, frozen=True, kw_only=True):
    path: str
    target: str


class ReadOnly(_Step, frozen=True, kw_only=True):
    """Make what is seen at `path` read-only."""

    path: str
    optional: bool = False


class LogSocket(_Step, frozen=True, kw_only=True):
    """A datagram socket at `path` that the supervisor reads into the log."""

    path: str


MountStep = Bind | Filesystem | MakeDirectory | MakeFile | MakeSymlink | ReadOnly | LogSocket


class LaunchPlan(_Record, frozen=True, kw_only=True):
    """Everything about a launch that stays the same from one to the next.

    `root` is the source of `/`, relative to the generation. `namespaces` are names as in unshare(1). `sysctls`
    are files and values, written by the jail's root in its own namespaces. `seccomp` are programs of struct
    sock_filter. With `chroot` there are no namespaces and no mounts: `root` is only changed to.
    """

    name: str
    hostname: str
    root: str = "rootfs"
    chroot: bool = False
    namespaces: tuple[str, ...] = ()
    ids: IdRange
    inside_uid: int = 0                   # of the one id, for a single map
    inside_gid: int = 0
    mounts: tuple[MountStep, ...] = ()
    sysctls: tuple[tuple[str, str], ...] = ()
    loopback: bool = False
    limits: tuple[ResourceLimit, ...] = ()
    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    directory: str = "/"
    umask: int = 0o022
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    capabilities: int = 0                 # mask
    forks: bool = False
    restart: Literal["no", "on-failure", "always"] = "no"
    landlock: LandlockPlan | None = None
    seccomp: tuple[bytes, ...] = ()
    cgroup: CgroupPlan | None = None
