"""What a launch is allowed, compiled: capability sets, system call verdicts, Landlock rules, limits."""

from __future__ import annotations

from typing import Literal

import msgspec


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    pass


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_bytes(size: str) -> int:
    """Bytes of a size as specs write it: digits, and K, M, G or T for powers of 1024."""
    return int(size.rstrip("KMGT")) * _UNITS.get(size[-1], 1)


class CapabilitySets(_Record, frozen=True, kw_only=True):
    """The five capability sets of a process, as bit masks (capabilities(7))."""

    bounding: int = 0
    permitted: int = 0
    effective: int = 0
    inheritable: int = 0
    ambient: int = 0


class Verdict(_Record, frozen=True, kw_only=True):
    """What the filter does with one system call.

    outcome: "allowed"; "conditional": allowed with the arguments that `why` tells, otherwise
    refused with one of `errnos`; "refused": always with the one of `errnos`.
    """

    name: str
    outcome: Literal["allowed", "conditional", "refused"]
    errnos: tuple[str, ...] = ()
    group: str = ""          # the group of presets that it stands in, "" for an unknown call
    why: str
    never: bool = False      # no policy can allow it

    @property
    def cure(self) -> str:
        """The line of a spec that allows the call; empty where it is allowed or never can be."""
        if self.outcome != "refused" or self.never:
            return ""
        return f'policy.syscalls.add = ["{self.name}"]'


class LandlockRule(_Record, frozen=True, kw_only=True):
    """Access rights (a mask of LANDLOCK_ACCESS_FS_*) at and below one path, as seen inside the jail."""

    path: str
    access: int


class LandlockPort(_Record, frozen=True, kw_only=True):
    """Access rights (a mask of LANDLOCK_ACCESS_NET_*) of one TCP port."""

    port: int
    access: int


class LandlockPlan(_Record, frozen=True, kw_only=True):
    """One ruleset of Landlock, as landlock_create_ruleset(2) and landlock_add_rule(2) take it.

    `attribute_size` is the size of struct landlock_ruleset_attr that this ABI knows. `lacking`
    says what a later ABI would restrict and this one leaves to the other walls.
    """

    abi: int
    attribute_size: int
    handled_fs: int
    handled_net: int = 0
    scoped: int = 0
    rules: tuple[LandlockRule, ...] = ()
    ports: tuple[LandlockPort, ...] = ()
    lacking: tuple[str, ...] = ()


class ResourceLimit(_Record, frozen=True, kw_only=True):
    """One limit of setrlimit(2). `resource` is the number of RLIMIT_*, `name` its lower-case rest."""

    name: str
    resource: int
    soft: int
    hard: int


class NotLimited(_Record, frozen=True, kw_only=True):
    """A limit of the spec (`memory`, …) that cannot be set on this host, why, and what would help ("": nothing)."""

    limit: str
    reason: str
    remedy: str = ""


class CgroupLayout(_Record, frozen=True, kw_only=True):
    """Where and how the caller can make control groups on this host.

    version: 2, 1 (also where a version 2 tree without controllers stands beside it), or 0 for nowhere, which
    `reason` explains. `controllers`: the directory below which a jail's is made, by controller; with
    version 2 the same for all. `enable`: whether its `cgroup.subtree_control` may be written. `manager`: which service
    manager hands out a scope, "" for none. `files`: optional kernel files that exist. `swap`: there is swap in use.
    """

    version: Literal[0, 1, 2] = 0
    controllers: dict[str, str] = {}
    base: str = ""
    enable: bool = False
    manager: Literal["", "system", "user"] = ""
    files: tuple[str, ...] = ()
    swap: bool = False
    reason: str = ""


class CgroupOperation(_Record, frozen=True, kw_only=True):
    """One step on the cgroup file system.

    directory: make `path`, no error if it exists; `kept`: it is not for the jail's end to remove.
    write: write `value` to the file `path`; "0" in a cgroup.procs is the writer itself. kill: write,
    to a file that only newer kernels have. remove: remove the directory `path` if it is there.
    """

    kind: Literal["directory", "write", "kill", "remove"]
    path: str
    value: str = ""
    kept: bool = False

    def __str__(self) -> str:
        match self.kind:
            case "directory":
                return f"make the cgroup `{self.path}`"
            case "remove":
                return f"remove the cgroup `{self.path}`"
            case _:
                return f"write `{self.value}` to `{self.path}`"


class CgroupPlan(_Record, frozen=True, kw_only=True):
    """How one jail is limited by control groups: pure data, carried out by the launch.

    The launch runs under the command `wrapper` (() where none is needed), carries out `make` outside,
    in order, and has the pid of the jail's first process written to each file of `join`. `remove`
    undoes it once the jail has ended or was left behind. `directories` are the jail's own, by
    controller, for `usage`. `not_limited`: what the spec limits and this host cannot: a finding, never silence.
    """

    version: Literal[0, 1, 2] = 0
    wrapper: tuple[str, ...] = ()
    make: tuple[CgroupOperation, ...] = ()
    join: tuple[str, ...] = ()
    remove: tuple[CgroupOperation, ...] = ()
    directories: dict[str, str] = {}
    not_limited: tuple[NotLimited, ...] = ()


class Usage(_Record, frozen=True, kw_only=True):
    """What a jail uses; None where the host has no controller that knows."""

    memory_bytes: int | None = None
    cpu_seconds: float | None = None
    processes: int | None = None
    oom_kills: int | None = None
