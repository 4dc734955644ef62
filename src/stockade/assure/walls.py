"""A jail's own launch with the probes in it: the plan as compiled, plus one mount for the probes' tree."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from stockade import contain, places
from stockade.build.generations import Ids, Store, ids_of, on_files
from stockade.contain import marker, wire
from stockade.contain.encoding import fixed_attributes
from stockade.contain.limiting import lacking
from stockade.contain.volumes import prepare
from stockade.errors import StateError
from stockade.kernel import cgroup_plan, cgroups
from stockade.records.generation import Generation
from stockade.records.launch import Bind, Filesystem, IdRange, LaunchPlan, MakeDirectory, MountStep, ReadOnly
from stockade.records.lock import Lock, LockDirectory
from stockade.records.policy import CgroupPlan
from stockade.records.spec import Spec

from .probetree import ProbeTree

__all__ = ["PLACE", "Beyond", "Change", "Workplace", "launched", "planned", "with_tree", "workplace", "writable"]

PLACE = "/dev/.stockade-probe"

Change = Callable[[LaunchPlan], LaunchPlan]

_PREFIX = ".prove-"
_SMALL_BYTES, _SMALL_INODES = 16 << 20, 256
_NOSUID, _NODEV = 2, 4


@dataclass(frozen=True)
class Beyond:
    """What a plan is compiled with beyond spec and lock: ids of its own, further mounts, leave to trace."""

    ids: IdRange | None = None
    mounts: tuple[MountStep, ...] = ()
    ptrace: bool = False


@dataclass(frozen=True)
class Workplace:
    """A directory of the jail's for one proof. It stands in for the generation's own; its volumes are copies.

    `ids` are those that own files. `more` is what the jail's plan has beyond spec and lock: `Beyond`.
    """

    path: Path
    generation: Generation
    spec: Spec
    ids: Ids
    more: Beyond = Beyond()
    within: str = "volumes"

    @property
    def volumes(self) -> Path:
        """Copies of what the volumes begin with: the jail's own are not touched."""
        return self.path / self.within

    def small(self) -> Workplace:
        """The same with volumes that are quickly full: those that have a size get twice what they begin with."""
        lock = self.generation.lock
        directories = tuple(_small(found, lock) if found.volume and found.size else found for found in lock.directories)
        generation = msgspec.structs.replace(
            self.generation, lock=msgspec.structs.replace(lock, directories=directories)
        )
        return replace(self, generation=generation, within="small")

    def plan(self, spec: Spec) -> LaunchPlan:
        """The launch plan of the jail with `spec`, as a build compiles it, seen from this directory."""
        ids = self.more.ids or contain.for_jail(spec.name)
        plan = contain.compile_plan(
            spec, self.generation.lock, generation=self.generation.path, volumes=self.volumes, ids=ids,
            cgroup=self._cgroup(spec), allow_ptrace=self.more.ptrace, extra=self.more.mounts,
        )  # fmt: skip
        prepare(self.generation.lock, rootfs=self.generation.rootfs, volumes=self.volumes, ids=ids, uid=plan.uid,
                gid=plan.gid)  # fmt: skip
        marker.write(spec.network, ids, self.path)
        return msgspec.structs.replace(plan, root=f"../generations/{self.generation.path.name}/rootfs")

    def _cgroup(self, spec: Spec) -> CgroupPlan | None:
        limits = spec.limits
        if all(value is None for value in (limits.memory, limits.processes, limits.cpus, limits.cpu_weight,
                                           limits.io_read, limits.io_write)):  # fmt: skip
            return None
        disk = cgroups.disk_of(self.generation.path)
        name = f"{spec.name}{self.path.name}"
        return cgroup_plan.plan(limits, cgroups.layout(), name, disk=disk, accounting=False)


@contextlib.contextmanager
def workplace(
    name: str, *, spec: Spec | None = None, more: Beyond | None = None, alone: bool = False
) -> Iterator[Workplace]:
    """A place for one proof of the current generation of the jail `name`; nothing is left of it.

    `spec` stands in for the one it was built with; `alone`: as if the jail were its only wall. What an earlier proof
    that was killed left is removed first. StateError when nothing was built, and for walls that are no jail alone.
    """
    store = Store(name)
    generation = store.current()
    if generation is None:
        raise StateError(f"jail `{name}` has not been built", hint=f"`stockade build {name}` builds it")
    if spec is None:
        spec = msgspec.json.decode((generation.path / "spec.json").read_bytes(), type=Spec)
    if alone:
        spec = msgspec.structs.replace(spec, walls=("jail",))
    if spec.walls != ("jail",):
        raise StateError(
            f"`{name}` has the walls {','.join(spec.walls)}, and these probes are for a jail by itself",
            hint="`--walls jail` tries its jail alone, `--against chroot,chroot-nobody` a plain chroot",
        )
    more = more or Beyond()
    who = contain.compile_plan(
        spec, generation.lock, generation=generation.path, volumes=store.volumes,
        ids=more.ids or contain.for_jail(name),
    )  # fmt: skip
    ids = ids_of(store, who.uid, who.gid)
    directory = Path(os.path.realpath(places.jail(name)))
    for left in directory.glob(f"{_PREFIX}*"):
        if not _alive(left.name.removeprefix(_PREFIX).partition("-")[0]):
            on_files(ids, shutil.rmtree, left)
    path = directory / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(3)}"
    path.mkdir(mode=0o755)
    try:
        yield Workplace(path, generation, spec, ids, more)
    finally:
        on_files(ids, shutil.rmtree, path)


def _small(found: LockDirectory, lock: Lock) -> LockDirectory:
    begins = [entry.size for entry in lock.entries if entry.path.startswith(f"{found.path}/")]
    return msgspec.structs.replace(
        found, size=min(found.size, _SMALL_BYTES + 2 * sum(begins)), inodes=_SMALL_INODES + 2 * len(begins)
    )


def _alive(pid: str) -> bool:
    return pid.isdecimal() and os.path.exists(f"/proc/{pid}")


def writable(plan: LaunchPlan) -> tuple[str, ...]:
    """Directories that the plan lets the service write to."""
    found = []
    for step in plan.mounts:
        match step:
            case Filesystem(type="tmpfs", writable=True) | Bind(writable=True, device=False):
                found.append(step.target)
            case MakeDirectory():
                found.append(step.path)
            case _:
                pass
    return tuple(path for path in found if path != "/dev")


def planned(plan: LaunchPlan) -> dict[str, Any]:
    """What a request to the probes behind `plan` holds of it, as `request.write` takes it."""
    return {
        "granted": plan.capabilities,
        "groups": (plan.gid, *plan.groups),
        "masks": tuple(step.target for step in plan.mounts
                       if isinstance(step, (Bind, Filesystem)) and step.target.startswith("/proc/")),
        "writable": writable(plan),
        "tmpfs": tuple(step.target for step in plan.mounts if isinstance(step, Filesystem) and step.type == "tmpfs"
                       and step.writable and step.target != "/dev"),
        "sized": tuple(step.target for step in plan.mounts if isinstance(step, Bind) and step.sized),
        # Where nothing can limit them it is told, and no finding.
        "volumes": () if lacking(plan.ids) else tuple(
            step.target for step in plan.mounts if isinstance(step, Bind) and step.volume and not step.sized
        ),
    }  # fmt: skip


def with_tree(plan: LaunchPlan, source: str) -> bytes:
    """The plan as the warden reads it, with the probes' tree `source` mounted on PLACE.

    That mount alone honours setuid and file capabilities, so that only no_new_privs stands against the helpers.
    """
    mount = Bind(source=source, target=PLACE, own=True)
    steps = list(plan.mounts)
    at = next((number for number, step in enumerate(steps) if step == ReadOnly(path="/dev")), len(steps))
    steps[at:at] = [MakeDirectory(path=PLACE, mode=0o755, uid=plan.inside_uid, gid=plan.inside_gid), mount]
    encoded = contain.encode(msgspec.structs.replace(plan, mounts=tuple(steps)))
    idmap, fixed = wire.TREE_IDMAP if plan.ids.kind == "root-range" else 0, fixed_attributes(plan)
    plain, honouring = (
        wire.text(wire.BIND, mount.source, mount.target, numbers=numbers)
        for numbers in ((wire.TREE_OWN, _NOSUID | _NODEV | fixed), (wire.TREE_OWN | idmap, _NODEV | fixed))
    )
    if encoded.count(plain) != 1:
        raise StateError("the plan does not hold the mount of the probes", hint="this is a fault of Stockade's own")
    return encoded.replace(plain, honouring)


@contextlib.contextmanager
def launched(
    place: Workplace, plan: LaunchPlan, tree: ProbeTree, *, stdin: int, stderr: int
) -> Iterator[contain.Running]:
    """The jail of `plan`, executing the probes instead of its service. Its controlling terminal is `stdin`."""
    encoded = with_tree(plan, os.fspath(tree.path))
    wrapper = plan.cgroup.wrapper if plan.cgroup is not None else ()
    own_session = place.path / "wrapper"
    own_session.write_bytes(b"\0".join(os.fsencode(word) for word in (*wrapper, "setsid", "-c")))
    try:
        with contain.launch_generation(
            place.path, name=place.spec.name, argv=tree.run(PLACE), plan=encoded, stdin=stdin,
            stdout=subprocess.PIPE, stderr=stderr,
        ) as running:  # fmt: skip
            yield running
    finally:
        own_session.unlink()
