"""Kernel features that walls are made of, each tried as a launch uses it."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from stockade import places
from stockade.doctor.attempt import Outcome, attempt
from stockade.errors import HostError
from stockade.kernel import cgroups, loop, userns
from stockade.kernel.libc import check, syscall
from stockade.kernel.mount import (
    AT_EMPTY_PATH,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    MS_REC,
    OPEN_TREE_CLONE,
    mount,
    open_tree,
)
from stockade.kernel.namespaces import CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, unshare
from stockade.kernel.syscalls import ARCHITECTURES, numbers
from stockade.records.host import Feature, State
from stockade.records.policy import CgroupLayout

__all__ = ["features"]

# linux/mount.h, linux/seccomp.h, linux/landlock.h
_MOUNT_ATTR_IDMAP = 0x00100000
_SECCOMP_GET_ACTION_AVAIL, _SECCOMP_RET_ERRNO = 2, 0x00050000
_LANDLOCK_CREATE_RULESET_VERSION = 1

# What each Landlock ABI added (landlock(7)); the later ones close what the earlier ones leave open.
_LANDLOCK = {2: "refer", 3: "truncate", 4: "TCP ports", 5: "device ioctl", 6: "abstract sockets"}
_LANDLOCK_WANTED = max(_LANDLOCK)

_USER_NAMESPACES = Path("/proc/sys/user/max_user_namespaces")
_PROBE_ID = 1879048192  # first of the ids that jails of root own
_CONTROLLERS = ("memory", "pids", "cpu")


def features() -> Iterator[Feature]:
    """Yield one feature for each kernel interface."""
    for examine in (
        _architecture, _user_namespaces, _id_range, _overlay, _idmapped, _loop_devices, _fresh_proc, _seccomp,
        _landlock, _cgroups, _tun, _ptrace,
    ):  # fmt: skip
        yield examine()


def _is_root() -> bool:
    return os.geteuid() == 0


def _feature(
    name: str,
    purpose: str,
    outcome: Outcome,
    *,
    cost: str,
    cure: str,
    required: bool = False,
    state: State | None = None,
) -> Feature:
    good = state is None and outcome.good
    return Feature(
        name=name, purpose=purpose, state=state or ("present" if outcome.good else "absent"), seen=outcome.seen,
        required=required, cost="" if good else cost, cure="" if good else cure,
    )  # fmt: skip


def _number(name: str) -> int:
    return numbers(os.uname().machine)[name]


def _architecture() -> Feature:
    machine = os.uname().machine
    known = machine in ARCHITECTURES
    return _feature(
        "architecture", "system calls by number", Outcome(0 if known else 1, machine), cost="no jail can be started",
        cure=f"use a machine of {' or '.join(ARCHITECTURES)}", required=True,
    )  # fmt: skip


def _user_namespaces() -> Feature:
    cure = ""
    outcome = Outcome(0, "a process can have its own ids")
    try:
        userns.call(os.getpid, ids=userns.Single(uid=0, gid=0))
    except HostError as error:
        outcome, cure = Outcome(1, error.message), error.hint or ""
        if _USER_NAMESPACES.read_text(encoding="ascii").strip() == "0":
            cure = "as root: `sysctl -w user.max_user_namespaces=15000`"
    return _feature(
        "user namespaces",
        "root of a jail is nobody outside",
        outcome,
        cost="no jail can be started",
        cure=cure,
        required=True,
    )


def _id_range() -> Feature:
    purpose = "services of an ordinary user that change their user id"
    if _is_root():
        return _feature(
            "id range", purpose, Outcome(0, "root gives each jail ids of its own"), cost="", cure="", state="not needed"
        )
    cure = ""
    outcome = Outcome(0, "")
    try:
        ids = userns.require_range()
        userns.call(os.getpid, ids=ids)
        outcome = Outcome(0, f"{ids.count} ids from {ids.first_uid}")
    except HostError as error:
        outcome, cure = Outcome(1, error.message), error.hint or ""
    return _feature("id range", purpose, outcome, cost="jails have one user id, and no root inside", cure=cure)


def _private(flags: int, work: Callable[[], str]) -> Callable[[], str]:
    """Wrap `work` to run in new namespaces, for an ordinary user in a user namespace of its own."""

    def inside() -> str:
        unshare(flags)
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        return work()

    return inside if _is_root() else lambda: userns.call(inside, ids=userns.Single(uid=0, gid=0))


def _overlay() -> Feature:
    def work() -> str:
        mount("tmpfs", "/tmp", "tmpfs")
        for name in ("upper", "work", "view"):
            os.mkdir(f"/tmp/{name}")
        mount("overlay", "/tmp/view", "overlay", data="lowerdir=/usr,upperdir=/tmp/upper,workdir=/tmp/work")
        Path("/tmp/view/written").touch()
        return "a directory can be written to without changing it"

    return _feature(
        "overlay", "a throwaway view of the host", attempt(_private(CLONE_NEWNS, work)),
        cost="nothing can be observed: a jail is built only from a lock",
        cure="as root: `modprobe overlay`" if _is_root() else "use Linux 5.11 or later, or run as root",
        required=True,
    )  # fmt: skip


def _idmapped() -> Feature:
    purpose = "a root file system on disk that belongs to no user of the host"
    if not _is_root():
        return _feature(
            "idmapped mounts",
            purpose,
            Outcome(0, "an ordinary user's jails own their files"),
            cost="",
            cure="",
            state="not needed",
        )
    home = next(path for path in (places.state(), *places.state().parents) if path.is_dir())

    def work() -> str:
        with _HeldNamespace() as held, open(f"/proc/{held.pid}/ns/user", "rb") as namespace:
            tree = open_tree(None, str(home), OPEN_TREE_CLONE)
            # struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
            attributes = struct.pack("4Q", _MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY, 0, 0, namespace.fileno())
            done = syscall(
                _number("mount_setattr"), ctypes.c_int(tree), ctypes.c_char_p(b""), ctypes.c_uint(AT_EMPTY_PATH),
                ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)),
            )  # fmt: skip
            check(done, "mount_setattr", str(home))
        return f"the file system of `{home}` allows them"

    return _feature(
        "idmapped mounts", purpose, attempt(work), cost="no jail of root's can be started from this file system",
        cure="keep Stockade's state on ext4, xfs or btrfs (`STOCKADE_HOME`), with Linux 5.12 (btrfs 5.15, tmpfs 6.3)",
        required=True,
    )  # fmt: skip


def _loop_devices() -> Feature:
    reason = loop.lacking()
    return _feature(
        "loop devices", "volumes with a size", Outcome(1 if reason else 0, reason or "a file can hold a file system"),
        cost="nothing limits the size of a volume", cure=loop.REMEDIES.get(reason, ""),
    )  # fmt: skip


class _HeldNamespace:
    """A user namespace with mapped ids, alive as long as the block."""

    def __enter__(self) -> _HeldNamespace:
        out, into = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            unshare(CLONE_NEWUSER)
            os.write(into, b"x")
            signal.pause()
        os.read(out, 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{self.pid}/{name}").write_text(f"0 {_PROBE_ID} 65536", encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _fresh_proc() -> Feature:
    def fresh() -> str:
        mount("proc", "/proc", "proc")
        return "a jail can have its own /proc"

    def work() -> str:
        unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS)
        inner = attempt(fresh)
        if not inner.good:
            raise OSError(inner.code, inner.seen)
        return inner.seen

    return _feature(
        "fresh proc", "services that read /proc", attempt(work),
        cost='jails must have `proc = "none"` in `[policy]`',
        cure="this host's own /proc is partly hidden, as in a container: start the container with an unmasked /proc",
    )  # fmt: skip


def _seccomp() -> Feature:
    def work() -> str:
        action = ctypes.c_uint32(_SECCOMP_RET_ERRNO)
        operation = ctypes.c_uint(_SECCOMP_GET_ACTION_AVAIL)
        check(syscall(_number("seccomp"), operation, ctypes.c_uint(0), ctypes.byref(action)), "seccomp")
        return "system calls can be filtered"

    return _feature(
        "seccomp", "refusing system calls that a service has no use for", attempt(work),
        cost="jails must have `preset = \"none\"` in `[policy.syscalls]`",
        cure="use a kernel with CONFIG_SECCOMP_FILTER, as Debian's are",
    )  # fmt: skip


def _landlock() -> Feature:
    def work() -> str:
        flags = ctypes.c_uint(_LANDLOCK_CREATE_RULESET_VERSION)
        done = syscall(_number("landlock_create_ruleset"), ctypes.c_void_p(None), ctypes.c_size_t(0), flags)
        return str(check(done, "landlock_create_ruleset"))

    outcome = attempt(work)
    version = int(outcome.seen) if outcome.good else 0
    lacking = [what for since, what in _LANDLOCK.items() if version < since]
    if not lacking:
        return _feature("landlock", _LANDLOCK_PURPOSE, Outcome(0, f"ABI {version}"), cost="", cure="")
    return _feature(
        "landlock", _LANDLOCK_PURPOSE, Outcome(outcome.code, f"ABI {version}" if version else outcome.seen),
        cost=f"not ruled: {', '.join(lacking)}" if version else "the wall of Landlock is missing; the others stand",
        cure="boot with `lsm=landlock,…`, or use a newer kernel (Debian 12's has ABI 2)",
        state="limited" if version else "absent",
    )  # fmt: skip


_LANDLOCK_PURPOSE = "a second rule about files and ports, beside the mounts"


def _cgroups(root: str = "/", uid: int | None = None) -> Feature:
    """`root` is where the host's `/` is, `uid` who asks: as `cgroups.layout` has them, which a launch goes by."""
    uid = os.geteuid() if uid is None else uid
    found = cgroups.layout(root=root, uid=uid)
    there = [name for name in _CONTROLLERS if name in found.controllers]
    where = {"system": ", in scopes of systemd's", "user": ", in scopes of this user's systemd"}.get(found.manager, "")
    seen = f"version {found.version}{where}, with {', '.join(there) or 'no controller'}"
    return _feature(
        "cgroups", "limits of memory, processes and CPU", Outcome(0, seen if found.version else found.reason),
        cost="`[limits]` of memory, processes and CPUs cannot be kept"
        if not there
        else f"not limited: {', '.join(name for name in _CONTROLLERS if name not in there)}",
        cure=_cgroups_cure(found, uid, systemd=os.path.isdir(os.path.join(root, "run/systemd/system"))),
        state=None if len(there) == len(_CONTROLLERS) else "limited" if there else "absent",
    )  # fmt: skip


def _cgroups_cure(found: CgroupLayout, uid: int, *, systemd: bool) -> str:
    if found.manager == "user":
        return "as root: `systemctl edit user@.service`, with `Delegate=cpu io memory pids` below `[Service]`"
    if uid and systemd:
        return "`loginctl enable-linger` starts the user's systemd"
    return "boot with `systemd.unified_cgroup_hierarchy=1`, or run as root"


def _tun() -> Feature:
    def work() -> str:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        return "/dev/net/tun opens"

    return _feature(
        "tun", "private networks with published ports", attempt(work), cost='no `mode = "private"` in `[network]`',
        cure="as root: `modprobe tun`, and `chmod 666 /dev/net/tun`; in a container: pass /dev/net/tun in",
    )  # fmt: skip


def _ptrace() -> Feature:
    """Yama's ptrace_scope (admin-guide/LSM/Yama.rst): from 2 on, only CAP_SYS_PTRACE may attach; at 3 nobody."""
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except FileNotFoundError:
        scope = 0
    allowed = scope < 2 or (scope == 2 and _is_root())
    return _feature(
        "ptrace", "observing a service", Outcome(0 if allowed else 1, f"kernel.yama.ptrace_scope = {scope}"),
        cost="nothing can be observed: a jail is built only from a lock",
        cure=f"as root: `sysctl -w kernel.yama.ptrace_scope=1`{', after a reboot' if scope > 2 else ''}",
        required=True,
    )  # fmt: skip
