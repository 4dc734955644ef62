"""Try a generation: run its service and its exercises in the real jail, under observation. Keeps nothing."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from . import contain, observe
from .build.generations import Store, ids_of, on_files, remove_tree
from .build.lock import is_generated
from .contain.communicate import PIPES, communicate
from .contain.installing import control_groups
from .contain.runfiles import start_time
from .contain.volumes import prepare
from .errors import ServiceError
from .records.exercise import ExerciseResult, Outcome
from .records.lock import Lock
from .records.policy import CgroupPlan
from .records.seed import Seed
from .records.spec import Limits, Network, Spec
from .records.text import unescape
from .records.trace import Trace

__all__ = ["TRIED", "Trial", "try_inside"]

TRIAL_VOLUMES = ".trial-volumes"
#: How the names of volumes begin that the build does not know: what they start with may be written to.
TRIED = "tried-"
_LOG_TAIL = 64 * 1024
_MOST_OUTPUT = 1 << 20
_END_SECONDS = 10.0
#: Statuses of a service that a signal ended which nobody sends to stop one.
_CRASHES = frozenset(
    128 + number
    for number in (
        signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
    )
)  # fmt: skip
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """What a run inside showed. `failure` is why the service never became ready, None when it did.

    `ready_s` is the time until then, in seconds. `status` is that of a service that ended by itself, None for one that
    ran until it was stopped. `stopped`: it
    ended when it was told to, and did not have to be killed. `crashed`: that end was one by a fault of its own, such as
    an assertion.
    """

    trace: Trace
    exercises: tuple[ExerciseResult, ...]
    failure: ServiceError | None
    log: str
    status: int | None = None
    stopped: bool = True
    crashed: bool = False
    ready_s: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the service became ready and every exercise passed."""
        return self.failure is None and all(result.passed for result in self.exercises)


def try_inside(
    spec: Spec,
    lock: Lock,
    generation: Path,
    *,
    store: Store,
    client_seeds: Sequence[Seed],
    substitutions: Mapping[str, str],
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> Trial:
    """Run the jail in `generation`, committed or not, with volumes and a network of its own that vanish afterwards.

    The walls are those of the jail, but for two: the network is always a private one without ports outside, so that a
    trial disturbs no service that runs; and time is not limited, of which strace takes enough. `scratch` is the
    directory for its plan and volumes (default: the generation, which must not be committed yet). WallError when the
    launch fails.
    """
    trial_spec = msgspec.structs.replace(spec, network=Network(mode="private"))
    ids = contain.for_jail(spec.name)
    scratch = generation if scratch is None else scratch
    made = scratch / TRIAL_VOLUMES
    plan = contain.compile_plan(
        trial_spec, lock, generation=generation, volumes=made, ids=ids, cgroup=_cgroup(spec, generation)
    )
    instance = f"{spec.name}@{os.getpid()}"
    volumes = _volumes(generation, lock, made, ids=ids, uid=plan.uid, gid=plan.gid, store=store)
    with volumes, os.fdopen(os.memfd_create("log"), "rb", buffering=0) as log:
        (scratch / "plan").write_bytes(contain.encode(plan))
        # With its command named the launch opens no port; sockets of the jail's own network come through the gate.
        with contain.launch_generation(
            generation, name=instance, argv=plan.argv, plan=contain.encode(plan), gate=True, stdin=subprocess.DEVNULL,
            stdout=log.fileno(), stderr=log.fileno(), at_gate=len(spec.network.listen),
        ) as jail:
            seen = observe.inside(
                spec,
                pid=jail.pid,
                init_pid=jail.init_pid,
                release=jail.release,
                alive=lambda: _exists(jail.init_pid),
                log=lambda: _tail(log.fileno()),
                run_inside=lambda command, text, timeout_s, attach: _outcome(
                    _behind_the_walls(spec, generation, jail, command, scratch / "plan"), text, timeout_s, attach
                ),
                client_seeds=client_seeds,
                substitutions=substitutions,
                as_uid0_of=None if os.geteuid() == 0 else jail.pid,
                progress=progress,
            )
            status = jail.wait(_END_SECONDS)
    stopped = seen.seconds["stop"] < spec.service.stop_timeout_s
    return Trial(
        seen.trace, seen.exercises, seen.failure, seen.log, status if seen.ended else None, stopped, status in _CRASHES,
        seen.seconds["start"],
    )  # fmt: skip


def _cgroup(spec: Spec, generation: Path) -> CgroupPlan | None:
    """Control groups for memory and processes, where they can be had for this launch."""
    limits = Limits(memory=spec.limits.memory, processes=spec.limits.processes)
    cgroup = control_groups(limits, spec.name, generation)
    # The scope that systemd is to make is the generation's, and belongs to all of its limits.
    return cgroup if cgroup is None or not cgroup.wrapper or (generation / "wrapper").exists() else None


@contextmanager
def _volumes(
    generation: Path, lock: Lock, volumes: Path, *, ids: contain.IdRange, uid: int, gid: int, store: Store
) -> Iterator[None]:
    """Volumes for one trial, with what the rootfs has at their place."""
    prepare(lock, rootfs=generation / "rootfs", volumes=volumes, ids=ids, uid=uid, gid=gid)
    try:
        for found in lock.directories:
            if found.volume.startswith(TRIED):
                on_files(ids_of(store, uid, gid), _open_up, volumes / found.volume, unescape(found.path), lock)
        yield
    finally:
        if volumes.exists():
            on_files(ids_of(store, uid, gid), remove_tree, volumes)


def _open_up(volume: Path, place: str, lock: Lock) -> None:
    """Give the owner of each file that was copied into `place` the right to write, as a build does in a volume."""
    generated = {unescape(entry.path) for entry in lock.entries if is_generated(entry)}
    for above, _, files, descriptor in os.fwalk(volume):
        within = os.path.normpath(f"{place}/{os.path.relpath(above, volume)}")
        for name in files:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode) and f"{within}/{name}" not in generated:
                os.chmod(name, stat.S_IMODE(status.st_mode) | stat.S_IWUSR, dir_fd=descriptor)


def _exists(pid: int) -> bool:
    return pid > 0 and os.path.exists(f"/proc/{pid}")


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _LOG_TAIL, max(0, size - _LOG_TAIL)).decode("utf-8", "replace")


def _behind_the_walls(
    spec: Spec, generation: Path, jail: contain.Running, command: Sequence[str], plan: Path
) -> contain.Running:
    """Run a command in the running jail, or, when its service was a command that has ended, in one of its own."""
    if not spec.service.forks and start_time(jail.pid) is None:
        # PID 1 ends a moment after its service, and would take the command with it.
        jail.wait(_END_SECONDS)
    if _exists(jail.init_pid):
        return contain.enter(jail.instance, command, gate=True, plan=plan, **PIPES)
    return contain.launch_generation(
        generation, name=jail.name, argv=command, plan=plan.read_bytes(), gate=True, **PIPES
    )  # fmt: skip


def _outcome(started: contain.Running, text: bytes, timeout_s: float, attach: observe.Attach) -> Outcome:
    """What came of a command that waits at its gate, under observation, after `timeout_s` seconds at most."""
    with started as running:
        attach(running.pid)
        running.release()
        output = communicate(running, text, timeout_s=timeout_s, most_bytes=_MOST_OUTPUT)
    return Outcome(status=output.status, stdout=output.stdout, stderr=output.stderr)
