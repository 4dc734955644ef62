"""From a launch plan to the bytes that the warden reads. Decides nothing that the plan leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from struct import pack

from stockade.errors import HostError
from stockade.records.launch import (
    Bind,
    Filesystem,
    LaunchPlan,
    LogSocket,
    MakeDirectory,
    MakeFile,
    MakeSymlink,
    MountStep,
    ReadOnly,
)
from stockade.records.policy import CgroupPlan

from . import wire

__all__ = ["NAMESPACES", "encode", "fixed_attributes"]

# CLONE_NEW… of include/uapi/linux/sched.h, by the names of unshare(1).
NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}

# MOUNT_ATTR_… of include/uapi/linux/mount.h.
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _NOATIME = 1, 2, 4, 8, 16

# A service that does not live long is started anew more and more seldom.
_FIRST_DELAY_MS, _LONGEST_DELAY_MS, _LONG_LIFE_MS = 1_000, 60_000, 60_000

_WAYS = {"root-range": wire.MAP_DIRECT, "subid": wire.MAP_BY_HELPERS, "single": wire.MAP_SINGLE}


def encode(plan: LaunchPlan) -> bytes:
    """`plan` in the warden's format. HostError where newuidmap(1) is needed and missing."""
    return wire.plan([*_cgroup(plan.cgroup), *_walls(plan), *_service(plan)])


def _cgroup(plan: CgroupPlan | None) -> Iterator[bytes]:
    if plan is None:
        return
    for operation in plan.make:
        match operation.kind:
            case "directory":
                yield wire.text(wire.CGROUP_DIR, operation.path, numbers=(int(operation.kept),))
            case _:
                yield wire.text(wire.WRITE, operation.path, operation.value)
    for file in plan.join:
        yield wire.text(wire.CGROUP_JOIN, file)


def _walls(plan: LaunchPlan) -> Iterator[bytes]:
    if plan.chroot:
        yield wire.text(wire.CHROOT, plan.root)
        return
    yield wire.record(wire.NAMESPACES, sum(NAMESPACES[name] for name in plan.namespaces))
    yield from _ids(plan)
    for file, value in plan.sysctls:
        yield wire.text(wire.SYSCTL, file, value)
    # Through the idmap the files' owners on disk are the ids that the jail sees; an ordinary user's own the range.
    idmap = wire.TREE_IDMAP if plan.ids.kind == "root-range" else 0
    fixed = fixed_attributes(plan)
    yield wire.text(wire.ROOT, plan.root, numbers=(wire.TREE_OWN | idmap, fixed | _NOSUID | _NODEV))
    for step in plan.mounts:
        yield _mount(step, fixed)
    yield wire.text(wire.HOSTNAME, plan.hostname)
    if plan.loopback:
        yield wire.record(wire.LOOPBACK)


def _ids(plan: LaunchPlan) -> Iterator[bytes]:
    ids = plan.ids
    yield wire.record(wire.MAP_WAY, _WAYS[ids.kind])
    yield wire.record(wire.MAP, 0, plan.inside_uid, ids.first, ids.count)
    yield wire.record(wire.MAP, 1, plan.inside_gid, ids.first_gid, ids.count)
    if ids.kind == "subid":
        yield wire.text(wire.MAP_HELPERS, _helper("newuidmap"), _helper("newgidmap"))


def _helper(name: str) -> str:
    import shutil  # root needs no helper

    path = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin")
    if path is None:
        raise HostError(f"`{name}` is not installed", hint="`apt-get install uidmap` brings it")
    return path


def fixed_attributes(plan: LaunchPlan) -> int:
    """Attributes of a tree that is read-only: no time of access can be kept there, and noatime saves each read a try.

    In a mount namespace of their own ordinary users may not change how these times are kept (MNT_LOCK_ATIME).
    """
    return _RDONLY | (_NOATIME if plan.ids.kind == "root-range" else 0)


def _mount(step: MountStep, fixed: int) -> bytes:
    match step:
        case Bind():
            return wire.text(wire.BIND, step.source, step.target, numbers=_bind_numbers(step, fixed))
        case Filesystem():
            # The terminals of a devpts are devices, and nodev would refuse to open them.
            attributes = (
                _NOSUID
                | (0 if step.type == "devpts" else _NODEV)
                | (0 if step.executable else _NOEXEC)
                | (0 if step.writable else _RDONLY)
            )
            numbers = attributes, wire.TREE_OPTIONAL if step.optional else 0
            return wire.text(wire.MOUNT, step.type, step.target, *step.options, numbers=numbers)
        case MakeDirectory():
            return wire.text(wire.MKDIR, step.path, numbers=(step.mode, step.uid, step.gid))
        case MakeFile():
            return wire.text(wire.MKFILE, step.path)
        case MakeSymlink():
            return wire.text(wire.SYMLINK, step.target, step.path)
        case ReadOnly():
            return wire.text(wire.READONLY, step.path, numbers=(wire.TREE_OPTIONAL if step.optional else 0,))
        case LogSocket():
            return wire.text(wire.LOG_SOCKET, step.path)


def _bind_numbers(step: Bind, fixed: int) -> tuple[int, int]:
    flags = (
        (wire.TREE_OWN if step.own else 0)
        | (wire.TREE_VOLUME if step.volume else 0)
        | (wire.TREE_SIZED if step.sized else 0)
        | (wire.TREE_SUBMOUNTS if step.submounts else 0)
        | (wire.TREE_OPTIONAL if step.optional else 0)
    )
    attributes = _NOSUID | (0 if step.device else _NODEV) | (0 if step.writable else fixed)
    attributes |= _NOEXEC if step.device or not step.executable else 0
    return flags, attributes


def _service(plan: LaunchPlan) -> Iterator[bytes]:
    for limit in plan.limits:
        yield wire.record(wire.RLIMIT, limit.resource, limit.soft, limit.hard)
    yield wire.record(wire.IDS, plan.uid, plan.gid)
    yield wire.record(wire.GROUPS, payload=pack(f"={len(plan.groups)}I", *plan.groups))
    yield wire.record(wire.CAPABILITIES, plan.capabilities)
    yield wire.record(wire.UMASK, plan.umask)
    yield wire.text(wire.DIRECTORY, plan.directory)
    for name, value in plan.environment:
        yield wire.text(wire.ENV, f"{name}={value}")
    yield wire.text(wire.ARGV, *plan.argv)
    if plan.forks:
        yield wire.record(wire.FORKS)
    if plan.restart != "no":
        when = wire.RESTART_ALWAYS if plan.restart == "always" else wire.RESTART_ON_FAILURE
        yield wire.record(wire.RESTART, when, _FIRST_DELAY_MS, _LONGEST_DELAY_MS, _LONG_LIFE_MS)
    if plan.landlock is not None:
        ruleset = plan.landlock
        yield wire.record(wire.LANDLOCK, ruleset.handled_fs, ruleset.handled_net, ruleset.scoped)
        for rule in ruleset.rules:
            yield wire.text(wire.LANDLOCK_PATH, rule.path, numbers=(rule.access, 1))
        for port in ruleset.ports:
            yield wire.record(wire.LANDLOCK_PORT, port.access, port.port)
    for program in plan.seccomp:
        yield wire.record(wire.SECCOMP, 0, payload=program)
