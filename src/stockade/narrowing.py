"""Find the least policy by trials in the jail: the capabilities it can do without, and what a failed one lacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from .contain.identity import users
from .errors import ExerciseError, ServiceError
from .policy.blocked import blocked, granted
from .policy.listed import partly_there
from .policy.proposal import propose
from .records.exercise import ExerciseResult
from .records.lock import Lock
from .records.proposal import Proposal
from .records.spec import Spec
from .records.trace import Trace
from .resolve.capabilities import strongest_first
from .trial import Trial
from .why import Diagnosis, Run, diagnose, explained

__all__ = ["Least", "Wanted", "failure", "least", "proposal", "reasons"]

Progress = Callable[[str], None]

#: How much slower than in a good run something may be in one of a search, and the seconds that it may take anyway.
_SLOWER, _PATIENCE_S = 20, 5.0


@dataclass(frozen=True)
class Wanted:
    """What a run inside must do to count as working: what it did outside."""

    status: int | None = None

    def __call__(self, trial: Trial) -> bool:
        """Whether everything passed, and a command that ended did so with the same status."""
        return trial.passed and (self.status is None or trial.status is None or trial.status == self.status)


@dataclass
class Least:
    """A lock with only the capabilities that are needed, the last run with them, and what is missed without others."""

    lock: Lock
    trial: Trial
    missed: dict[str, tuple[str, ...]] = field(default_factory=dict)


def least(
    spec: Spec, lock: Lock, trial: Trial, *, run: Run, good: Callable[[Trial], bool], progress: Progress
) -> Least:  # fmt: skip
    """Leave out each capability of `lock` once, the strongest first, and keep those without which `good` fails.

    `trial` is a run of `lock` that is good. Leaving one out cannot make up for another, so that once is enough. A
    service that stops by itself with it, and without it has to be killed or crashes then, needs it too; so does one
    that takes very much longer without it.
    """
    found = Least(lock, trial)
    hurried = _hurried(spec, trial)
    for name in strongest_first(lock.capabilities):
        progress(f"trying it without the capability `{name}`")
        kept = tuple(other for other in found.lock.capabilities if other != name)
        less = msgspec.structs.replace(found.lock, capabilities=kept)
        tried = run(hurried, less)
        as_clean = (tried.stopped or not found.trial.stopped) and (found.trial.crashed or not tried.crashed)
        if good(tried) and as_clean:
            before = {one.key for one in blocked(found.trial.trace, spec, found.lock)}
            found.missed[name] = tuple(
                one.refusal.what
                for one in blocked(tried.trace, spec, less)
                if one.refusal.wall in ("capability", "files") and one.key not in before
            )
            found.lock, found.trial = less, tried
    return found


def _hurried(spec: Spec, trial: Trial) -> Spec:
    """`spec` with shorter time limits, as everything in it took no longer in `trial`: what hangs is waited for anew."""

    def limit(timeout_s: float, seconds: float) -> float:
        return min(timeout_s, max(_PATIENCE_S, _SLOWER * seconds))

    ready = msgspec.structs.replace(spec.service.ready, timeout_s=limit(spec.service.ready.timeout_s, trial.ready_s))
    exercises = tuple(
        msgspec.structs.replace(exercise, timeout_s=limit(exercise.timeout_s, result.seconds))
        for exercise, result in zip(spec.exercises, trial.exercises, strict=True)
    )
    return msgspec.structs.replace(
        spec, service=msgspec.structs.replace(spec.service, ready=ready), exercises=exercises
    )


def reasons(
    trial: Trial, spec: Spec, lock: Lock, rootfs: Path, *, run: Run, good: Callable[[Trial], bool],
    outside: Trace | None, searched: tuple[str, ...], progress: Progress,
) -> Diagnosis:  # fmt: skip
    """Why the run `trial` failed, with the least that lets it work where that is known.

    `searched` are capabilities that were given on trial only and may turn out not to be needed.
    """
    progress("finding out what was refused")
    found = diagnose(trial, spec, lock, rootfs, run=run, outside=outside, good=good)
    if not found.cured or not searched:
        return found
    loosened = found.loosened
    for name in strongest_first(set(granted(loosened, lock)) & set(searched)):
        progress(f"trying it without the capability `{name}`")
        kept = tuple(other for other in granted(loosened, lock) if other != name)
        policy = msgspec.structs.replace(loosened.policy, capabilities=kept)
        less = msgspec.structs.replace(loosened, policy=policy)
        if good(run(less, lock)):
            loosened = less
    found.loosened = loosened
    return found


def failure(trial: Trial, wanted: Wanted, diagnosis: Diagnosis, lock: Lock, *, observed: bool) -> ServiceError:
    """What failed in `trial` of `lock`, what was refused, and how to allow it. `observed`: it worked outside."""
    where = "works outside, not in its jail" if observed else "does not work in its jail"
    kind, hint, said, tip = ServiceError, "`-v` shows the service's log", "", ""
    result = next((result for result in trial.exercises if not result.passed), None)
    if trial.failure is not None:
        message, hint = f"the service {where}: {trial.failure.message}", trial.failure.hint or hint
    elif result is not None:
        kind = ExerciseError
        output = (result.stderr.strip() or result.stdout.strip()).splitlines()
        said = f"it said: {output[-1]}" if output else ""
        tip = _unknown_client(trial, result, diagnosis.spec) if observed and not diagnosis.cured else ""
        message = f"exercise `{result.name}` {where}: {result.reason}"
    else:
        message = f"the command {where}: status {trial.status} inside, {wanted.status} outside"
    lines = explained(diagnosis)
    if lines:
        message, said = f"{'; '.join(filter(None, (message, said)))}\n{lines}", ""
    advice = diagnosis.advice if lines else ""
    told = diagnosis.cured or any(
        one.never or (one.wall == "missing" and not one.path.startswith("/proc/")) for one in diagnosis.refusals
    )
    listed = partly_there(trial.trace, diagnosis.spec, lock) if observed and not told else ""
    if not any((said, tip, advice)):
        said = hint
    return kind(message, hint="; ".join(filter(None, (said, tip, listed, advice))), log=trial.log)


def _unknown_client(trial: Trial, result: ExerciseResult, spec: Spec) -> str:
    """What may be wrong where a client speaks to a service by a unix socket; "" where it does not."""
    client = spec.exercises[trial.exercises.index(result)].where == "client"
    bound = {one.address for one in trial.trace.sockets if one.operation == "bind" and one.family == "unix"}
    if not client or not any(address.startswith("/") for address in bound):
        return ""
    return (
        "to a service that asks who is at the other end of its unix socket, a client outside the jail is nobody: "
        'see whether it passes with `where = "inside"` in `[[exercises]]`'
    )


def proposal(
    trial: Trial, spec: Spec, lock: Lock, rootfs: Path, *, missed: Mapping[str, Sequence[str]], outside: Trace | None
) -> Proposal:
    """The narrowest policy for what was done in `trial`, in which everything worked."""
    return propose(trial.trace, spec, lock, names=users(rootfs), missed=missed, outside=outside)
