"""Observe one run of a service and its exercises outside, in a throwaway view of the host."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from ..errors import ExerciseError, ServiceError
from ..records.exercise import ExerciseResult, Outcome
from ..records.seed import Seed
from ..records.spec import Exercise, Spec, ready_beside
from ..records.text import escape
from ..records.trace import Trace
from . import tracer
from .absent import cures
from .exercise import CLIENT_ENVIRONMENT, Runner, client, communicate, perform, title
from .given import given_ports, given_sockets
from .parse import Recorded, parse, read
from .process import Process
from .ready import Probe, await_ready, conditions, settle
from .scripts import with_lines
from .service import LAST_WORDS_S, ViewedService, check, until
from .standins import stand_ins
from .view import View
from .viewtree import RUN, TRACE_DIRECTORY

__all__ = ["SYSLOG", "Identity", "Observation", "Progress", "Steps", "outside", "started", "tail"]

_LOG_TAIL = 64 * 1024
SYSLOG = "/dev/log"
"""A socket of Stockade's own in each view and jail, which says nothing of the service."""
_MOST_STAND_INS = 8  # runs; each may show what the one before did not come to
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Identity:
    """Ids that the service starts with; ids of the host in a root's view, of the user's mapping otherwise.

    An ordinary user without a range of ids has one id in a view: the service's, or the own where that is root's.
    """

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Observation:
    """What one run showed.

    `status` is that of a command that ended by itself, `failure` why a service inside did not become ready,
    `seconds` the time that each step took. `ended`: all of a service inside had ended before it was stopped.
    `stopped`: one outside ended when it was told to, and did not have to be killed.
    """

    trace: Trace
    exercises: tuple[ExerciseResult, ...] = ()
    log: str = ""
    status: int | None = None
    failure: ServiceError | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    ended: bool = False
    stopped: bool = True


class Steps:
    """The time that each step took, by its name; tells the progress callback of each."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        self.tell(text)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - start

    def tell(self, text: str) -> None:
        if self._progress is not None:
            self._progress(text)


def outside(
    spec: Spec,
    *,
    seeds: Sequence[Seed],
    client_seeds: Sequence[Seed] = (),
    substitutions: Mapping[str, str],
    identity: Identity,
    environment: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    syscalls: bool = False,
) -> Observation:
    """Run the service and its exercises in a throwaway view of the host, and tell what they touched.

    `seeds` are the files that Stockade gives the service, `client_seeds` those for exercises. `syscalls` has the
    names of all system calls in the trace, at about twice the cost. ServiceError if the service is never ready or ends
    early, ExerciseError if an exercise fails: then the program does not work outside a jail either.

    The run has no_new_privs, as every jail has, because that allows the fast way to trace. Where it fails after
    a program with setuid, setgid or file capabilities was executed, it is done again without. An ordinary user's run
    that fails is done again with stand-ins for what it was refused to write to.
    """
    tracer.require()
    once = _Outside(spec, seeds, client_seeds, substitutions, identity, environment, Steps(progress), syscalls)
    observation, error = once.observe()
    if error is not None and not syscalls and _privileged(observation.trace):
        once.steps.tell("once more, with setuid programs in force")
        once = replace(once, privileged=True)
        observation, error = once.observe()
    for _ in range(_MOST_STAND_INS):
        given = once.stand_ins(observation.trace) if error is not None or observation.status else ()
        if not given:
            break
        once.steps.tell(f"once more, with what this user may not write to as copies: {_named(given)}")
        once = replace(once, seeds=[*once.seeds, *given])
        observation, error = once.observe()
    if error is not None:
        error.hint = "; ".join(filter(None, (error.hint, *cures(observation.trace, spec))))
        raise error
    return observation


def _named(seeds: Sequence[Seed]) -> str:
    """The paths of `seeds`, the first three of them."""
    shown = ", ".join(f"`{escape(seed.path)}`" for seed in seeds[:3])
    return f"{shown} and {len(seeds) - 3} more" if len(seeds) > 3 else shown


def _privileged(trace: Trace) -> bool:
    """Whether a program was executed that gains rights by its file's mode or capabilities."""
    for program in {execution.program for execution in trace.executions}:
        try:
            status = os.stat(program)
            if status.st_mode & (stat.S_ISUID | stat.S_ISGID) or "security.capability" in os.listxattr(program):
                return True
        except OSError:
            continue
    return False


@dataclass(frozen=True)
class _Outside:
    spec: Spec
    seeds: Sequence[Seed]
    client_seeds: Sequence[Seed]
    substitutions: Mapping[str, str]
    identity: Identity
    environment: Mapping[str, str] | None
    steps: Steps
    syscalls: bool
    privileged: bool = False

    def observe(self) -> tuple[Observation, ServiceError | None]:
        spec, steps = self.spec, self.steps
        recorded: list[Recorded] = []
        results: list[ExerciseResult] = []
        error: ServiceError | None = None
        with contextlib.ExitStack() as stack:
            with steps.step("view", "making a view of the host"):
                view = stack.enter_context(View.open(seeds=[*self.seeds, *self.client_seeds], single=self._single()))
            with steps.step("start", f"starting `{spec.service.command[0]}` outside a jail"):
                with given_sockets(spec, view) as sockets:
                    process = self._spawn(
                        view, recorded, spec.service.command, stdout=view.log, stderr=view.log, sockets=sockets
                    )
                stack.enter_context(process)
                service = ViewedService(view, process, spec.service)
                probe = Probe(
                    pid=view.pid,
                    exists=view.exists,
                    run=lambda command, timeout_s: client(view)(command, b"", timeout_s).status,
                    log=lambda: tail(view.log),
                    check=lambda: check(spec, service, lambda: tail(view.log)),
                    ended=lambda: service.status is not None,
                    ticks=service.ticks,
                    ignored=frozenset((SYSLOG,)),
                )
                error = started(spec, probe)
            with steps.step("exercises", "exercising it outside a jail"):
                runners = {"client": client(view), "inside": self._inside(view, recorded)}
                for exercise in spec.exercises if error is None else ():
                    steps.tell(f"exercise outside: {title(exercise)}")
                    result = perform(exercise, runners[exercise.where], self.substitutions)
                    results.append(result)
                    if not result.passed:
                        error = _exercise_error(spec, exercise, result, probe)
                        break
            status = service.status
            with steps.step("stop", "stopping it"):
                stopped = service.stop()
            with steps.step("parse", "reading the trace"):
                trace = parse(read(view.scratch, recorded), recorded, names=self.syscalls)
                trace = _without(trace, RUN, seconds=steps.seconds["start"] + steps.seconds["exercises"])
                trace = with_lines(trace, view.pid)
            log = tail(view.log)
        seen = Observation(trace, tuple(results), log, status, None, dict(steps.seconds), stopped=stopped)
        return seen, error

    def stand_ins(self, trace: Trace) -> tuple[Seed, ...]:
        """Further seeds for an ordinary user's run that was refused to write what its ids may write on the host."""
        if os.geteuid() == 0:
            return ()
        identity = self.identity
        return stand_ins(
            trace, uid=identity.uid, groups=(identity.gid, *identity.groups), seeded={seed.path for seed in self.seeds}
        )

    def _single(self) -> tuple[int, int] | None:
        return (self.identity.uid, self.identity.gid) if self.identity.uid else None

    def _spawn(
        self,
        view: View,
        recorded: list[Recorded],
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int,
        stderr: int,
        sockets: Sequence[int] = (),
    ) -> Process:
        spec, identity = self.spec, self.identity
        prefix = f"t{len(recorded)}"
        before, environment = tracer.launcher(
            f"{TRACE_DIRECTORY}/{prefix}",
            environment=_service_environment(spec) if self.environment is None else self.environment,
            syscalls=self.syscalls,
            privileged=self.privileged,
        )
        process = view.spawn(
            command,
            before=before,
            environment=environment,
            directory=spec.service.directory,
            uid=identity.uid,
            gid=identity.gid,
            groups=identity.groups,
            umask=int(spec.service.umask, 8),
            processor=tracer.processor(),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            sockets=sockets,
        )
        recorded.append(
            Recorded(prefix, process.inner, skip=1 if view.manages_ids else 0, directory=spec.service.directory)
        )
        return process

    def _inside(self, view: View, recorded: list[Recorded]) -> Runner:
        """Exercises behind the walls: what they need must be in the jail, so they are traced too."""

        def run(command: Sequence[str], text: bytes, timeout_s: float) -> Outcome:
            return communicate(
                lambda stdin, stdout, stderr: self._spawn(
                    view, recorded, command, stdin=stdin, stdout=stdout, stderr=stderr
                ),
                text,
                timeout_s,
            )

        return run


def _service_environment(spec: Spec) -> dict[str, str]:
    """What the service finds in its environment: PATH, and what the spec sets."""
    return {"PATH": CLIENT_ENVIRONMENT["PATH"], **spec.service.environment}


def started(spec: Spec, probe: Probe) -> ServiceError | None:
    """Wait until the service is ready, as the spec says or as far as can be told; why it never was."""
    ready = ready_beside(spec.service.ready, given_ports(spec))
    try:
        if conditions(ready):
            await_ready(ready, probe)
        else:
            settle(probe, timeout_s=ready.timeout_s, until_end=not spec.exercises)
    except ServiceError as error:
        return error
    return None


def _exercise_error(spec: Spec, exercise: Exercise, result: ExerciseResult, probe: Probe) -> ExerciseError:
    until(probe.ended, LAST_WORDS_S)
    try:
        probe.check()
        died = ""
    except ServiceError as error:
        died = f"; {error.message}"
    said = (result.stderr.strip() or result.stdout.strip()).splitlines()
    hint = f"it said: {said[-1]}" if said else "it said nothing; try it by hand while the service runs"
    if not conditions(ready_beside(spec.service.ready, given_ports(spec))) and exercise.where == "client":
        hint += "; if it came too early, set `ready` in `[service]`"
    return ExerciseError(
        f"exercise `{title(exercise)}` does not work outside a jail either: {result.reason}{died}",
        hint=hint,
        log=probe.log(),
    )


def _without(trace: Trace, directory: str, *, seconds: float) -> Trace:
    """The trace without accesses to what Stockade itself has in a view."""
    kept = tuple(
        access for access in trace.accesses if access.path != directory and not access.path.startswith(f"{directory}/")
    )
    return msgspec.structs.replace(trace, accesses=kept, seconds=seconds)


def tail(descriptor: int) -> str:
    """The last of what a log holds."""
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _LOG_TAIL, max(0, size - _LOG_TAIL)).decode("utf-8", "replace")
