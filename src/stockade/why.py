"""Why was it blocked? Run behind the walls, see what they refuse, run again with what would allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from .build.generations import Store
from .build.secrets import ensure, substitutions
from .build.seeds import client_seeds
from .contain.identity import account
from .errors import NotFoundError, StateError
from .policy import changes
from .policy.blocked import Blocked, Key, blocked
from .records.generation import Generation
from .records.lock import Lock, LockDirectory
from .records.policy import size_bytes
from .records.proposal import Refusal
from .records.report import WhyReport
from .records.spec import Directory, Ready, Spec
from .records.text import escape, unescape
from .records.trace import Trace
from .trial import TRIED, Trial, try_inside

__all__ = ["Diagnosis", "described", "diagnose", "explained", "why"]

MOST_RUNS = 5
_OUTPUT = 4000
Progress = Callable[[str], None]
Run = Callable[[Spec, Lock], Trial]


@dataclass
class Diagnosis:
    """What was refused over all runs, in the order found. `works`: in the first run; `cured`: in the last one."""

    spec: Spec
    loosened: Spec
    works: bool
    cured: bool
    runs: int = 1
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def toml(self) -> str:
        """All lines that help, under their tables."""
        return changes.toml(changes.lines(self.spec, self.loosened))

    @property
    def advice(self) -> str:
        """What to put into the spec; "" for nothing."""
        effect = "it works with this in the spec" if self.cured else "put this into the spec to allow it"
        if not self.cured and self.runs > 1 and all(one.confirmed for one in self.refusals if one.lines):
            effect = "this in the spec allows what was refused, and it failed all the same"
        return f"{effect}:\n{self.toml}" if self.toml else ""


def works(trial: Trial) -> bool:
    """Whether the service or command did what it should, a command by its status."""
    return trial.passed and not trial.status


def diagnose(
    first: Trial, spec: Spec, lock: Lock, rootfs: Path, *, run: Run, outside: Trace | None = None,
    good: Callable[[Trial], bool] = works,
) -> Diagnosis:  # fmt: skip
    """Why the run `first` of the jail in `rootfs` met refusals, and whether the lines that lift them do.

    `run` tries it with another spec and lock. What was refused is allowed, all at once, and tried again until nothing
    new is refused: a program goes on to the next thing that it may not do.
    """
    found: dict[Key, Blocked] = {}
    known = lock
    tried, trial, runs = spec, first, 1
    while True:
        now = {one.key: one for one in blocked(trial.trace, tried, known, outside=outside)}
        new = {key: one for key, one in now.items() if key not in found}
        found |= new
        wanted = [one.change for one in new.values() if one.change is not None and one.tried]
        if not wanted or runs == MOST_RUNS:
            break
        for change in wanted:
            tried = change(tried)
        known = _as_told(lock, tried, rootfs)
        trial, runs = run(tried, known), runs + 1
    result = Diagnosis(spec, spec, good(first), good(trial), runs)
    # What is refused for another reason by now is refused for good.
    found |= {key: one for key, one in now.items() if one.change is None}
    for key, one in found.items():
        if one.change is not None and _in_vain(one, found.values()):
            continue
        refusal = _judged(one, still=key in now, spec=spec, ran=runs > 1)
        result.refusals.append(refusal)
        if one.change is not None and refusal.lines:
            result.loosened = one.change(result.loosened)
    return result


def _in_vain(one: Blocked, found: Iterable[Blocked]) -> bool:
    """Whether what one wall would let pass is refused by another, for which the spec has no line."""
    return any(other.change is None and other.refusal.what == one.refusal.what for other in found)


def _judged(one: Blocked, *, still: bool, spec: Spec, ran: bool) -> Refusal:
    """The refusal with lines in terms of the spec as it is, and whether a run has shown that they help."""
    if one.change is None:
        return one.refusal
    lines = changes.lines(spec, one.change(spec))
    if not one.tried or not ran:
        return msgspec.structs.replace(one.refusal, lines=lines)
    if still:
        given = ", ".join(f"`{line.line}`" for line in lines)
        tried = f"{given} was tried, and is not enough" if one.limit else "it was tried, and stays refused"
        return msgspec.structs.replace(
            one.refusal, lines=(), confirmed=False, reason=f"{one.refusal.reason}; {tried}"
        )  # fmt: skip
    return msgspec.structs.replace(one.refusal, lines=lines, confirmed=True)


def _as_told(lock: Lock, spec: Spec, rootfs: Path) -> Lock:
    """The lock with what `spec` says of /proc, volumes' sizes, and directories that the build does not know yet."""
    known = {unescape(found.path) for found in lock.directories}
    made = [_sized(found, spec.directories.get(found.path)) for found in lock.directories]
    for number, (path, wanted) in enumerate(spec.directories.items()):
        if unescape(path) not in known:
            who = account(rootfs, wanted.owner)
            volume = f"{TRIED}{number}" if wanted.kind == "volume" else ""
            made.append(LockDirectory(path=path, mode=int(wanted.mode, 8), uid=who.uid, gid=who.gid, volume=volume))
    proc = lock.proc if spec.policy.proc == "auto" else spec.policy.proc
    return msgspec.structs.replace(lock, directories=tuple(made), proc=proc)


def _sized(found: LockDirectory, wanted: Directory | None) -> LockDirectory:
    if wanted is None or not found.volume or not wanted.size:
        return found
    return msgspec.structs.replace(found, size=size_bytes(wanted.size), inodes=wanted.inodes or 0)


def explained(diagnosis: Diagnosis) -> str:
    """A line for each thing that was refused, with the reason; "" when no wall refused anything."""
    return "\n".join(f"refused: {described(refusal)}" for refusal in diagnosis.refusals)


def described(refusal: Refusal) -> str:
    """What was refused, how often, how it looked to the program, and why."""
    times = f", {refusal.count} times" if refusal.count > 1 else ""
    never = "; no policy can allow it" if refusal.never else ""
    return f"{refusal.what} ({refusal.error}{times}): {refusal.reason}{never}"


def why(name: str, command: Sequence[str] = (), *, progress: Progress | None = None) -> WhyReport:
    """What the walls of the jail `name` refuse its service in its exercises, or `command` in the service's place.

    It runs beside the jail, with a network and volumes of its own, which vanish. NotFoundError where nothing was
    built, StateError while the jail is being built or where it has no filter and rights to tell of (plain chroot).
    """
    store = Store(name)
    generation = store.current() if store.exists() else None
    if generation is None:
        raise NotFoundError(f"jail `{name}` has not been built", hint=f"`stockade build {name}` builds it")
    spec = _spec(generation)
    if spec.walls == ("chroot",):
        raise StateError(
            f"jail `{name}` is a plain chroot: it refuses nothing but what lies outside of it",
            hint='`walls = ["jail"]` has walls to ask about',
        )
    if command:
        service = msgspec.structs.replace(spec.service, command=tuple(command), ready=Ready(), forks=False)
        network = msgspec.structs.replace(spec.network, listen=())  # they are the service's
        spec = msgspec.structs.replace(spec, service=service, network=network, exercises=())
    materials = ensure(spec, store.secrets)
    with store.hold(generation.number), store.new() as aside:

        def run(wanted: Spec, lock: Lock) -> Trial:
            return try_inside(
                wanted, lock, generation.path, store=store, client_seeds=client_seeds(spec, materials),
                substitutions=substitutions(spec, materials), progress=progress, scratch=aside.path,
            )  # fmt: skip

        first = run(spec, generation.lock)
        diagnosis = diagnose(first, spec, generation.lock, generation.rootfs, run=run)
    return WhyReport(
        name=name,
        command=tuple(escape(word) for word in spec.service.command),
        works=diagnosis.works,
        works_with_lines=diagnosis.cured,
        runs=diagnosis.runs,
        refusals=tuple(diagnosis.refusals),
        toml=diagnosis.toml,
        output="" if diagnosis.works else escape(first.log[-_OUTPUT:]),
    )


def _spec(generation: Generation) -> Spec:
    return msgspec.json.decode((generation.path / "spec.json").read_bytes(), type=Spec)
