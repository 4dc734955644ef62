"""Control groups of this host: where a jail's can be made, carrying out a plan, reading what it uses.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of the kernel, and systemd's
"Control Group APIs and Delegation". Decides no limit.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from ..records.policy import CgroupLayout, CgroupOperation, Usage
from .cgroup_plan import scope

__all__ = ["carry_out", "disk_of", "entrance", "layout", "usage"]

_V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "blkio")
_V2_CONTROLLERS = ("memory", "pids", "cpu", "io")

_BUSY_S = 1.0  # a cgroup stays busy for a moment after its last process has ended


def layout(*, root: str = "/", uid: int | None = None) -> CgroupLayout:
    """What control groups the caller, as `uid` (its own by default), can make; `root` is where the host's `/` is."""
    uid = os.geteuid() if uid is None else uid
    top = Path(root)
    unified, legacy = _mounts(_read(top / "proc/self/mountinfo"))
    swap = len(_read(top / "proc/swaps").splitlines()) > 1
    controllers = _words(_at(top, unified) / "cgroup.controllers") if unified else ()
    # Beside version 1 the tree of version 2 has no controller, or only ones that version 1 lacks (hugetlb).
    if not set(_V2_CONTROLLERS).isdisjoint(controllers):
        return _version_2(top, unified, controllers, uid=uid, swap=swap)
    if not legacy:
        return CgroupLayout(reason="no control group controller is mounted on this host")
    usable = {
        controller: directory for controller, directory in legacy.items() if os.access(_at(top, directory), os.W_OK)
    }
    if not usable:
        return CgroupLayout(
            reason="control groups of version 1 cannot be handed to an ordinary user"
            if uid
            else "the control group file systems are mounted read-only"
        )
    memory = _at(top, usable["memory"]) if "memory" in usable else None
    files = ("memory.memsw.limit_in_bytes",) if memory and (memory / "memory.memsw.limit_in_bytes").exists() else ()
    return CgroupLayout(version=1, controllers=usable, files=files, swap=swap)


def _at(top: Path, path: str) -> Path:
    return top / path.lstrip("/")


def _read(path: Path) -> str:
    """Text of a file, "" where it cannot be read: a kernel without the feature, or a hidden /proc."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _words(path: Path) -> tuple[str, ...]:
    return tuple(_read(path).split())


def _mounts(mountinfo: str) -> tuple[str, dict[str, str]]:
    """Mount point of version 2 ("" for none), and of each controller of version 1, from proc_pid_mountinfo(5)."""
    unified = ""
    legacy: dict[str, str] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        place, kind = before.split()[4], after.split()
        if kind[0] == "cgroup2":
            unified = unified or place
        elif kind[0] == "cgroup":
            legacy.update({option: place for option in kind[2].split(",") if option in _V1_CONTROLLERS})
    return unified, legacy


def _version_2(top: Path, mount: str, controllers: tuple[str, ...], *, uid: int, swap: bool) -> CgroupLayout:
    if (top / "run/systemd/system").is_dir():
        return _scope(top, mount, controllers, uid=uid, swap=swap)
    directory = _at(top, mount)
    if not os.access(directory, os.W_OK):
        return CgroupLayout(
            reason="no control group is delegated to this user, and there is no systemd to delegate one"
            if uid
            else "the control group file system is mounted read-only"
        )
    # Only the root cgroup has no cgroup.type; any other holds processes or children's controllers, never both.
    enable = not (directory / "cgroup.type").exists()
    if not enable:
        controllers = _words(directory / "cgroup.subtree_control")
    return _layout_2(top, mount, mount, controllers, enable=enable, swap=swap)


def _scope(top: Path, mount: str, controllers: tuple[str, ...], *, uid: int, swap: bool) -> CgroupLayout:
    """A scope that systemd makes and delegates: in system.slice for root, else below the user's own manager."""
    if uid == 0:
        return _layout_2(top, mount, f"{mount}/system.slice", controllers, enable=True, swap=swap, manager="system")
    if not (top / f"run/user/{uid}/systemd/private").exists():
        return CgroupLayout(reason=f"no systemd of user {uid} is running (`loginctl enable-linger` starts one)")
    own = f"{mount}/user.slice/user-{uid}.slice/user@{uid}.service"
    delegated = _words(_at(top, own) / "cgroup.controllers")
    return _layout_2(top, mount, f"{own}/app.slice", delegated, enable=True, swap=swap, manager="user")


def _layout_2(
    top: Path,
    mount: str,
    base: str,
    controllers: tuple[str, ...],
    *,
    enable: bool,
    swap: bool,
    manager: Literal["", "system", "user"] = "",
) -> CgroupLayout:
    # The root cgroup itself has no limits, `base` may not be made yet, or have no controller before something in it
    # asks for one: whether the kernel counts swap shows in any cgroup on the way.
    way = [_at(top, base), *_at(top, base).parents]
    seen = [
        place for directory in way[: way.index(_at(top, mount)) + 1] for place in (directory, *directory.glob("*/"))
    ]
    files = tuple(name for name in ("memory.swap.max",) if any((place / name).exists() for place in seen))
    return CgroupLayout(
        version=2,
        controllers={controller: base for controller in controllers if controller in _V2_CONTROLLERS},
        base=base,
        enable=enable,
        manager=manager,
        files=files,
        swap=swap,
    )


def entrance(directory: str, *, root: str = "/", uid: int | None = None) -> tuple[str, ...]:
    """The command under which a process of the caller can be moved to the cgroup `directory`; () where it needs none.

    In version 2 a process is moved only by who may write `cgroup.procs` of the nearest common ancestor ("Delegation
    Containment"), and that of a login session and of the user's own services is root's. A scope of the user's is
    among those services, where systemd as root brings the process.
    """
    uid = os.geteuid() if uid is None else uid
    top = Path(root)
    unified, _ = _mounts(_read(top / "proc/self/mountinfo"))
    if uid == 0 or not unified or not directory.startswith(f"{unified}/"):
        return ()
    lines = _read(top / "proc/self/cgroup").splitlines()
    own = next((line[len("0::") :].rstrip("/") for line in lines if line.startswith("0::/")), "")
    ancestor = os.path.commonpath((f"{unified}{own}", directory))
    if os.access(_at(top, ancestor) / "cgroup.procs", os.W_OK):
        return ()
    return scope(layout(root=root, uid=uid))


def disk_of(path: str | os.PathLike[str], *, root: str = "/") -> str | None:
    """MAJOR:MINOR of the whole disk that holds `path`, as io.max and blkio.throttle take it.

    None where there is none: a tmpfs, an overlay, a file system over several disks. OSError for a path
    that cannot be looked at.
    """
    number = os.stat(path).st_dev
    device = Path(root) / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not device.exists():
        return None
    whole = device.resolve()
    if (whole / "partition").exists():
        whole = whole.parent
    return _read(whole / "dev").strip() or None


def carry_out(operations: Iterable[CgroupOperation]) -> None:
    """Do each operation in turn; OSError with the file name for the first that fails.

    A removal waits up to a second for processes that are just ending.
    """
    for operation in operations:
        match operation.kind:
            case "directory":
                Path(operation.path).mkdir(exist_ok=True)
            case "write":
                _write(operation.path, operation.value)
            case "kill":
                if os.path.exists(operation.path):
                    _write(operation.path, operation.value)
            case "remove":
                _remove(operation.path)


def _write(path: str, value: str) -> None:
    # One write(2): the kernel takes each as a command of its own.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode("ascii"))
    except OSError as failure:
        raise OSError(failure.errno, failure.strerror, path) from None
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as failure:
            if failure.errno != errno.EBUSY or time.monotonic() > end:
                raise
            time.sleep(0.002)
        else:
            return


def usage(directories: Mapping[str, str]) -> Usage:
    """What the cgroups `directories` of a plan use now; all None once they are gone."""
    memory, pids, cpu = (Path(directories[name]) if name in directories else None for name in ("memory", "pids", "cpu"))
    cpuacct = Path(directories["cpuacct"]) if "cpuacct" in directories else None
    microseconds = _keyed(cpu, "cpu.stat", "usage_usec")
    nanoseconds = _first(_number(cpuacct, "cpuacct.usage"), microseconds * 1000 if microseconds is not None else None)
    return Usage(
        memory_bytes=_first(_number(memory, "memory.current"), _number(memory, "memory.usage_in_bytes")),
        cpu_seconds=nanoseconds / 1e9 if nanoseconds is not None else None,
        processes=_number(pids, "pids.current"),
        oom_kills=_first(_keyed(memory, "memory.events", "oom_kill"), _keyed(memory, "memory.oom_control", "oom_kill")),
    )


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _number(directory: Path | None, name: str) -> int | None:
    text = _read(directory / name).strip() if directory is not None else ""
    return int(text) if text.isdigit() else None


def _keyed(directory: Path | None, name: str, key: str) -> int | None:
    """Value of `key` in a flat keyed file: lines of a key and a number."""
    if directory is None:
        return None
    for line in _read(directory / name).splitlines():
        found, _, value = line.partition(" ")
        if found == key:
            return int(value)
    return None
