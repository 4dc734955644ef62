"""What stands around UML: another user and a pid namespace, or a jail that Stockade builds for it like any other."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from stockade import places
from stockade.errors import StateError, StockadeError
from stockade.kernel import cgroup_plan, cgroups
from stockade.records.guest import Guest
from stockade.records.launch import Bind, IdRange
from stockade.records.lock import Lock
from stockade.records.policy import CgroupPlan
from stockade.records.spec import Account, Directory, Files, Limits, Policy, Service, Spec

from . import calls
from .ids import JAIL, STEP
from .kernels import Kernel

__all__ = ["Around", "around", "directories", "ids_of", "is_built", "jail_of", "mark_built", "specification"]

PLACE = "/vm"
_MEMORY = "/tmp"

#: UML's own memory beside the guest's, and the processes and threads of the kernel itself.
_OVERHEAD = 64 << 20
#: Every guest process is one of the host's: the guest's own limit must be met first, or its kernel panics.
GUEST_PIDS = 2048
_OWN_PROCESSES = 64


class Around(msgspec.Struct, frozen=True, kw_only=True):
    """How the keeper starts UML: its path there, and what else the orders hold."""

    kernel: str
    orders: dict[str, Any]


def around(guest: Guest, kernel: Kernel, machine: Path) -> Around:
    """The walls around the guest's UML process, as its record names them. Errors as a build has them."""
    if guest.walls[:1] != ("jail",):
        return Around(
            kernel=kernel.path,
            orders={"plan": None, "base": "", "records": [], "wrapper": [], "limit": "",
                    "environment": {"PATH": "/usr/bin:/bin", "HOME": "/", "TMPDIR": "/dev/shm"}},
        )  # fmt: skip
    generation, lock = jail_of(kernel)
    plan = _plan(guest, kernel, machine, generation, lock)
    return Around(kernel=kernel.path, orders={**plan, "base": os.fspath(generation), "environment": {}})


def specification(kernel: Kernel, *, memory: int = 0) -> Spec:
    """The spec of the jail for a kernel: its program, what that is linked with, a directory and memory to run in."""
    return Spec(
        name=JAIL,
        description="User-Mode Linux: each guest's kernel, an ordinary process",
        service=Service(
            command=(kernel.path,),
            user="uml",
            group="1",
            directory=PLACE,
            environment={"TMPDIR": _MEMORY, "HOME": PLACE},
        ),
        files=Files(include=(kernel.path,)),
        accounts=(Account(name="uml", uid=1, home=PLACE, shell="/usr/sbin/nologin"),),
        directories={
            PLACE: Directory(kind="fixed"),
            _MEMORY: Directory(mode="0700", owner="uml:1", size=f"{(memory + _OVERHEAD) >> 20}M", inodes=64),
        },
        policy=Policy(capabilities=(), syscalls=calls.policy(), devices=("null",), proc="none"),
        limits=Limits(
            memory=f"{(memory + _OVERHEAD) >> 20}M",
            processes=GUEST_PIDS + _OWN_PROCESSES,
            open_files=4096,
            cpus=1.0,
            tmpfs="1M",
        ),
        timezone=False,
    )


def jail_of(kernel: Kernel) -> tuple[Path, Lock]:
    """The current generation of the kernel's jail and its lock; StateError where it was not built for this kernel."""
    if not is_built(kernel):
        raise StateError(f"the jail around `{kernel.path}` is not built", hint="`stockade guest prepare` builds it")
    generation = Path(os.path.realpath(places.jail(JAIL) / "current"))
    return generation, msgspec.json.decode((generation / "lock.json").read_bytes(), type=Lock)


def is_built(kernel: Kernel) -> bool:
    """Whether the jail's current generation was made for the kernel as it is now, and by this Stockade."""
    try:
        return (places.jail(JAIL) / "current" / "kernel").read_text(encoding="utf-8") == _stamp(kernel)
    except FileNotFoundError:
        return False


def mark_built(kernel: Kernel) -> None:
    """Keep with the current generation which kernel it was made for."""
    (places.jail(JAIL) / "current" / "kernel").write_text(_stamp(kernel), encoding="utf-8")


def _stamp(kernel: Kernel) -> str:
    status = os.stat(kernel.path)
    wanted = hashlib.sha256(msgspec.json.encode(specification(kernel))).hexdigest()
    return f"{kernel.path} {kernel.version} {status.st_mtime_ns} {status.st_size} {wanted}\n"


def _plan(guest: Guest, kernel: Kernel, machine: Path, generation: Path, lock: Lock) -> dict[str, Any]:
    """The compiled plan of this guest's instance, the command under which it has to be launched, and its number.

    Each start has another: systemd has a scope's name until it has seen that scope's end.
    """
    from stockade.contain import wire
    from stockade.contain.compile import compile_plan
    from stockade.contain.encoding import encode

    spec = specification(kernel, memory=guest.memory)
    cgroup = _cgroup(spec, guest, generation)
    plan = compile_plan(
        spec, lock, generation=generation, volumes=Path("/nonexistent"), ids=ids_of(guest), cgroup=cgroup,
        allow_ptrace=True, extra=directories(machine),
    )  # fmt: skip
    path = places.guest(guest.name) / "plan"
    fresh = path.with_name(".plan.new")
    fresh.write_bytes(encode(plan))
    fresh.replace(path)
    number = str(time.monotonic_ns())
    wrapper = [word.replace("{instance}", number) for word in cgroup.wrapper] if cgroup is not None else []
    records = [wire.text(wire.INSTANCE, number).hex()]
    return {"plan": os.fspath(path), "wrapper": wrapper, "records": records, "limit": spec.limits.memory}


def directories(machine: Path) -> tuple[Bind, ...]:
    """What the jail of a guest has of its own: the directory `machine`, and the image in it, which stays as it is."""
    directory = os.path.realpath(machine)
    return (
        Bind(source=directory, target=PLACE, writable=True, own=True, executable=False),
        Bind(source=f"{directory}/base", target=f"{PLACE}/base", own=True, executable=False),
    )


def ids_of(guest: Guest) -> IdRange:
    """The ids of a guest's jail.

    Root's guests: some ids of their own, of which UML is the second. A user's: the user's one, seen as UML's.
    """
    if os.geteuid() == 0:
        return IdRange(first=guest.uid - 1, first_gid=guest.gid - 1, count=STEP, kind="root-range")
    return IdRange(first=guest.uid, first_gid=guest.gid, count=1, kind="single")


def _cgroup(spec: Spec, guest: Guest, generation: Path) -> CgroupPlan | None:
    layout = cgroups.layout()
    try:
        return cgroup_plan.plan(
            spec.limits, layout, f"guest-{guest.name}-{{instance}}", disk=cgroups.disk_of(generation), accounting=False
        )
    except StockadeError:
        return None
