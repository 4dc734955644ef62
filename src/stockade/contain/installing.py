"""Write a generation's plan beside its rootfs and make its volumes: all that a launch needs then stands there."""

from __future__ import annotations

import os
from pathlib import Path

from stockade import places
from stockade.kernel import cgroup_plan, cgroups
from stockade.records.launch import IdRange, LaunchPlan, MountStep
from stockade.records.lock import Lock
from stockade.records.policy import CgroupPlan
from stockade.records.spec import Spec

from .compile import compile_plan
from .encoding import encode
from .ids import for_jail
from .network import write_marker
from .volumes import prepare

__all__ = ["install"]


def install(
    spec: Spec, lock: Lock, *, generation: Path, allow_ptrace: bool = False, ids: IdRange | None = None,
    extra: tuple[MountStep, ...] = (),
) -> LaunchPlan:  # fmt: skip
    """Compile the plan of `generation` (committed or not yet) and write it to its `plan`; make missing volumes.

    `ids` are the jail's (default: those kept for it), `extra` mounts beyond those of spec and lock.
    Errors as `compile_plan`, `allocate` and OSError have them.
    """
    ids = for_jail(spec.name) if ids is None else ids
    volumes = Path(os.path.realpath(places.jail(spec.name))) / "volumes"
    plan = compile_plan(
        spec, lock, generation=generation, volumes=volumes, ids=ids, cgroup=_cgroup(spec, generation),
        allow_ptrace=allow_ptrace, extra=extra,
    )  # fmt: skip
    prepare(lock, rootfs=generation / "rootfs", volumes=volumes, ids=ids, uid=plan.uid, gid=plan.gid)
    wrapper = plan.cgroup.wrapper if plan.cgroup is not None else ()
    if wrapper:
        _write(generation / "wrapper", b"\0".join(os.fsencode(word) for word in wrapper))
    else:
        (generation / "wrapper").unlink(missing_ok=True)
    write_marker(spec.network, ids, generation)
    _write(generation / "plan", encode(plan))
    return plan


def _cgroup(spec: Spec, generation: Path) -> CgroupPlan | None:
    """Control groups only where something is limited: joining one costs more than the rest of a launch."""
    limits = spec.limits
    if all(value is None for value in (limits.memory, limits.processes, limits.cpus, limits.cpu_weight,
                                       limits.io_read, limits.io_write)):  # fmt: skip
        return None
    disk = cgroups.disk_of(generation)
    # Each instance of the jail has groups of its own: the warden fills the number in.
    return cgroup_plan.plan(limits, cgroups.layout(), f"{spec.name}-{{instance}}", disk=disk, accounting=False)


def _write(path: Path, content: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.replace(path)
