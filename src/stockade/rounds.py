"""From a generation that was made to one that is verified: trials inside, and what each round is to add."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from . import resolve
from .build import accounts
from .build.generations import Store
from .build.lock import encode as encode_lock
from .build.secrets import Material, substitutions
from .build.seeds import client_seeds
from .errors import ServiceError
from .kernel import userns
from .records.buildreport import Round
from .records.closure import Closure, Gap
from .records.generation import EXERCISES, PROPOSAL
from .records.lock import Lock
from .records.proposal import Proposal
from .records.spec import Spec
from .resolve.capabilities import CANDIDATES

if TYPE_CHECKING:
    from .narrowing import Wanted
    from .records.exercise import ExerciseResult
    from .records.trace import Trace
    from .trial import Trial

__all__ = ["Missing", "Progress", "Refused", "Work", "ordinary_hint", "verified"]

_MOST_ROUNDS = 10
Progress = Callable[[str], None]


class Missing(Exception):
    """A trial run showed gaps, obstacles, or accounts that are not there: the generation is not good enough yet."""

    def __init__(
        self, gaps: Sequence[Gap], users: Sequence[accounts.User] = (), groups: Sequence[accounts.Group] = ()
    ) -> None:
        super().__init__(f"{len(gaps)} gaps, {len(users)} users, {len(groups)} groups")
        self.gaps, self.users, self.groups = tuple(gaps), tuple(users), tuple(groups)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that are to be added."""
        files = ("/etc/passwd",) * bool(self.users) + ("/etc/group",) * bool(self.groups)
        return (*(gap.path for gap in self.gaps if gap.error != "EEXIST"), *files)


class Refused(Exception):
    """The service failed inside, or crashed at its end, with the capabilities that the trace suggests."""


class Work(msgspec.Struct):
    """One build: what is known so far. `status` is that with which a command that ends did so outside.

    `stopped`: the service ended outside when it was told to.
    """

    spec: Spec
    store: Store
    progress: Progress
    shown_secrets: frozenset[str]
    materials: Mapping[str, Material]
    package_of: Callable[[str], tuple[str, str] | None]
    stages: dict[str, float]
    rounds: list[Round] = []
    gaps: list[Gap] = []
    users: list[accounts.User] = []
    groups: list[accounts.Group] = []
    capabilities: tuple[str, ...] = ()
    results: tuple[ExerciseResult, ...] = ()
    ends: bool = False
    status: int | None = None
    stopped: bool = True
    proposal: Proposal | None = None

    @property
    def searches(self) -> bool:
        """Whether the capabilities are the build's to find. A service that is not root starts with none."""
        return self.spec.policy.capabilities == "auto" and self.spec.service.user == "root"

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Tell what is done now, and add the time it takes to the stage `name`, less that of stages within it."""
        self.progress(text)
        start, within = time.monotonic(), sum(self.stages.values())
        try:
            yield
        finally:
            inner = sum(self.stages.values()) - within
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - start - inner


def verified(work: Work, path: Path, lock: Lock, closure: Closure | None, trace: Trace | None) -> Lock:
    """The lock with the least capabilities, after a trial that showed no gap and in which everything passed."""
    from . import narrowing

    with work.stage("verify", f"trying it inside, round {len(work.rounds) + 1}"):
        trial = _trial(work, path, lock)
    if trace is not None and closure is not None:
        gaps = resolve.gaps(trace, trial.trace, closure)
        if gaps and len(work.rounds) < _MOST_ROUNDS:
            raise Missing(gaps)
    wanted = narrowing.Wanted(work.status)
    if not wanted(trial):
        users, groups = accounts.missed(
            "\n".join((trial.log, *(result.stdout + result.stderr for result in trial.exercises))),
            trial.trace, accounts.read(), accounts.read(path / "rootfs"),
        )  # fmt: skip
        obstacles = resolve.obstacles(trace, trial.trace, closure) if trace is not None and closure is not None else ()
        if closure is not None and (obstacles or users or groups) and len(work.rounds) < _MOST_ROUNDS:
            raise Missing(obstacles, users, groups)
        if work.searches and lock.capabilities != CANDIDATES:
            raise Refused
        with ordinary_hint(work.store, outside=False):
            raise _failure(work, path, lock, trial, trace, wanted)
    if trial.crashed and work.searches and lock.capabilities != CANDIDATES:
        raise Refused
    if trace is not None:
        work.rounds.append(Round(number=len(work.rounds) + 1, added=()))
    work.results = trial.exercises
    passed = [result.name for result in trial.exercises]
    (path / EXERCISES).write_bytes(msgspec.json.encode(passed))
    return _narrow(work, path, lock, trial, trace, wanted)


def _trial(work: Work, path: Path, lock: Lock, spec: Spec | None = None) -> Trial:
    from .trial import try_inside

    return try_inside(
        spec or work.spec, lock, path, store=work.store, client_seeds=client_seeds(work.spec, work.materials),
        substitutions=substitutions(work.spec, work.materials), progress=work.progress,
    )  # fmt: skip


def _failure(work: Work, path: Path, lock: Lock, trial: Trial, trace: Trace | None, wanted: Wanted) -> ServiceError:
    """What failed in `trial`, with what the walls refused and the lines that allow it."""
    from . import narrowing

    with work.stage("why", "finding out what was refused"):
        diagnosis = narrowing.reasons(
            trial, work.spec, lock, path / "rootfs", run=lambda spec, given: _trial(work, path, given, spec),
            good=wanted, outside=trace, searched=CANDIDATES if work.searches else (), progress=work.progress,
        )  # fmt: skip
    return narrowing.failure(trial, wanted, diagnosis, lock, observed=trace is not None)


def _narrow(work: Work, path: Path, lock: Lock, trial: Trial, trace: Trace | None, wanted: Wanted) -> Lock:
    """The lock with the least capabilities, kept in the generation with the policy that is enough."""
    from . import narrowing

    missed: Mapping[str, tuple[str, ...]] = {}
    if work.searches:
        with work.stage("capabilities", "finding the capabilities that it can do without"):
            found = narrowing.least(
                work.spec, lock, trial, run=lambda spec, given: _trial(work, path, given, spec), good=wanted,
                progress=work.progress,
            )  # fmt: skip
        lock, trial, missed = found.lock, found.trial, found.missed
        (path / "lock.json").write_bytes(encode_lock(lock))
    work.proposal = narrowing.proposal(trial, work.spec, lock, path / "rootfs", missed=missed, outside=trace)
    (path / PROPOSAL).write_bytes(msgspec.json.encode(work.proposal))
    return lock


@contextmanager
def ordinary_hint(store: Store, *, outside: bool) -> Iterator[None]:
    """Have what fails tell an ordinary user what root could do."""
    try:
        yield
    except ServiceError as error:
        cure = _ordinary_cure(store, outside=outside)
        if cure:
            error.hint = f"{error.hint}; {cure}" if error.hint else cure
        raise


def _ordinary_cure(store: Store, *, outside: bool) -> str:
    """What may help an ordinary user with a service that fails outside or inside; "" if nothing would."""
    match store.ids:
        case userns.Single():
            return f"where several ids are needed, you need a range of them: {userns.range_cure()}"
        case userns.Range() if outside:
            return (
                "where root's rights over this host are needed, build it as root, and then here from that jail's lock: "
                f"`stockade build {store.name} --lock FILE`"
            )
        case _:
            return ""
