"""Join the stages: from a spec to a verified jail. What a stage does is the stage's own affair."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from . import contain, places, resolve
from .build import accounts
from .build.generations import Store
from .build.leftovers import attempt, sweep
from .build.making import build as build_rootfs
from .build.making import from_lock, require_ids
from .build.secrets import Material, ensure, password_hashes, substitutions
from .build.seeds import account_seeds, client_seeds, seeds
from .contain.compile import PATH
from .contain.identity import Account
from .contain.marker import refuse_too_many
from .errors import HostError
from .records.buildreport import BuildReport, ExerciseLine, NewSecret, Round
from .records.closure import Advice, Closure
from .records.generation import Generation
from .records.lock import Lock
from .records.spec import Spec, must_stay
from .records.text import portable
from .resolve.capabilities import CANDIDATES, candidates
from .resolve.rules import rules
from .rounds import Missing, Progress, Refused, Work, ordinary_hint, verified

if TYPE_CHECKING:
    from .records.trace import Trace

__all__ = ["build", "build_from_lock"]


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
        except Refused:
            work.capabilities = CANDIDATES
        except Missing as missing:
            work.gaps += missing.gaps
            work.users += missing.users
            work.groups += missing.groups
            if missing.paths:
                work.rounds.append(Round(number=len(work.rounds) + 1, added=missing.paths))
            with work.stage("resolve", "resolving what was missing inside, or in the way"):
                closure = _with_accounts(work, resolve.resolve(trace, spec, gaps=work.gaps))
    return _report(work, generation, (*closure.advice, *_status_advice(work, trace), *_stop_advice(work)))


def _with_accounts(work: Work, closure: Closure) -> Closure:
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


def _begin(spec: Spec, progress: Progress | None) -> Work:
    start = time.monotonic()
    tell = progress or (lambda text: None)
    tell(f"building `{spec.name}`")
    refuse_too_many(given=len(spec.network.listen), published=len(spec.network.publish))
    store = Store(spec.name)
    _require_executable(store.directory)
    sweep()
    contain.alive()  # it sweeps what killed trials left at run time
    shown = _shown_secrets(store)
    materials = ensure(spec, store.secrets)
    packages = resolve.PackageIndex.load(cache=places.state() / "packages")
    stages = {"prepare": time.monotonic() - start}
    return Work(spec, store, tell, shown, materials, packages.owner, stages, ends=not must_stay(spec))


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


def _observed(work: Work) -> Trace:
    """The trace of a run outside, in a view of the host."""
    from . import observe

    spec = work.spec
    resolve.require_command(spec)
    host = accounts.read()
    files = accounts.merged(spec, host, password_hashes(spec, work.materials))
    identity = accounts.identity(spec, files)
    require_ids(identity, work.store)
    with (
        ordinary_hint(work.store, outside=True),
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
    work.stopped = seen.stopped
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


def _attempt(work: Work, closure: Closure, trace: Trace | None, *, verify: bool) -> Generation:
    """Build `closure` and try it. Missing when the trial shows gaps and rounds are left."""
    with work.stage("build", f"building the root with {len(closure.entries)} entries"):
        return build_rootfs(
            closure, work.spec, store=work.store, secrets=work.materials, package_of=work.package_of,
            capabilities=work.capabilities, progress=work.progress,
            trace_json=msgspec.json.encode(portable(msgspec.to_builtins(trace))) if trace is not None else None,
            finish=lambda path, lock: _finish(work, path, lock, closure, trace, verify=verify),
        )  # fmt: skip


def _finish(work: Work, path: Path, lock: Lock, closure: Closure | None, trace: Trace | None, *, verify: bool) -> None:
    """Try the generation in `path`, then give it its launch plan."""
    if verify:
        lock = verified(work, path, lock, closure, trace)
    contain.install(work.spec, lock, generation=path)


def _status_advice(work: Work, trace: Trace | None) -> Iterator[Advice]:
    """That the command failed by its status, in its jail as outside: that may be how it should be, or not."""
    if trace is None or not work.status:
        return
    from .observe import cures

    text = f"ended with status {work.status} outside a jail, which counts as success"
    message = "; ".join((text, *cures(trace, work.spec)))
    yield Advice(code="status", path=work.spec.service.command[0], message=message)


def _stop_advice(work: Work) -> Iterator[Advice]:
    """That the service had to be killed, as it will be at each stop."""
    service = work.spec.service
    if work.stopped:
        return
    message = (
        f"still ran {service.stop_timeout_s:g} s after {service.stop_signal}, and had to be killed: name the signal "
        "that ends it, as its manual has it, often SIGINT or SIGQUIT: `stop_signal` in `[service]`; or give it more "
        "time: `stop_timeout_s`"
    )
    yield Advice(code="stop", path=service.command[0], message=message)


def _report(work: Work, generation: Generation, advice: tuple[Advice, ...] = ()) -> BuildReport:
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
