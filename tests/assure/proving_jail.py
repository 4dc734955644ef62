"""A jail of busybox to prove things about, made without a build, and what a run of probes gave."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest

from stockade import contain, places
from stockade.build.lock import encode
from stockade.records.lock import Lock, LockDirectory, LockedSpec, LockEntry
from stockade.records.proof import ProbeResult, ProbeRun
from stockade.records.spec import Spec

BUSYBOX = Path("/bin/busybox")
_DIRECTORIES = ("bin", "dev", "etc", "proc", "tmp", "run", "root", "srv")
_LIBRARIES = ("lib64", "lib")

LIMITS = {"memory": "256M", "processes": 64, "open_files": 256, "cpus": 1.0}


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("run as root: the jail gets ids of its own, and a chroot needs it")
    if not BUSYBOX.exists():
        pytest.skip("`apt-get install busybox-static`: the jails of these tests hold nothing else")


def make_rootfs(root: Path) -> None:
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\ntty:x:5:\nwww:x:33:\nlogs:x:44:www\n")
    root.chmod(0o755)


def make_jail(
    name: str = "test", *, proc: str = "full", volume: bool = False, size: int = 0, **spec: object
) -> Path:
    """Build and install the jail `name`; returns its generation."""
    generation = places.jail(name) / "generations" / "0001"
    make_rootfs(generation / "rootfs")
    srv = (LockDirectory(path="/srv", mode=0o755, uid=33, gid=33, volume="srv", size=size),) if volume else ()
    lock = Lock(
        spec=LockedSpec(name=name, sha256="0" * 64), architecture=os.uname().machine, proc=proc,
        entries=tuple(LockEntry(path=f"/{name}", type="directory", mode=0o755) for name in ("", *_DIRECTORIES)),
        directories=(LockDirectory(path="/run", mode=0o755), LockDirectory(path="/tmp", mode=0o1777), *srv),
    )  # fmt: skip
    service = {"command": ["/bin/sh"], "user": "www"}
    full = msgspec.convert({"name": name, "service": service} | spec, Spec)
    contain.install(full, lock, generation=generation)
    (generation / "spec.json").write_bytes(msgspec.json.encode(full))
    (generation / "lock.json").write_bytes(encode(lock))
    (places.jail(name) / "current").symlink_to("generations/0001")
    return generation


def outcomes(runs: Iterable[ProbeRun], outcome: str) -> set[str]:
    """Ids of the probes with this outcome in any of the runs."""
    return {result.id for run in runs for result in run.results if result.outcome == outcome}


def found(run: ProbeRun, probe: str) -> ProbeResult:
    return next(result for result in run.results if result.id == probe)


def state_of_host() -> dict[str, object]:
    """What a proof must leave as it was, in this process and around it."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        "mounts": [line for line in mounts if ".stockade" in line or "stockade-peer-" in line],
        "hostname": os.uname().nodename,
        "groups": os.getgroups(),
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "descriptors": {name: os.readlink(f"/proc/self/fd/{name}") for name in open_descriptors()},
        "capabilities": [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cap")],
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    }


def open_descriptors() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]


Make = Callable[..., Path]
