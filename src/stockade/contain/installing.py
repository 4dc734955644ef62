"""Write a generation's plan beside its rootfs: all that a launch needs then stands there, but for fresh volumes."""

from __future__ import annotations

import os
from pathlib import Path

from stockade import places
from stockade.records.launch import IdRange, LaunchPlan, MountStep
from stockade.records.lock import Lock, LockDirectory
from stockade.records.policy import CgroupPlan
from stockade.records.spec import Limits, Spec

from . import marker
from .compile import compile_plan
from .encoding import encode
from .ids import for_jail
from .volumes import missing

__all__ = ["control_groups", "install"]


def install(
    spec: Spec, lock: Lock, *, generation: Path, allow_ptrace: bool = False, ids: IdRange | None = None,
    extra: tuple[MountStep, ...] = (),
) -> LaunchPlan:  # fmt: skip
    """Compile the plan of `generation` (committed or not yet) and write it to its `plan`.

    Volumes that are there get their size; while the jail runs that is left to its next launch, as is the making of
    those that are missing. `ids` are the jail's (default: those kept for it), `extra` mounts beyond those of spec and
    lock. Errors as `compile_plan`, `allocate`, `resize`, `marker.refuse_too_many` and OSError have them.
    """
    marker.refuse_too_many(given=len(spec.network.listen), published=len(spec.network.publish))
    ids = for_jail(spec.name) if ids is None else ids
    jail = Path(os.path.realpath(places.jail(spec.name)))
    volumes = jail / "volumes"
    plan = compile_plan(
        spec, lock, generation=generation, volumes=volumes, ids=ids,
        cgroup=control_groups(spec.limits, spec.name, generation), allow_ptrace=allow_ptrace, extra=extra,
    )  # fmt: skip
    fresh = missing(lock, volumes)
    resized = _resized(lock, jail, ids, fresh)
    due = places.due(generation)
    if fresh or not resized:
        due.write_text(f"{plan.uid} {plan.gid}\n")
    else:
        due.unlink(missing_ok=True)
    wrapper = plan.cgroup.wrapper if plan.cgroup is not None else ()
    if wrapper:
        _write(generation / "wrapper", b"\0".join(os.fsencode(word) for word in wrapper))
    else:
        (generation / "wrapper").unlink(missing_ok=True)
    marker.write(spec.network, ids, generation)
    if "vm" in spec.walls:
        places.machine(generation).touch()
    _write(generation / "plan", encode(plan))
    return plan


def _resized(lock: Lock, jail: Path, ids: IdRange, fresh: tuple[LockDirectory, ...]) -> bool:
    """Give volumes that are there, all but `fresh`, their size; False where that waits for the jail's next launch."""
    if not any(found.size and found.volume and found not in fresh for found in lock.directories):
        return True
    from .resizing import resize

    return resize(lock, jail=jail, ids=ids)


def control_groups(limits: Limits, name: str, generation: Path) -> CgroupPlan | None:
    """Control groups of the jail `name`, which lies on the disk of `generation`; None where nothing is limited.

    Joining one costs more than the rest of a launch. SpecError for a limit that no kernel takes.
    """
    if all(value is None for value in (limits.memory, limits.processes, limits.cpus, limits.cpu_weight,
                                       limits.io_read, limits.io_write)):  # fmt: skip
        return None
    from stockade.kernel import cgroup_plan, cgroups

    disk = cgroups.disk_of(generation)
    # Each instance of the jail has groups of its own: the warden fills the number in.
    return cgroup_plan.plan(limits, cgroups.layout(), f"{name}-{{instance}}", disk=disk, accounting=False)


def _write(path: Path, content: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.replace(path)
