"""Join the stages: from a spec to a verified jail. What a stage does is the stage's own affair."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from . import contain, observe, resolve
from .build import accounts, from_lock
from .build import build as build_rootfs
from .build.generations import Store, sweep_removed
from .build.lock import encode as encode_lock
from .build.secrets import Material, ensure, password_hashes, substitutions
from .build.seeds import account_seeds, client_seeds, seeds
from .errors import ExerciseError, ServiceError
from .kernel import userns
from .records.closure import Closure, Gap
from .records.exercise import ExerciseResult
from .records.generation import Generation
from .records.lock import Lock
from .records.report import BuildReport, ExerciseLine, NewSecret, Round
from .records.spec import Spec
from .records.text import portable
from .records.trace import Trace
from .resolve.capabilities import CANDIDATES, candidates
from .trial import Trial, try_inside

__all__ = ["build", "build_from_lock"]

MOST_ROUNDS = 10
Progress = Callable[[str], None]


class _Missing(Exception):
    """A trial run showed gaps: the generation is not good enough yet."""

    def __init__(self, gaps: Sequence[Gap]) -> None:
        super().__init__(f"{len(gaps)} gaps")
        self.gaps = tuple(gaps)


class _Refused(Exception):
    """The service failed inside with the capabilities that the trace suggests, and nothing is missing."""


@dataclass
class _Work:
    """One build: what is known so far."""

    spec: Spec
    store: Store
    progress: Progress
    known_secrets: frozenset[str]
    materials: Mapping[str, Material]
    package_of: Callable[[str], tuple[str, str] | None]
    stages: dict[str, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    capabilities: tuple[str, ...] = ()
    results: tuple[ExerciseResult, ...] = ()

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


def build(
    spec: Spec, *, observe: bool = True, verify: bool = True, progress: Progress | None = None
) -> BuildReport:
    """Observe the service of `spec`, resolve and build what it needs, verify it inside, make it current.

    Without `observe` only what the spec names and what that is linked with goes in; without `verify` the result
    is not tried. `progress` is told what is done now. Raises ServiceError and ExerciseError when the service works
    neither outside nor inside, other StockadeErrors as the stages do; the generation before stays as it was.
    """
    work = _begin(spec, progress)
    trace = _observed(work) if observe else None
    if trace is not None and spec.service.user == "root":
        work.capabilities = candidates(trace)
    with work.stage("resolve", "resolving what it needs"):
        closure = resolve.resolve(trace, spec)
    while True:
        try:
            generation = _attempt(work, closure, trace, verify=verify)
            break
        except _Refused:
            work.capabilities = CANDIDATES
        except _Missing as missing:
            work.gaps += missing.gaps
            work.rounds.append(Round(number=len(work.rounds) + 1, added=tuple(gap.path for gap in missing.gaps)))
            with work.stage("resolve", f"resolving {len(missing.gaps)} paths that were missing inside"):
                closure = resolve.resolve(trace, spec, gaps=work.gaps)
    return _report(work, generation, closure)


def build_from_lock(lock: Lock, spec: Spec, *, verify: bool = True, progress: Progress | None = None) -> BuildReport:
    """Make the jail that `lock` describes from this host's files, verify it, make it current.

    BuildError where a file of the host is not the one that was locked.
    """
    work = _begin(spec, progress)
    generation = from_lock(
        lock, spec, store=work.store, secrets=work.materials, package_of=work.package_of, progress=work.progress,
        finish=lambda path, made: _finish(work, path, made, None, None, verify=verify),
    )  # fmt: skip
    return _report(work, generation, Closure())


def _begin(spec: Spec, progress: Progress | None) -> _Work:
    tell = progress or (lambda text: None)
    tell(f"building `{spec.name}`")
    store = Store(spec.name)
    sweep_removed(store.ids)
    store.sweep()
    known = frozenset(os.listdir(store.secrets)) if store.secrets.is_dir() else frozenset[str]()
    materials = ensure(spec, store.secrets)
    packages = resolve.PackageIndex.load()
    return _Work(spec, store, tell, known, materials, packages.owner)


def _observed(work: _Work) -> Trace:
    """The trace of a run outside, in a view of the host."""
    spec = work.spec
    files = accounts.merged(spec, accounts.read(), password_hashes(spec, work.materials))
    identity = accounts.identity(spec, files)
    if os.geteuid() != 0 and userns.subordinate() is None:
        # An ordinary user without a range of ids cannot become anybody else.
        identity = msgspec.structs.replace(identity, uid=os.geteuid(), gid=os.getegid(), groups=())
    with work.stage("observe", f"observing `{spec.service.command[0]}` outside a jail"):
        seen = observe.outside(
            spec,
            seeds=[*account_seeds(files), *seeds(spec, work.materials, files)],
            client_seeds=client_seeds(spec, work.materials),
            substitutions=substitutions(spec, work.materials),
            identity=observe.Identity(identity.uid, identity.gid, identity.groups),
            progress=work.progress,
        )
    return seen.trace


def _attempt(work: _Work, closure: Closure, trace: Trace | None, *, verify: bool) -> Generation:
    """Build `closure` and try it. _Missing when the trial shows gaps and rounds are left."""
    with work.stage("build", f"building the root with {len(closure.entries)} entries"):
        return build_rootfs(
            closure, work.spec, store=work.store, secrets=work.materials, package_of=work.package_of,
            capabilities=work.capabilities, progress=work.progress,
            trace_json=msgspec.json.encode(portable(msgspec.to_builtins(trace))) if trace is not None else None,
            finish=lambda path, lock: _finish(work, path, lock, closure, trace, verify=verify),
        )  # fmt: skip


def _finish(
    work: _Work, path: Path, lock: Lock, closure: Closure | None, trace: Trace | None, *, verify: bool
) -> None:
    """Try the generation in `path`, then give it its launch plan."""
    if verify:
        with work.stage("verify", f"trying it inside, round {len(work.rounds) + 1}"):
            trial = _trial(work, path, lock)
        if trace is not None and closure is not None:
            gaps = resolve.gaps(trace, trial.trace, closure)
            if gaps and len(work.rounds) < MOST_ROUNDS:
                raise _Missing(gaps)
            work.rounds.append(Round(number=len(work.rounds) + 1, added=()))
        if work.spec.policy.capabilities == "auto" and lock.capabilities != CANDIDATES and not trial.passed:
            raise _Refused
        _accept(trial)
        work.results = trial.exercises
        if work.spec.policy.capabilities == "auto":
            with work.stage("capabilities", "finding the capabilities that it can do without"):
                lock = _least(work, path, lock)
    contain.install(work.spec, lock, generation=path)


def _trial(work: _Work, path: Path, lock: Lock) -> Trial:
    return try_inside(
        work.spec, lock, path, store=work.store, client_seeds=client_seeds(work.spec, work.materials),
        substitutions=substitutions(work.spec, work.materials), progress=work.progress,
    )  # fmt: skip


def _least(work: _Work, path: Path, lock: Lock) -> Lock:
    """The lock with only the capabilities without which an exercise fails. Each is left out once."""
    for name in lock.capabilities:
        work.progress(f"trying it without the capability `{name}`")
        less = msgspec.structs.replace(lock, capabilities=tuple(other for other in lock.capabilities if other != name))
        if _trial(work, path, less).passed:
            lock = less
    (path / "lock.json").write_bytes(encode_lock(lock))
    return lock


def _accept(trial: Trial) -> None:
    """ServiceError or ExerciseError unless everything worked inside."""
    if trial.failure is not None:
        raise ServiceError(
            f"the service works outside, not in its jail: {trial.failure.message}",
            hint=trial.failure.hint, log=trial.log,
        )  # fmt: skip
    for result in trial.exercises:
        if not result.passed:
            said = (result.stderr.strip() or result.stdout.strip()).splitlines()
            raise ExerciseError(
                f"exercise `{result.name}` works outside, not in the jail: {result.reason}",
                hint=f"it said: {said[-1]}" if said else "`-v` shows the service's log", log=trial.log,
            )  # fmt: skip


def _report(work: _Work, generation: Generation, closure: Closure) -> BuildReport:
    files = [entry for entry in generation.lock.entries if entry.type == "file"]
    work.store.prune()
    return BuildReport(
        name=work.spec.name,
        generation=generation.number,
        files=len(files),
        bytes=sum(entry.size for entry in files),
        rounds=tuple(work.rounds),
        exercises=tuple(
            ExerciseLine(name=result.name, passed=result.passed, seconds=result.seconds) for result in work.results
        ),
        stages=work.stages,
        advice=closure.advice,
        new_secrets=tuple(
            NewSecret(
                name=name,
                kind=material.secret.kind,
                value=material.value.decode("utf-8", "replace").rstrip("\n") if _shown(material) else "",
                kept=str(work.store.secrets / name / "value"),
            )
            for name, material in sorted(work.materials.items())
            if name not in work.known_secrets
        ),
    )


def _shown(material: Material) -> bool:
    """Whether a person can use the value itself; keys and certificates are files."""
    return material.secret.kind in ("password", "random")
