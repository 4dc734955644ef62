"""Observe one run of a service and its exercises inside, in its jail, beside the run outside."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ..records.exercise import Outcome
from ..records.seed import Seed
from ..records.spec import Spec
from .exercise import Runner, client, perform, title
from .given import given_sockets
from .parse import Recorded, parse, read
from .ready import Probe
from .run import SYSLOG, Observation, Progress, Steps, started
from .service import JailedService, check
from .tracer import Tracer
from .view import View

__all__ = ["Attach", "inside", "root_of"]

#: Attaches strace to the process with that host id.
Attach = Callable[[int], None]


def inside(
    spec: Spec,
    *,
    pid: int,
    init_pid: int,
    release: Callable[[tuple[int, ...]], None],
    alive: Callable[[], bool],
    log: Callable[[], str],
    run_inside: Callable[[Sequence[str], bytes, float, Attach], Outcome],
    client_seeds: Sequence[Seed] = (),
    substitutions: Mapping[str, str],
    as_uid0_of: int | None = None,
    progress: Progress | None = None,
    syscalls: bool = True,
) -> Observation:
    """The same exercises against a jail whose warden waits at its gate, with clients in its network.

    `pid` and `init_pid` are the host ids of the process that becomes the service and of the jail's first process;
    `release` opens the gate and gives the service these sockets, `alive` and `log` tell of the jail. `run_inside` runs
    a command behind the walls; while the command waits at a gate it calls the function that it is given, which attaches
    strace. An ordinary user gives `as_uid0_of` a process of the jail's user namespace. All exercises are run, and
    nothing is raised for one that fails: the trace says what is missing. The service is stopped at the end, the jail is
    the caller's to end.
    """
    steps = Steps(progress)
    base = root_of(pid)
    with contextlib.ExitStack() as stack:
        with steps.step("view", "making a view for the clients"):
            view = stack.enter_context(View.open(seeds=client_seeds, network_of=pid, service_root_of=pid))
        with steps.step("start", f"starting `{spec.service.command[0]}` in its jail"):
            strace = stack.enter_context(
                Tracer.attach(pid, directory=view.scratch, prefix="t", as_uid0_of=as_uid0_of, syscalls=syscalls)
            )
            with given_sockets(spec, view) as sockets:
                release(sockets)
            service = JailedService(pid, init_pid, strace, spec.service, lambda: _traced(view.scratch), alive)
            probe = Probe(
                pid=view.pid,
                exists=view.exists,
                run=lambda command, timeout_s: client(view)(command, b"", timeout_s).status,
                log=log,
                check=lambda: check(spec, service, log),
                ended=lambda: not service.alive(),
                ticks=service.ticks,
                ignored=frozenset((SYSLOG,)),
            )
            failure = started(spec, probe)
        results = []
        recorded = [Recorded("t", pid, directory=spec.service.directory)]

        others: list[Tracer] = []

        def attach(command: int) -> None:
            prefix = f"x{len(recorded)}"
            user = command if as_uid0_of is not None else None
            others.append(stack.enter_context(
                Tracer.attach(command, directory=view.scratch, prefix=prefix, as_uid0_of=user, syscalls=syscalls)
            ))  # fmt: skip
            recorded.append(Recorded(prefix, command, directory=spec.service.directory))

        with steps.step("exercises", "exercising it in its jail"):
            runners: dict[str, Runner] = {
                "client": client(view),
                "inside": lambda command, text, timeout_s: run_inside(command, text, timeout_s, attach),
            }
            for exercise in spec.exercises if failure is None else ():
                steps.tell(f"exercise inside: {title(exercise)}")
                results.append(perform(exercise, runners[exercise.where], substitutions))
        ended = not service.alive()
        stopped = math.inf if ended else time.time()
        with steps.step("stop", "stopping it"):
            service.stop()
            for tracer_of in (strace, *others):
                tracer_of.close()
        with steps.step("parse", "reading the trace"):
            lines = _ended_by_itself(read(view.scratch, recorded), stopped)
            trace = parse(lines, recorded, base=base, names=syscalls)
            seconds = steps.seconds["start"] + steps.seconds["exercises"]
            trace = msgspec.structs.replace(trace, where="inside", seconds=seconds)
    return Observation(trace, tuple(results), log(), None, failure, dict(steps.seconds), ended)


def _ended_by_itself(lines: list[tuple[str, int, str]], stopped: float) -> list[tuple[str, int, str]]:
    """Strace's lines without those of processes that were killed from `stopped` on, in seconds since the epoch."""
    return [line for line in lines if not (line[2].startswith("+++ killed by SIGKILL") and float(line[0]) >= stopped)]


def root_of(pid: int) -> str:
    """Root directory of a process as the host names it: `/` behind pivot_root, a path behind a chroot."""
    try:
        return os.readlink(f"/proc/{pid}/root")
    except OSError:
        return "/"


def _traced(directory: int) -> list[int]:
    """Ids of the processes that strace has written a file for."""
    return [int(name.rpartition(".")[2]) for name in os.listdir(directory) if name.startswith("t.")]
