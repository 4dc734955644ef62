"""A jail's own launch with the probes in it: the plan as compiled, plus one mount for the probes' tree."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stockade import contain, places
from stockade.build.generations import Ids, Store, ids_of, on_files
from stockade.contain import network as networks
from stockade.contain import wire
from stockade.contain.volumes import prepare
from stockade.errors import StateError
from stockade.kernel import cgroup_plan, cgroups
from stockade.records.generation import Generation
from stockade.records.launch import Bind, Filesystem, LaunchPlan, MakeDirectory, ReadOnly
from stockade.records.policy import CgroupPlan
from stockade.records.spec import Spec

from .probetree import ProbeTree

__all__ = ["PLACE", "Change", "Workplace", "launched", "workplace", "writable"]

PLACE = "/dev/.stockade-probe"

Change = Callable[[LaunchPlan], LaunchPlan]

_PREFIX = ".prove-"
_RDONLY, _NOSUID, _NODEV = 1, 2, 4


@dataclass(frozen=True)
class Workplace:
    """A directory of the jail's for one proof. It stands in for the generation's own; its volumes are copies."""

    path: Path
    generation: Generation
    spec: Spec
    ids: Ids

    @property
    def volumes(self) -> Path:
        """Copies of what the volumes begin with: the jail's own are not touched."""
        return self.path / "volumes"

    def plan(self, spec: Spec) -> LaunchPlan:
        """The launch plan of the jail with `spec`, as a build compiles it, seen from this directory."""
        ids = contain.for_jail(spec.name)
        plan = contain.compile_plan(
            spec, self.generation.lock, generation=self.generation.path, volumes=self.volumes, ids=ids,
            cgroup=self._cgroup(spec),
        )  # fmt: skip
        prepare(self.generation.lock, rootfs=self.generation.rootfs, volumes=self.volumes, ids=ids, uid=plan.uid,
                gid=plan.gid)  # fmt: skip
        networks.write_marker(spec.network, ids, self.path)
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
def workplace(name: str) -> Iterator[Workplace]:
    """A place for one proof of the current generation of the jail `name`; nothing is left of it.

    What an earlier proof that was killed left is removed first. StateError when nothing was built.
    """
    store = Store(name)
    generation = store.current()
    if generation is None:
        raise StateError(f"jail `{name}` has not been built", hint=f"`stockade build {name}` builds it")
    spec = msgspec.json.decode((generation.path / "spec.json").read_bytes(), type=Spec)
    if spec.walls != ("jail",):
        raise StateError(
            f"`{name}` has the walls {' '.join(spec.walls)}, and the probes are for a jail by itself",
            hint='build it with `walls = ["jail"]`; `--against chroot,chroot-nobody` shows what a plain chroot holds',
        )
    who = contain.compile_plan(
        spec, generation.lock, generation=generation.path, volumes=store.volumes, ids=contain.for_jail(name)
    )
    ids = ids_of(store, who.uid, who.gid)
    directory = Path(os.path.realpath(places.jail(name)))
    for left in directory.glob(f"{_PREFIX}*"):
        if not _alive(left.name.removeprefix(_PREFIX).partition("-")[0]):
            on_files(ids, shutil.rmtree, left)
    path = directory / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(3)}"
    path.mkdir(mode=0o755)
    try:
        yield Workplace(path, generation, spec, ids)
    finally:
        on_files(ids, shutil.rmtree, path)


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


@contextlib.contextmanager
def launched(
    place: Workplace, plan: LaunchPlan, tree: ProbeTree, *, stdin: int, stderr: int
) -> Iterator[contain.Running]:
    """The jail of `plan`, executing the probes instead of its service. Its controlling terminal is `stdin`.

    The tree's mount alone honours setuid and file capabilities, so that only no_new_privs stands against the helpers.
    """
    mount = Bind(source=os.fspath(tree.path), target=PLACE, own=True)
    steps = list(plan.mounts)
    at = next((number for number, step in enumerate(steps) if step == ReadOnly(path="/dev")), len(steps))
    steps[at:at] = [MakeDirectory(path=PLACE, mode=0o755, uid=plan.inside_uid, gid=plan.inside_gid), mount]
    encoded = contain.encode(msgspec.structs.replace(plan, mounts=tuple(steps)))
    idmap = wire.TREE_IDMAP if plan.ids.kind == "root-range" else 0
    plain, honouring = (
        wire.text(wire.BIND, mount.source, mount.target, numbers=numbers)
        for numbers in ((wire.TREE_OWN, _NOSUID | _NODEV | _RDONLY), (wire.TREE_OWN | idmap, _NODEV | _RDONLY))
    )
    if encoded.count(plain) != 1:
        raise StateError("the plan does not hold the mount of the probes", hint="this is a fault of Stockade's own")
    wrapper = plan.cgroup.wrapper if plan.cgroup is not None else ()
    own_session = place.path / "wrapper"
    own_session.write_bytes(b"\0".join(os.fsencode(word) for word in (*wrapper, "setsid", "-c")))
    try:
        with contain.launch_generation(
            place.path, name=place.spec.name, argv=tree.run(PLACE), plan=encoded.replace(plain, honouring), stdin=stdin,
            stdout=subprocess.PIPE, stderr=stderr,
        ) as running:  # fmt: skip
            yield running
    finally:
        own_session.unlink()
