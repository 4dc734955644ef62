"""Find the least policy by trials in the jail: the capabilities it can do without, and what a failed one lacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from .policy.blocked import blocked, granted
from .records.lock import Lock
from .records.spec import Spec
from .records.trace import Trace
from .resolve.capabilities import strongest_first
from .trial import Trial
from .why import Diagnosis, Run, diagnose

__all__ = ["Least", "Wanted", "least", "reasons"]

Progress = Callable[[str], None]


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
    service that stops by itself with it and has to be killed without it needs it too.
    """
    found = Least(lock, trial)
    for name in strongest_first(lock.capabilities):
        progress(f"trying it without the capability `{name}`")
        kept = tuple(other for other in found.lock.capabilities if other != name)
        less = msgspec.structs.replace(found.lock, capabilities=kept)
        tried = run(spec, less)
        if good(tried) and (tried.stopped or not found.trial.stopped):
            before = {one.key for one in blocked(found.trial.trace, spec, found.lock)}
            found.missed[name] = tuple(
                one.refusal.what
                for one in blocked(tried.trace, spec, less)
                if one.refusal.wall in ("capability", "files") and one.key not in before
            )
            found.lock, found.trial = less, tried
    return found


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
