"""Try every documented way out of a jail, from inside, through its own launch; judge from outside."""

from __future__ import annotations

import datetime
import os
import platform
import pwd
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from stockade import contain
from stockade.contain.limiting import not_limited
from stockade.errors import SpecError, StockadeError, WallError
from stockade.records.finding import Finding
from stockade.records.launch import Filesystem, LaunchPlan
from stockade.records.policy import NotLimited, size_bytes
from stockade.records.proof import Machine, Place, ProbeResult, ProbeRun, Proof, Skipped
from stockade.records.spec import Limits, Network

from . import peers, probetree, request, truth
from .canaries import Canaries, canaries
from .catalogue import LIMITS, OUTSIDE, catalogue
from .judge import Control, Outside, judge
from .planted import planted
from .processes import host_uid, observed
from .session import conduct, dirty, messages, terminal
from .walls import PLACE, Change, Workplace, launched, planned, workplace

__all__ = ["MODES", "Mode", "Progress", "Work", "compose", "prove"]

Mode = Literal["none", "private", "host"]

MODES: tuple[Mode, ...] = ("none", "private", "host")

Progress = Callable[[str], None]

# Small enough to be filled in no time, large enough for the probes themselves.
_SMALL_TMPFS_BYTES, _SMALL_INODES = 8 << 20, 256
_SMALL_MEMORY, _SMALL_PROCESSES, _SMALL_FILES, _SMALL_CPUS = 128 << 20, 48, 128, 0.5

_PROBES = tuple(name for name in catalogue() if name not in (*LIMITS, *OUTSIDE))


def prove(
    name: str, *, networks: Sequence[Mode] = MODES, against: Sequence[str] = (), progress: Progress | None = None,
    change: Change | None = None, alone: bool = False,
) -> Proof:  # fmt: skip
    """Everything that the probes show about the current generation of the jail `name`.

    They run as the service's user and as the jail's root, in each of `networks`, and, for comparison, behind the
    programs named in `against`. `change` alters the compiled plan before each launch: how it is shown that a probe
    reports a wall that is not there. `alone`: the jail by itself, whatever walls its spec has. NotFoundError for an
    unknown name; StateError when nothing was built, and for walls with a machine among them; WallError when a launch
    fails.
    """
    tell = progress or (lambda text: None)
    compared = [peers.named(peer) for peer in against]
    with workplace(name, alone=alone) as place:
        work = Work(place, tell, change=change, networks=networks)
        with canaries(place.path) as made:
            runs = work.runs(made)
            others = work.others(compared, made)
        return compose(
            name, place.generation.number, runs, peers=others, skipped=work.skipped, not_limited=work.not_limited
        )


def compose(
    name: str, generation: int, runs: Sequence[ProbeRun], *, peers: Sequence[ProbeRun] = (),
    skipped: Sequence[Skipped] = (), not_limited: Sequence[NotLimited] = (), machine: Machine | None = None,
) -> Proof:  # fmt: skip
    """The proof of these runs, here and now."""
    system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    return Proof(
        name=name, generation=generation, system=system,
        kernel=f"{platform.release()} {platform.machine()}", user=_user(), runs=tuple(runs), peers=tuple(peers),
        skipped=tuple(skipped), time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        not_limited=tuple(not_limited), machine=machine,
    )  # fmt: skip


class Work:
    """The probes in one jail: in each of `networks`, with `change` made to each plan.

    `walls` and `where` are what its runs are called. `skipped` and `not_limited` fill as it goes.
    """

    def __init__(
        self, place: Workplace, tell: Progress, *, change: Change | None = None, networks: Sequence[Mode] = MODES,
        walls: str = "jail", where: Place = "jail",
    ) -> None:  # fmt: skip
        self.place = place
        self.tell = tell
        self.change = change or (lambda plan: plan)
        self.networks = networks
        self.walls = walls
        self.where: Place = where
        self.control: Control | None = None
        self.skipped: list[Skipped] = []
        self.not_limited: tuple[NotLimited, ...] = ()
        self.outside: tuple[ProbeResult, ...] = ()
        tell("making the probes' tree")
        self.tree = probetree.make(place.path / "tree", place.ids)

    def runs(self, made: Canaries) -> tuple[ProbeRun, ...]:
        """All runs in the jail."""
        self.tell("trying the probes where no wall stands")
        self.control = peers.control(self.place.generation.rootfs, self.tree, made)
        self.tell("planting a symlink where the launcher looks")
        self.outside = (planted(self.place, made),)
        return tuple(self._runs(made, self.control))

    def others(self, compared: Sequence[peers.Peer], made: Canaries) -> tuple[ProbeRun, ...]:
        """The same probes behind other programs."""
        return tuple(self._peers(compared, made, self.control))

    def _runs(self, made: Canaries, control: Control | None) -> Iterator[ProbeRun]:
        spec = self.place.spec
        own = msgspec.structs.replace(spec.network, publish=())
        for mode in self.networks:
            network = own if mode == own.mode else Network(mode=mode)
            try:
                plan = self.place.plan(msgspec.structs.replace(spec, network=network))
            except SpecError as error:
                self.skipped.append(Skipped(what=f"network `{mode}`", reason=error.message))
                continue
            for user, variant in self._users(plan):
                self.tell(f"trying the probes as `{user}` in the network `{mode}`")
                yield self._run(variant, made, control, user=user, network=mode, names=_PROBES)
        self.tell("trying the limits")
        yield self._limits(made, own)

    def _users(self, plan: LaunchPlan) -> Iterator[tuple[str, LaunchPlan]]:
        yield self.place.spec.service.user, plan
        if plan.uid == 0 or plan.chroot:
            return
        if plan.ids.kind == "single":
            self._skip("root inside", "the jail has one id, the service's: nobody is root inside")
            return
        yield "root", msgspec.structs.replace(plan, uid=0, gid=0, groups=(), directory="/")

    def _skip(self, what: str, reason: str) -> None:
        skipped = Skipped(what=what, reason=reason)
        if skipped not in self.skipped:
            self.skipped.append(skipped)

    def _limits(self, made: Canaries, network: Network) -> ProbeRun:
        """The same limits, made small: what is tried is how they are unkept, and nothing is used up."""
        spec = msgspec.structs.replace(self.place.spec, network=network, limits=_small(self.place.spec.limits))
        small = self.place.small()
        plan = small.plan(spec)
        plan = msgspec.structs.replace(plan, mounts=tuple(_small_tmpfs(step) for step in plan.mounts))
        missing = plan.cgroup.not_limited if plan.cgroup is not None else ()
        unkept = {one.limit for one in missing}
        limits = spec.limits
        # Where no control group counts them, setrlimit(2) does.
        counted = "processes" not in unkept or any(limit.name == "nproc" for limit in plan.limits)
        self.not_limited = (
            *(one for one in missing if one.limit != "processes" or not counted),
            *not_limited(small.generation.lock, plan.ids),
        )
        told = {
            "processes": limits.processes if counted else None,
            "memory": size_bytes(limits.memory) if limits.memory and "memory" not in unkept else None,
            "open_files": limits.open_files,
            "cpus": limits.cpus if "cpus" not in unkept else None,
        }
        return self._run(plan, made, None, user=spec.service.user, network=network.mode, names=LIMITS, limits=told)

    def _run(
        self, plan: LaunchPlan, made: Canaries, control: Control | None, *, user: str, network: str,
        names: tuple[str, ...], limits: dict[str, Any] | None = None,
    ) -> ProbeRun:  # fmt: skip
        plan = self.change(plan)
        request.write(
            self.tree, made, place=PLACE, probes=names, launchers=(contain.warden_path(),), limits=limits,
            **planned(plan),
        )  # fmt: skip
        start = time.monotonic()
        facts: list[Outside] = []
        found: list[Finding] = []
        with terminal() as screen, tempfile.TemporaryFile() as errors, dirty(made):
            with launched(self.place, plan, self.tree, stdin=screen.slave, stderr=errors.fileno()) as running:
                assert running.stdout is not None

                def at_ready(_: dict[str, Any]) -> None:
                    facts.append(observed(running.pid, network=network))
                    found.extend(truth.differences(plan, running.pid, extra=(PLACE,)))

                seen = conduct(
                    messages(running.stdout.fileno()), screen, at_ready=at_ready,
                    answer=lambda asked: host_uid(running.pid, asked["path"]),
                )  # fmt: skip
            if not facts:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise WallError(
                    f"the probes did not start in jail `{self.place.spec.name}`: {said[-1] if said else 'no message'}",
                    hint="`stockade run` shows whether anything does",
                )
        results = judge(seen, outside=facts[0], canaries=made, control=control, names=names)
        return ProbeRun(
            walls=self.walls, place=self.where, user=user, uid=facts[0].uid, network=network, differences=tuple(found),
            results=results if names is LIMITS else (*results, *self.outside), seconds=time.monotonic() - start,
        )  # fmt: skip

    def _peers(self, compared: Sequence[peers.Peer], made: Canaries, control: Control | None) -> Iterator[ProbeRun]:
        for peer in compared:
            why_not = peer.why_not()
            if why_not:
                self._skip(peer.name, why_not)
                continue
            self.tell(f"trying the probes behind `{peer.name}`")
            try:
                yield peers.run(peer, self.place.generation.rootfs, self.tree, made, control=control)[0]
            except StockadeError as error:
                self._skip(peer.name, error.message)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _small(limits: Limits) -> Limits:
    def least(value: Any, small: Any) -> Any:
        return None if value is None else min(value, small)

    memory = None if limits.memory is None else str(min(size_bytes(limits.memory), _SMALL_MEMORY))
    return msgspec.structs.replace(
        limits, memory=memory, processes=least(limits.processes, _SMALL_PROCESSES),
        open_files=least(limits.open_files, _SMALL_FILES), cpus=least(limits.cpus, _SMALL_CPUS),
    )  # fmt: skip


def _small_tmpfs(step: Any) -> Any:
    if not isinstance(step, Filesystem) or step.type != "tmpfs" or not step.writable or step.target == "/dev":
        return step
    small = {"size": str(_SMALL_TMPFS_BYTES), "nr_inodes": str(_SMALL_INODES)}
    options = []
    for option in step.options:
        key, _, value = option.partition("=")
        options.append(f"{key}={small[key]}" if key in small and value.isdecimal() else option)
    return msgspec.structs.replace(step, options=tuple(options))
