"""Try the ways out of a machine: as its service, as root in it, and in the place of its own process on the host."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from stockade import machines
from stockade.assure import peers
from stockade.assure.canaries import canaries
from stockade.assure.prove import Work, compose
from stockade.assure.walls import Beyond, Change, workplace
from stockade.errors import HostError
from stockade.records.guest import Guest, NetworkMode
from stockade.records.launch import LaunchPlan
from stockade.records.lock import Lock
from stockade.records.policy import NotLimited
from stockade.records.proof import Machine, Place, ProbeRun, Proof, Skipped
from stockade.records.spec import Spec, Syscalls
from stockade.vm import jails, kernels, manage, store, walls
from stockade.vm.ids import JAIL

from .bench import Bench, bench
from .inside import Inside

__all__ = ["prove"]

Progress = Callable[[str], None]

_MODES: tuple[NetworkMode, ...] = ("none", "publish", "nat")
_MEMORY = 128 << 20
_NO_DISK_LIMIT = NotLimited(
    limit="size of the directory of the machine's process",
    reason="its disk and its sockets lie on the host's file system, which limits no directory",
)


def prove(
    name: str, around: Sequence[str], *, against: Sequence[str] = (), networks: Sequence[NetworkMode] = _MODES,
    places: Sequence[Place] = ("service", "guest", "machine"), changes: Mapping[Place, Change] | None = None,
    only: Collection[str] = (), progress: Progress | None = None,
) -> Proof:  # fmt: skip
    """Everything that the probes show about the jail `name` as a machine behind the walls `around`.

    A throw-away machine of the jail's image is started in each of `networks`, and tried from each of `places`: as the
    service's user (and, where the walls end in a jail, as that jail's root) through the launch that the service has
    in there; as the machine's root; and in the jail around UML, in the place of UML's process. `changes` alter the
    plans of the service's jail and of UML's: how it is shown that a probe reports a wall that is not there. `only`:
    ids of probes in the machine that are tried, () for all. Errors as a build, an image and a guest have them;
    UsageError for walls that no guest can have.
    """
    manage.check_walls(around)
    tell = progress or (lambda text: None)
    compared = [peers.named(peer) for peer in against]
    machines.prepare(around, progress=tell)
    return _Proof(name, tuple(around), networks, places, changes or {}, only, tell).make(compared)


class _Proof:
    """One proof in the making."""

    def __init__(
        self, name: str, around: tuple[str, ...], networks: Sequence[NetworkMode], places: Sequence[Place],
        changes: Mapping[Place, Change], only: Collection[str], tell: Progress,
    ) -> None:  # fmt: skip
        self.name = name
        self.around = around
        self.networks = networks
        self.places = places
        self.changes = changes
        self.only = only
        self.tell = tell
        self.skipped: list[Skipped] = []
        self.not_limited: tuple[NotLimited, ...] = ()
        self.kernel = kernels.find()

    def make(self, compared: Sequence[peers.Peer]) -> Proof:
        """All runs."""
        with workplace(self.name, alone=True) as jail:
            number = jail.generation.number
            others: tuple[ProbeRun, ...] = ()
            if compared:
                work = Work(jail, self.tell)
                with canaries(jail.path) as made:
                    others = work.others(compared, made)
                self.skipped += work.skipped
            spec, lock, generation = jail.spec, jail.generation.lock, jail.generation.path
            self.tell("making an image with the probes in it")
            with bench(self.name, self.around, memory=_MEMORY) as place:
                runs = [*self._inside(place, spec, lock, generation)]
                if "machine" in self.places:
                    runs += self._outer(place.guest)
        return compose(
            self.name, number, runs, peers=others, skipped=self.skipped, not_limited=self.not_limited,
            machine=self._machine(),
        )  # fmt: skip

    def _inside(self, place: Bench, spec: Spec, lock: Lock, generation: Path) -> Iterator[ProbeRun]:
        if not {"service", "guest"} & {*self.places}:
            return
        inner = jails.inner_plan(spec, lock, generation)
        walled = len(self.around) > 1 and self.around[-1] == "jail"
        plan = inner if walled else jails.bare_plan(spec, lock, inner)
        own: NetworkMode = "nat" if spec.network.egress else "publish" if spec.network.publish else "none"
        first = own if own in self.networks else next(iter(self.networks), own)
        with tempfile.TemporaryDirectory(prefix="stockade-prove-") as scratch, canaries(Path(scratch)) as made:
            for mode in (first, *(mode for mode in self.networks if mode != first)):
                self.tell(f"starting the machine in the network `{mode}`")
                try:
                    with place.booted(mode, made):
                        inside = Inside(
                            place, made, walls=",".join(self.around), network=mode, tell=self.tell, only=self.only
                        )
                        yield from self._places(inside, spec, plan, walled=walled, whole=mode == first)
                except HostError as error:
                    self.skipped.append(Skipped(what=f"network `{mode}`", reason=error.message))

    def _places(self, inside: Inside, spec: Spec, plan: LaunchPlan, *, walled: bool, whole: bool) -> Iterator[ProbeRun]:
        """All places in one kind of network, or, where it is not the `whole`, what depends on that."""
        if not whole:
            if "guest" in self.places:
                yield inside.root(networked=True)
            return
        if "service" in self.places:
            change = self.changes.get("service")
            yield from inside.service(change(plan) if change else plan, spec.service.user, walled=walled)
        if "guest" in self.places:
            yield inside.root()

    def _outer(self, guest: Guest) -> tuple[ProbeRun, ...]:
        """The whole catalogue in the jail around UML, with what this guest's has of its own."""
        if self.around[0] != "jail":
            self.skipped.append(
                Skipped(
                    what="the place of the machine's process",
                    reason="no jail stands around it: who takes it over is an ordinary user of the host",
                )
            )
            return ()
        spec = walls.specification(self.kernel, memory=guest.memory)
        # The probes' interpreter makes more calls than UML. It is let make them, so these walls are the weaker ones.
        policy = msgspec.structs.replace(spec.policy, syscalls=Syscalls(preset="default"))
        spec = msgspec.structs.replace(spec, policy=policy)
        more = Beyond(ids=walls.ids_of(guest), mounts=walls.directories(store.machine(guest.name)), ptrace=True)
        with workplace(JAIL, spec=spec, more=more) as place:
            work = Work(
                place, self.tell, change=self.changes.get("machine"), networks=("none",), walls=",".join(self.around),
                where="machine",
            )  # fmt: skip
            with canaries(place.path) as made:
                runs = work.runs(made)
        self.skipped += work.skipped
        self.not_limited = (*work.not_limited, _NO_DISK_LIMIT)
        return runs

    def _machine(self) -> Machine:
        jail, lock = "", ""
        if self.around[0] == "jail":
            generation, _ = walls.jail_of(self.kernel)
            jail, lock = JAIL, hashlib.sha256((generation / "lock.json").read_bytes()).hexdigest()
        return Machine(
            walls=self.around, kernel=self.kernel.path, version=self.kernel.version,
            sha256=hashlib.sha256(Path(self.kernel.path).read_bytes()).hexdigest(), jail=jail, lock=lock,
        )  # fmt: skip
