"""Join the stages: from a spec to a verified jail. What a stage does is the stage's own affair."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from . import contain, places, resolve
from .build import accounts
from .build.generations import Store
from .build.leftovers import attempt, sweep
from .build.lock import encode as encode_lock
from .build.making import build as build_rootfs
from .build.making import from_lock, require_ids
from .build.secrets import Material, ensure, password_hashes, substitutions
from .build.seeds import account_seeds, client_seeds, seeds
from .contain.compile import PATH
from .contain.identity import Account
from .errors import HostError, ServiceError
from .kernel import userns
from .records.buildreport import BuildReport, ExerciseLine, NewSecret, Round
from .records.closure import Advice, Closure, Gap
from .records.generation import EXERCISES, PROPOSAL, Generation
from .records.lock import Lock
from .records.proposal import Proposal
from .records.spec import Spec, must_stay
from .records.text import portable
from .resolve.capabilities import CANDIDATES, candidates
from .resolve.rules import rules

if TYPE_CHECKING:
    from .narrowing import Wanted
    from .records.exercise import ExerciseResult
    from .records.trace import Trace
    from .trial import Trial

__all__ = ["build", "build_from_lock"]

MOST_ROUNDS = 10
Progress = Callable[[str], None]


class _Missing(Exception):
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


class _Refused(Exception):
    """The service failed inside, or crashed at its end, with the capabilities that the trace suggests."""


class _Work(msgspec.Struct):
    """One build: what is known so far. `status` is that with which a command that ends did so outside."""

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


def build(spec: Spec, *, observe: bool = True, verify: bool = True, progress: Progress | None = None) -> BuildReport:
    """Observe the service of `spec`, resolve and build what it needs, verify it inside, make it current.

    Without `observe` only what the spec names and what that is linked with goes in; without `verify` the result
    is not tried. `progress` is told what is done now. Raises ServiceError and ExerciseError when the service works
    neither outside nor inside, other StockadeErrors as the stages do; the generation before stays as it was.
    """
    with attempt(Store(spec.name)):
        return _build(spec, observe=observe, verify=verify, progress=progress)


def _build(spec: Spec, *, observe: bool, verify: bool, progress: Progress | None) -> BuildReport:
    work = _begin(spec, progress)
    trace = _observed(work) if observe else None
    if trace is not None and work.searches:
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
            work.users += missing.users
            work.groups += missing.groups
            if missing.paths:
                work.rounds.append(Round(number=len(work.rounds) + 1, added=missing.paths))
            with work.stage("resolve", "resolving what was missing inside, or in the way"):
                closure = _with_accounts(work, resolve.resolve(trace, spec, gaps=work.gaps))
    return _report(work, generation, (*closure.advice, *_status_advice(work, trace)))


def _with_accounts(work: _Work, closure: Closure) -> Closure:
    """The closure with the accounts that trials missed, and a note on each."""
    text = "is kept of the host's accounts: without it the service failed, and named it"
    named = [*(("user", user.name) for user in work.users), *(("group", group.name) for group in work.groups)]
    notes = [Advice(code="account", path=name, message=f"this {kind} {text}") for kind, name in named]
    return msgspec.structs.replace(
        closure,
        uids=tuple(sorted({*closure.uids, *(user.uid for user in work.users)})),
        gids=tuple(sorted({*closure.gids, *(group.gid for group in work.groups)})),
        advice=(*closure.advice, *notes),
    )


def build_from_lock(lock: Lock, spec: Spec, *, verify: bool = True, progress: Progress | None = None) -> BuildReport:
    """Make the jail that `lock` describes from this host's files, verify it, make it current.

    BuildError where a file of the host is not the one that was locked.
    """
    with attempt(Store(spec.name)):
        work = _begin(spec, progress)
        with work.stage("build", f"building the root with {len(lock.entries)} entries"):
            generation = from_lock(
                lock, spec, store=work.store, secrets=work.materials, package_of=work.package_of,
                progress=work.progress, finish=lambda path, made: _finish(work, path, made, None, None, verify=verify),
            )  # fmt: skip
        return _report(work, generation)


def _begin(spec: Spec, progress: Progress | None) -> _Work:
    start = time.monotonic()
    tell = progress or (lambda text: None)
    tell(f"building `{spec.name}`")
    store = Store(spec.name)
    _require_executable(store.directory)
    sweep()
    contain.alive()  # it sweeps what killed trials left at run time
    shown = _shown_secrets(store)
    materials = ensure(spec, store.secrets)
    packages = resolve.PackageIndex.load(cache=places.state() / "packages")
    stages = {"prepare": time.monotonic() - start}
    return _Work(spec, store, tell, shown, materials, packages.owner, stages, ends=not must_stay(spec))


def _require_executable(directory: Path) -> None:
    """HostError where nothing on the file system of `directory` may be executed, as a jail's programs are."""
    if os.statvfs(directory).f_flag & os.ST_NOEXEC:
        raise HostError(
            f"`{directory}` lies on a mount with the option `noexec`, and a jail's programs are executed from there",
            hint="set `STOCKADE_HOME` to a directory on another file system, or remount that one with `exec`",
        )


def _shown_secrets(store: Store) -> frozenset[str]:
    """Names of the secrets that builds which ended well have shown. A damaged generation does not hinder a new one."""
    shown: set[str] = set()
    for number in store.generations():
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            shown |= msgspec.json.decode((store.place(number) / "spec.json").read_bytes(), type=Spec).secrets.keys()
    return frozenset(shown)


def _observed(work: _Work) -> Trace:
    """The trace of a run outside, in a view of the host."""
    from . import observe

    spec = work.spec
    resolve.require_command(spec)
    host = accounts.read()
    files = accounts.merged(spec, host, password_hashes(spec, work.materials))
    identity = accounts.identity(spec, files)
    require_ids(identity, work.store)
    with (
        _ordinary_hint(work.store, outside=True),
        work.stage("observe", f"observing `{spec.service.command[0]}` outside a jail"),
    ):
        seen = observe.outside(
            spec,
            seeds=[*account_seeds(files), *seeds(spec, work.materials, files)],
            client_seeds=client_seeds(spec, work.materials),
            substitutions=substitutions(spec, work.materials),
            identity=observe.Identity(identity.uid, identity.gid, identity.groups),
            environment=_environment(spec, host, identity.uid),
            progress=work.progress,
        )
    work.ends = seen.status is not None and not spec.service.forks
    work.status = seen.status if work.ends else None
    return seen.trace


def _environment(spec: Spec, host: accounts.HostAccounts, uid: int) -> dict[str, str]:
    """What the service will find in its environment inside. A person's home on this host is none of its business."""
    homes = {user.home for user in host.users if not rules().in_home.covers(f"{user.home}/x")}
    users = accounts.sanitised(spec, host, uids=(uid,), gids=(), password_hashes={}, paths=homes).users
    name = spec.service.user
    user = next((user for user in users if name in (user.name, str(user.uid))), None)
    account = Account(uid=uid, gid=0) if user is None else Account(
        uid=uid, gid=user.gid, name=user.name, home=user.home, shell=user.shell
    )  # fmt: skip
    return {"PATH": PATH, **account.variables(), **spec.service.environment}


@contextmanager
def _ordinary_hint(store: Store, *, outside: bool) -> Iterator[None]:
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


def _attempt(work: _Work, closure: Closure, trace: Trace | None, *, verify: bool) -> Generation:
    """Build `closure` and try it. _Missing when the trial shows gaps and rounds are left."""
    with work.stage("build", f"building the root with {len(closure.entries)} entries"):
        return build_rootfs(
            closure, work.spec, store=work.store, secrets=work.materials, package_of=work.package_of,
            capabilities=work.capabilities, progress=work.progress,
            trace_json=msgspec.json.encode(portable(msgspec.to_builtins(trace))) if trace is not None else None,
            finish=lambda path, lock: _finish(work, path, lock, closure, trace, verify=verify),
        )  # fmt: skip


def _finish(work: _Work, path: Path, lock: Lock, closure: Closure | None, trace: Trace | None, *, verify: bool) -> None:
    """Try the generation in `path`, then give it its launch plan."""
    if verify:
        lock = _verified(work, path, lock, closure, trace)
    contain.install(work.spec, lock, generation=path)


def _verified(work: _Work, path: Path, lock: Lock, closure: Closure | None, trace: Trace | None) -> Lock:
    """The lock with the least capabilities, after a trial that showed no gap and in which everything passed."""
    from . import narrowing

    with work.stage("verify", f"trying it inside, round {len(work.rounds) + 1}"):
        trial = _trial(work, path, lock)
    if trace is not None and closure is not None:
        gaps = resolve.gaps(trace, trial.trace, closure)
        if gaps and len(work.rounds) < MOST_ROUNDS:
            raise _Missing(gaps)
    wanted = narrowing.Wanted(work.status)
    if not wanted(trial):
        users, groups = accounts.missed(
            "\n".join((trial.log, *(result.stdout + result.stderr for result in trial.exercises))),
            trial.trace, accounts.read(), accounts.read(path / "rootfs"),
        )  # fmt: skip
        obstacles = resolve.obstacles(trace, trial.trace, closure) if trace is not None and closure is not None else ()
        if closure is not None and (obstacles or users or groups) and len(work.rounds) < MOST_ROUNDS:
            raise _Missing(obstacles, users, groups)
        if work.searches and lock.capabilities != CANDIDATES:
            raise _Refused
        with _ordinary_hint(work.store, outside=False):
            raise _failure(work, path, lock, trial, trace, wanted)
    if trial.crashed and work.searches and lock.capabilities != CANDIDATES:
        raise _Refused
    if trace is not None:
        work.rounds.append(Round(number=len(work.rounds) + 1, added=()))
    work.results = trial.exercises
    passed = [result.name for result in trial.exercises]
    (path / EXERCISES).write_bytes(msgspec.json.encode(passed))
    return _narrow(work, path, lock, trial, trace, wanted)


def _trial(work: _Work, path: Path, lock: Lock, spec: Spec | None = None) -> Trial:
    from .trial import try_inside

    return try_inside(
        spec or work.spec, lock, path, store=work.store, client_seeds=client_seeds(work.spec, work.materials),
        substitutions=substitutions(work.spec, work.materials), progress=work.progress,
    )  # fmt: skip


def _failure(work: _Work, path: Path, lock: Lock, trial: Trial, trace: Trace | None, wanted: Wanted) -> ServiceError:
    """What failed in `trial`, with what the walls refused and the lines that allow it."""
    from . import narrowing

    with work.stage("why", "finding out what was refused"):
        diagnosis = narrowing.reasons(
            trial, work.spec, lock, path / "rootfs", run=lambda spec, given: _trial(work, path, given, spec),
            good=wanted, outside=trace, searched=CANDIDATES if work.searches else (), progress=work.progress,
        )  # fmt: skip
    return narrowing.failure(trial, wanted, diagnosis, observed=trace is not None)


def _narrow(work: _Work, path: Path, lock: Lock, trial: Trial, trace: Trace | None, wanted: Wanted) -> Lock:
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


def _status_advice(work: _Work, trace: Trace | None) -> Iterator[Advice]:
    """That the command failed by its status, in its jail as outside: that may be how it should be, or not."""
    if trace is None or not work.status:
        return
    from .observe import cures

    text = f"ended with status {work.status} outside a jail, which counts as success"
    message = "; ".join((text, *cures(trace, work.spec)))
    yield Advice(code="status", path=work.spec.service.command[0], message=message)


def _report(work: _Work, generation: Generation, advice: tuple[Advice, ...] = ()) -> BuildReport:
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
        advice=advice,
        new_secrets=tuple(
            NewSecret(
                name=name,
                kind=material.secret.kind,
                value=material.value.decode("utf-8", "replace").rstrip("\n") if _shown(material) else "",
                kept=str(work.store.secrets / name / "value"),
            )
            for name, material in sorted(work.materials.items())
            if name not in work.shown_secrets
        ),
        ends=work.ends,
        proposal=work.proposal,
    )


def _shown(material: Material) -> bool:
    """Whether a person can use the value itself; keys and certificates are files."""
    return material.secret.kind in ("password", "random")
