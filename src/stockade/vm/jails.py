"""The image of a built jail: its root file system, its service's plan, and the plan of the walls within a guest."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stockade.contain.compile import compile_plan
from stockade.contain.encoding import encode
from stockade.contain.starting import current
from stockade.errors import SpecError
from stockade.records.image import Image, ImageStart
from stockade.records.launch import Filesystem, IdRange, LaunchPlan, MakeDirectory, MakeSymlink, MountStep
from stockade.records.lock import Lock
from stockade.records.spec import Spec
from stockade.records.text import unescape

from . import staging

__all__ = ["bare_plan", "image_of_jail", "inner_plan"]

#: Ids within a guest that the jail in it gets: nobody else has any there.
_INNER = IdRange(first=100000, first_gid=100000, count=65536, kind="root-range")
_VOLUMES = f"{staging.HOME}/volumes"


def image_of_jail(
    jail: str, name: str, *, size: int | None = None, ports: bool = True, beside: Sequence[staging.Addition] = ()
) -> Image:
    """Make the image `name` of the jail's current generation. NotFoundError when it was not built.

    `beside` are files that it gets beyond those of the jail.
    What lies in the jail's volumes does not go in: the image has them as the build made them.
    """
    generation = current(jail)
    spec = msgspec.json.decode((generation / "spec.json").read_bytes(), type=Spec)
    lock = msgspec.json.decode((generation / "lock.json").read_bytes(), type=Lock)
    if spec.mounts:
        raise SpecError(
            f"jail `{jail}` mounts `{spec.mounts[0].source}` of the host, and a guest has none of the host's files",
            hint="leave `mounts` out of the spec, or copy what is needed with `files.include`",
        )
    volumes = [found for found in lock.directories if found.volume]
    plan = inner_plan(spec, lock, generation)
    start = ImageStart(
        plan={"vm": f"{staging.HOME}/vm.plan", "jail": f"{staging.HOME}/jail.plan"},
        mounts=f"{staging.HOME}/mounts.plan",
        stop_signal=int(getattr(signal, spec.service.stop_signal)),
        stop_ms=int(spec.service.stop_timeout_s * 1000),
        end=True,
    )
    record = Image(
        name=name, sha256="", size=0, mtime=0, origin="jail", source=jail, start=start,
        created=_when(generation), publish=spec.network.publish if ports else (), ready_tcp=spec.service.ready.tcp,
        ready_s=spec.service.ready.timeout_s,
        secrets=any(entry.secret for entry in lock.entries),
    )  # fmt: skip
    inner_root, inner_gid = _INNER.first, _INNER.first_gid
    return staging.image_of(
        name, generation / "rootfs", record,
        additions=[
            staging.Addition(path=start.plan["vm"], content=encode(bare_plan(spec, lock, plan))),
            staging.Addition(path=start.plan["jail"], content=encode(plan)),
            staging.Addition(path=start.mounts, content=encode(_mounts_plan(plan))),
            *beside,
        ],
        copies={f"{_VOLUMES}/{found.volume}": unescape(found.path) for found in volumes},
        directories=[
            *(staging.Owned(path=unescape(found.path), mode=found.mode, uid=found.uid, gid=found.gid)
              for found in volumes),
            *(staging.Owned(path=f"{_VOLUMES}/{found.volume}", mode=found.mode, uid=inner_root + found.uid,
                            gid=inner_gid + found.gid) for found in volumes),
        ],
        owners={unescape(entry.path): (entry.uid, entry.gid) for entry in lock.entries if entry.uid or entry.gid},
        size=size,
    )  # fmt: skip


def _unsized(lock: Lock) -> Lock:
    """A guest's volumes are directories on its disk, which has a size."""
    directories = (msgspec.structs.replace(found, size=0, inodes=0) for found in lock.directories)
    return msgspec.structs.replace(lock, directories=tuple(directories))


def _when(generation: Path) -> float:
    return os.stat(generation / "lock.json").st_mtime


def inner_plan(spec: Spec, lock: Lock, generation: Path) -> LaunchPlan:
    """The jail's own plan as it runs in a guest: on the guest's network, without Landlock where UML has none."""
    policy = msgspec.structs.replace(spec.policy, landlock=False)
    network = msgspec.structs.replace(spec.network, mode="host", publish=(), egress=False)
    inside = msgspec.structs.replace(spec, walls=("jail",), policy=policy, network=network)
    hidden = Filesystem(type="tmpfs", target=staging.HOME, options=("nr_inodes=1", "mode=0"), writable=False)
    plan = compile_plan(
        inside, _unsized(lock), generation=generation, volumes=Path(_VOLUMES), ids=_INNER, extra=(hidden,)
    )
    return msgspec.structs.replace(plan, root="/")


def bare_plan(spec: Spec, lock: Lock, plan: LaunchPlan) -> LaunchPlan:
    """The plan of the service alone, as its user: the guest is its wall."""
    return msgspec.structs.replace(plan, chroot=True, namespaces=(), mounts=(), sysctls=(), loopback=False)


def _mounts_plan(plan: LaunchPlan) -> LaunchPlan:
    """The jail's tmpfs directories, for a guest without a jail in it; its /dev and /proc are the guest's own."""
    return msgspec.structs.replace(plan, mounts=tuple(step for step in plan.mounts if _is_own(step)))


def _is_own(step: MountStep) -> bool:
    if not isinstance(step, (Filesystem, MakeDirectory, MakeSymlink)):
        return False
    path = step.path if isinstance(step, (MakeDirectory, MakeSymlink)) else step.target
    return not path.startswith(("/dev", "/proc", staging.HOME))
