"""From a spec and a lock to the launch plan. Starts nothing; reads only the jail's own passwd and group files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stockade.errors import SpecError
from stockade.kernel import capabilities, landlock, seccomp
from stockade.kernel.rlimits import rlimits
from stockade.records.launch import (
    Bind,
    Filesystem,
    IdRange,
    LaunchPlan,
    LogSocket,
    MakeDirectory,
    MakeFile,
    MakeSymlink,
    MountStep,
    ReadOnly,
)
from stockade.records.lock import Lock, LockDirectory
from stockade.records.policy import CgroupPlan, LandlockPlan, ResourceLimit, size_bytes
from stockade.records.spec import Mount, Spec
from stockade.records.text import unescape

from .identity import Account, account
from .limiting import lacking

__all__ = ["compile_plan"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_TMPFS_BYTES = 256 << 20
_TMPFS_INODES = 65536
_TTY_GID = 5

# What a full /proc shows beyond processes: hidden by an empty directory, hidden by /dev/null, or read-only. After the
# lists of the OCI runtimes ("maskedPaths" and "readonlyPaths"), with what tells of the host's boot and hardware, and
# without what no kernel has any more or only the host's root may open (kmsg, kpagecount).
_PROC_EMPTY = ("acpi", "asound", "scsi", "driver")
_PROC_NULL = ("kcore", "keys", "latency_stats", "timer_list", "kallsyms", "config.gz", "cmdline", "interrupts")
_PROC_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")

_ANYWHERE: tuple[landlock.Access, ...] = ("read", "execute")
_WRITABLE: tuple[landlock.Access, ...] = (*_ANYWHERE, "write")
# Truncating what is mounted read-only fails with EROFS before Landlock is asked (vfs_truncate() of fs/open.c).
_READ_ONLY: tuple[landlock.Access, ...] = (*_ANYWHERE, "truncate")
# Of the rootfs's top directories those that hold programs, libraries and configuration.
_SYSTEM = frozenset({"bin", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr"})

_DEVICE_LINKS = (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"))
_MADE_DEVICES = frozenset({"ptmx", "pts", "shm", "fd", "stdin", "stdout", "stderr", "mqueue", "log", "console"})


def compile_plan(
    spec: Spec, lock: Lock, *, generation: Path, volumes: Path, ids: IdRange, cgroup: CgroupPlan | None = None,
    allow_ptrace: bool = False, extra: tuple[MountStep, ...] = (),
) -> LaunchPlan:  # fmt: skip
    """The plan for the jail in `generation`, whose volumes lie in `volumes` and whose ids are `ids`.

    `cgroup` holds the limits that control groups keep. `allow_ptrace` is for a service that is a tracer itself.
    `extra` are mounts beyond those of spec and lock, made after its directories.
    SpecError where the spec asks for what walls cannot give.
    """
    service = spec.service
    who = account(generation / "rootfs", service.user, service.group, service.groups)
    granted = lock.capabilities if spec.policy.capabilities == "auto" else spec.policy.capabilities
    if spec.walls == ("chroot",):
        return _chroot(spec, who, ids, cgroup)
    _refuse_impossible(spec, who, ids)
    _refuse_shared(lock)
    single = ids.kind == "single"
    mounts = tuple(_owned_by(who, step) if single else step for step in _mounts(spec, lock, volumes, ids, extra))
    return LaunchPlan(
        name=spec.name,
        hostname=spec.hostname or spec.name,
        namespaces=_namespaces(spec),
        ids=ids,
        inside_uid=who.uid if single else 0,
        inside_gid=who.gid if single else 0,
        mounts=mounts,
        sysctls=_sysctls(spec),
        loopback=spec.network.mode != "host",
        limits=_limits(spec, cgroup),
        cgroup=cgroup,
        argv=service.command,
        environment=_environment(spec, who),
        directory=service.directory,
        umask=int(service.umask, 8),
        uid=who.uid,
        gid=who.gid,
        groups=() if single else who.groups,
        capabilities=capabilities.mask(granted),
        forks=service.forks,
        restart=service.restart,
        landlock=_landlock(lock, mounts) if spec.policy.landlock else None,
        seccomp=_seccomp(spec, lock, granted, allow_ptrace=allow_ptrace),
    )


def _chroot(spec: Spec, who: Account, ids: IdRange, cgroup: CgroupPlan | None) -> LaunchPlan:
    """The plain chroot: change the root, give groups, gid and uid up; nothing else is new."""
    if who.uid == 0:
        raise SpecError(
            '`walls = ["chroot"]` gives root up, and the service is to run as root',
            hint='name another user in `service.user`, or use `walls = ["jail"]`',
        )
    return LaunchPlan(
        name=spec.name, hostname=spec.name, chroot=True, ids=ids, limits=_limits(spec, cgroup), cgroup=cgroup,
        argv=spec.service.command, environment=_environment(spec, who), directory=spec.service.directory,
        umask=int(spec.service.umask, 8),
        uid=who.uid, gid=who.gid, groups=who.groups, forks=spec.service.forks, restart=spec.service.restart,
    )  # fmt: skip


def _refuse_impossible(spec: Spec, who: Account, ids: IdRange) -> None:
    if ids.kind == "single" and who.uid == 0:
        raise SpecError(
            "the service is to run as root, and the caller has no range of ids: root of the jail would be the caller",
            hint="name another user in `service.user`, or get a range: `stockade doctor` has the command",
        )
    for kind, number in (("uid", who.uid), ("gid", who.gid)):
        if ids.kind != "single" and number >= ids.count:
            raise SpecError(
                f"the service's {kind} {number} is not below the jail's {ids.count} ids",
                hint="give the account a lower number in `accounts`",
            )


def _refuse_shared(lock: Lock) -> None:
    """A name that the spec gives to one volume may be what another has by default."""
    paths: dict[str, str] = {}
    for found in lock.directories:
        if found.volume and paths.setdefault(found.volume, found.path) != found.path:
            raise SpecError(
                f"`{unescape(paths[found.volume])}` and `{unescape(found.path)}` are both the volume `{found.volume}`",
                hint="give one of them another name: `volume` in `directories`",
            )


def _namespaces(spec: Spec) -> tuple[str, ...]:
    names = ("user", "mount", "pid", "ipc", "uts", "cgroup")
    return names if spec.network.mode == "host" else (*names, "net")


def _sysctls(spec: Spec) -> tuple[tuple[str, str], ...]:
    inner = (("/proc/sys/user/max_user_namespaces", "0"),)
    if spec.network.mode == "host":
        return inner
    # In a network of its own every port is the service's.
    return (*inner, ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"))


def _limits(spec: Spec, cgroup: CgroupPlan | None) -> tuple[ResourceLimit, ...]:
    """A number of processes that no control group limits is left to RLIMIT_NPROC."""
    elsewhere = cgroup is not None and not any(missing.limit == "processes" for missing in cgroup.not_limited)
    return rlimits(spec.limits, processes=not elsewhere)


def _environment(spec: Spec, who: Account) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(({"PATH": PATH} | who.variables() | spec.service.environment).items()))


def _seccomp(spec: Spec, lock: Lock, granted: tuple[str, ...], *, allow_ptrace: bool) -> tuple[bytes, ...]:
    calls = spec.policy.syscalls
    program = seccomp.compile_filter(
        calls.preset, calls.add, calls.remove, architecture=lock.architecture, chroot="sys_chroot" in granted,
        allow_ptrace=allow_ptrace,
    )  # fmt: skip
    return (program,) if program else ()


def _landlock(lock: Lock, mounts: tuple[MountStep, ...]) -> LandlockPlan | None:
    """Everything may be read and executed as the mounts let it; written only where something writable is mounted.

    For each open the kernel looks for rules from the file upwards until all that it asks for is granted, and it asks
    for the right to truncate too (hook_file_open() of security/landlock/fs.c). So the places in which services open
    files as they serve have rules that grant it all, or each open would look as far as the root directory. What is
    opened at the start has none: each rule makes every lookup a little longer.
    """
    directories = {unescape(entry.path) for entry in lock.entries if entry.type == "directory"}
    tops = dict.fromkeys(unescape(entry.path).split("/")[1] for entry in lock.entries if entry.type == "file")
    grants = [landlock.Grant(path="/", access=_ANYWHERE), landlock.Grant(path="/dev", access=("device",))]
    own = [f"/{top}" for top in tops if top not in _SYSTEM and f"/{top}" in directories]
    grants += [landlock.Grant(path=path, access=_READ_ONLY) for path in own]
    for step in mounts:
        match step:
            case Filesystem(type="tmpfs" | "mqueue", writable=True) if step.target != "/dev":
                grants.append(landlock.Grant(path=step.target, access=_WRITABLE))
            case Filesystem(type="proc"):
                grants.append(landlock.Grant(path=step.target, access=_WRITABLE))
            case Bind(device=False, optional=False):
                is_directory = step.volume or step.target in directories or os.path.isdir(step.source)
                access = _WRITABLE if step.writable else _READ_ONLY
                grants.append(landlock.Grant(path=step.target, access=access, directory=is_directory))
            case _:
                pass
    return landlock.ruleset(landlock.abi(), grants)


def _owned_by(who: Account, step: MountStep) -> MountStep:
    """With one id everything that is made is the service's: no other id exists in there."""
    if not isinstance(step, MakeDirectory):
        return step
    return MakeDirectory(path=step.path, mode=step.mode, uid=who.uid, gid=who.gid)


def _mounts(
    spec: Spec, lock: Lock, volumes: Path, ids: IdRange, extra: tuple[MountStep, ...]
) -> Iterator[MountStep]:
    placed: list[tuple[str, LockDirectory | Mount]] = [(unescape(found.path), found) for found in lock.directories]
    placed += [(mount.target, mount) for mount in spec.mounts]
    placed.sort(key=lambda one: one[0].split("/"))
    yield from _directories(spec, placed, volumes, sized=not lacking(ids))
    yield from extra
    yield from _proc(lock)
    yield from _dev(spec, lock, ids)


def _directories(
    spec: Spec, placed: list[tuple[str, LockDirectory | Mount]], volumes: Path, *, sized: bool
) -> Iterator[MountStep]:
    """Outer before inner, or the outer one would hide it: a tmpfs where nothing above is one already, else a directory
    on it. Nothing is made in what is mounted from the host, and for a mount nothing in a volume."""
    tops: list[str] = []
    mounts: list[str] = []
    kept: list[str] = []
    for path, found in placed:
        within = _innermost(path, (*tops, *mounts)) in tops
        if isinstance(found, Mount):
            mounts.append(path)
            if _innermost(path, (*tops, *mounts, *kept)) in tops:
                yield from _above(path, tops)
                is_directory = os.path.isdir(found.source)
                yield MakeDirectory(path=path, mode=0o755) if is_directory else MakeFile(path=path)
            yield Bind(source=found.source, target=path, writable=found.writable, submounts=True)
            continue
        if within:
            yield from _above(path, tops)
            yield MakeDirectory(path=path, mode=found.mode, uid=found.uid, gid=found.gid)
        if found.volume:
            kept.append(path)
            yield Bind(
                source=f"{volumes}/{found.volume}", target=path, writable=True, own=True, volume=True,
                sized=sized and found.size > 0,
            )  # fmt: skip
        elif not within:
            tops.append(path)
            yield Filesystem(type="tmpfs", target=path, options=_tmpfs_options(spec, path), executable=True)
            yield MakeDirectory(path=path, mode=found.mode, uid=found.uid, gid=found.gid)


def _innermost(path: str, places: tuple[str, ...]) -> str:
    """The one of `places` that `path` lies in, and no other that lies in it too; "" for none."""
    return max((place for place in places if path.startswith(f"{place}/")), key=len, default="")


def _above(path: str, tops: list[str]) -> Iterator[MountStep]:
    """Directories between the tmpfs and `path` that the lock does not list: root's, as mkdir -p makes them."""
    top = max((top for top in tops if path.startswith(f"{top}/")), key=len)
    parts = path[len(top) + 1 :].split("/")[:-1]
    for count in range(1, len(parts) + 1):
        yield MakeDirectory(path="/".join([top, *parts[:count]]), mode=0o755)


def _tmpfs_options(spec: Spec, path: str) -> tuple[str, ...]:
    directory = spec.directories.get(path)
    limit = directory.size if directory is not None and directory.size else spec.limits.tmpfs
    inodes = directory.inodes if directory is not None and directory.inodes else _TMPFS_INODES
    return (f"size={size_bytes(limit) if limit else _TMPFS_BYTES}", f"nr_inodes={inodes}", "mode=0755")


def _proc(lock: Lock) -> Iterator[MountStep]:
    if lock.proc == "none":
        return
    if lock.proc == "pid":
        yield Filesystem(type="proc", target="/proc", options=("subset=pid",))
        return
    yield Filesystem(type="proc", target="/proc")
    for name in _PROC_READ_ONLY:
        yield ReadOnly(path=f"/proc/{name}", optional=True)
    for name in _PROC_NULL:
        yield Bind(source="/dev/null", target=f"/proc/{name}", device=True, optional=True, writable=True)
    for name in _PROC_EMPTY:
        yield Filesystem(type="tmpfs", target=f"/proc/{name}", options=("nr_inodes=1",), writable=False, optional=True)


def _dev(spec: Spec, lock: Lock, ids: IdRange) -> Iterator[MountStep]:
    """A /dev of the jail's own; read-only once it is filled."""
    yield Filesystem(type="tmpfs", target="/dev", options=("size=64k", "nr_inodes=128", "mode=0755"))
    wanted = dict.fromkeys((*spec.policy.devices, *lock.devices, "tty"))
    for name in wanted:
        if name.partition("/")[0] not in _MADE_DEVICES:
            yield from _above(f"/dev/{name}", ["/dev"])
            yield MakeFile(path=f"/dev/{name}")
            yield Bind(source=f"/dev/{name}", target=f"/dev/{name}", device=True, writable=True)
    yield MakeDirectory(path="/dev/pts", mode=0o755)
    group = () if ids.kind == "single" else (f"gid={_TTY_GID}",)
    yield Filesystem(type="devpts", target="/dev/pts", options=("newinstance", "ptmxmode=0666", "mode=0620", *group))
    yield MakeSymlink(path="/dev/ptmx", target="pts/ptmx")
    yield MakeDirectory(path="/dev/shm", mode=0o1777)
    yield Filesystem(type="tmpfs", target="/dev/shm", options=(*_tmpfs_options(spec, "/dev/shm")[:2], "mode=1777"))
    if "mqueue" in wanted:
        yield MakeDirectory(path="/dev/mqueue", mode=0o1777)
        yield Filesystem(type="mqueue", target="/dev/mqueue")
    for name, target in _DEVICE_LINKS:
        yield MakeSymlink(path=f"/dev/{name}", target=target)
    if lock.syslog if spec.service.syslog is None else spec.service.syslog:
        yield LogSocket(path="/dev/log")
    yield ReadOnly(path="/dev")
