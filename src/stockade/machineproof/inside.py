"""The probes in a running machine: behind the jail in it, as its service, as its root. Judged from the host."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from stockade import contain
from stockade.assure import request, truth
from stockade.assure.canaries import Canaries
from stockade.assure.catalogue import LIMITS, OUTSIDE, catalogue, machine_catalogue
from stockade.assure.judge import Control, Outside, judge
from stockade.assure.probetree import REQUEST
from stockade.assure.request import NAMESPACES
from stockade.assure.session import Seen, conduct
from stockade.assure.walls import PLACE, planned, with_tree
from stockade.errors import WallError
from stockade.records.finding import Finding
from stockade.records.launch import LaunchPlan
from stockade.records.proof import Place, ProbeResult, ProbeRun
from stockade.vm import control, images

from .bench import INIT, PLAN, TREE, Bench, Input, messages

__all__ = ["Inside"]

#: The machine's network is its service's own: what may be reached through it is tried by G8 to G11.
_NETWORK = ("N1", "N4", "N5", "T4")
_WHY_NOT_NETWORK = "the machine's network is the service's own; G8 to G11 try the host's"
_WHY_NOT_LIMITS = "the machine's memory, processes and disk are the limit, and they are kept where its process is"
#: The machine's first disk (arch/um/drivers/ubd_kern.c).
_DISK = (98, 0)

#: A process costs ten times as much in a machine, and its host may have other things to do.
_TIME_LIMIT_S = 30.0

_IN_JAIL = tuple(name for name in catalogue() if name not in (*LIMITS, *OUTSIDE, *_NETWORK))
_OUT = tuple(machine_catalogue())
#: What depends on the machine's network.
_NETWORKED = ("G8", "G9", "G10", "G11")


class Inside:
    """A machine that runs, and the host's canaries. `only` these probes are tried, () for all."""

    def __init__(
        self, place: Bench, made: Canaries, *, walls: str, network: str, tell: Callable[[str], None],
        only: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.in_jail = tuple(name for name in _IN_JAIL if not only or name in only)
        self.out = tuple(name for name in _OUT if not only or name in only)
        self.bench = place
        self.made = made
        self.walls = walls
        self.network = network
        self.tell = tell

    def service(self, plan: LaunchPlan, user: str, *, walled: bool) -> Iterator[ProbeRun]:
        """As the service and, where a jail stands around it in the machine, as that jail's root."""
        if not walled:
            yield self._unwalled(plan, user)
            return
        variants = [(user, plan)]
        if plan.uid != 0:
            variants.append(("root", msgspec.structs.replace(plan, uid=0, gid=0, groups=(), directory="/")))
        with self.bench.canaries() as beside:
            self.tell("trying the probes in the machine where no jail stands")
            bare = self._control(beside)
            for who, variant in variants:
                self.tell(f"trying the probes as `{who}` in the jail in the machine")
                yield self._in_jail(variant, beside, bare, who)

    def _unwalled(self, plan: LaunchPlan, user: str) -> ProbeRun:
        """The probes against the host, in the place of a service that has the machine to itself."""
        self.tell(f"trying ways to the host as `{user}` in the network `{self.network}`")
        start = time.monotonic()
        self._request(self.made, place=TREE, probes=self.out, **planned(plan))
        seen, facts = self._launched(plan, TREE)
        return self._run(user, "service", self._out(seen, self.out), start, differences=self._differences(plan, facts))

    def root(self, *, networked: bool = False) -> ProbeRun:
        """The probes against the host, as the machine's root; `networked`: those that its network is for."""
        names = tuple(name for name in self.out if not networked or name in _NETWORKED)
        self.tell(f"trying ways to the host as the machine's root in the network `{self.network}`")
        start = time.monotonic()
        self._request(self.made, place=TREE, probes=names)
        self.bench.send()
        seen, _ = self._conducted(self.bench.tree.run(TREE), _nothing)
        return self._run("root", "guest", self._out(seen, names), start)

    def _request(self, made: Canaries, **told: Any) -> None:
        request.write(self.bench.tree, made, time_limit_s=_TIME_LIMIT_S, **told)

    def _out(self, seen: Seen, names: tuple[str, ...]) -> tuple[ProbeResult, ...]:
        """Nothing of a machine is the host's: what a probe reached is told by the canaries."""
        own = dict.fromkeys(NAMESPACES, False)
        outside = Outside(network=self.network, namespaces=own, uid=self.bench.guest.uid, jail_root=(0, 0))
        return judge(seen, outside=outside, canaries=self.made, control=None, names=names)

    def _run(
        self, user: str, place: Place, results: tuple[ProbeResult, ...], start: float,
        differences: tuple[Finding, ...] = (),
    ) -> ProbeRun:  # fmt: skip
        return ProbeRun(
            walls=self.walls, place=place, user=user, uid=self.bench.guest.uid, network=self.network, results=results,
            seconds=time.monotonic() - start, differences=differences,
        )  # fmt: skip

    def _control(self, beside: Canaries) -> Control:
        """What this kernel does not have: the same probes as the machine's root."""
        self._request(beside, place=TREE, probes=self.in_jail, namespaces=self._namespaces(), disk=_DISK)
        self.bench.send()
        made = Control(complete=False)
        made.add(self._conducted(self.bench.tree.run(TREE), _nothing)[0])
        return made

    def _namespaces(self) -> dict[str, int]:
        """Numbers of the machine's own namespaces."""
        numbers = self.bench.beside("own")
        return {kind: int(numbers.get(kind, 0)) for kind in NAMESPACES}

    def _in_jail(self, plan: LaunchPlan, beside: Canaries, bare: Control, user: str) -> ProbeRun:
        start = time.monotonic()
        self._request(
            beside, place=PLACE, probes=(*self.in_jail, *self.out), launchers=(INIT,),
            namespaces=self._namespaces(), disk=_DISK, beyond=self.made, **planned(plan),
        )  # fmt: skip
        seen, facts = self._launched(plan, PLACE)
        uid = int(_fields(facts["process"]["status"])["Uid"].split()[0])
        shared = {kind: facts["process"]["ns"].get(kind) == facts["beside"]["ns"].get(kind) for kind in NAMESPACES}
        outside = Outside(network="host", namespaces=shared, uid=uid, jail_root=(facts["root"][0], facts["root"][1]))
        results = judge(seen, outside=outside, canaries=beside, control=bare, names=self.in_jail)
        left = [(name, _WHY_NOT_NETWORK) for name in _NETWORK] + [(name, _WHY_NOT_LIMITS) for name in LIMITS]
        results += tuple(
            ProbeResult(id=name, title=catalogue()[name].title, outcome="not applicable", detail=why)
            for name, why in left
        )
        results += self._out(seen, self.out)
        return self._run(user, "service", results, start, differences=self._differences(plan, facts))

    def _launched(self, plan: LaunchPlan, inside: str) -> tuple[Seen, dict[str, Any]]:
        """The probes instead of the service, by the launcher that starts it, which PID 1 executes the same way."""
        plan = msgspec.structs.replace(plan, argv=self.bench.tree.run(inside))
        self.bench.send(contain.encode(plan) if plan.chroot else with_tree(plan, TREE))

        def facts(ready: int) -> dict[str, Any]:
            told: dict[str, Any] | None = self.bench.beside("process", f"{inside}/{REQUEST}", str(ready))
            if told is None:
                raise WallError("the probes' process is not seen in the machine's /proc", hint="try once more")
            return told

        return self._conducted([INIT, PLAN], facts)

    def _conducted(
        self, argv: list[str] | tuple[str, ...], facts: Callable[[int], dict[str, Any]]
    ) -> tuple[Seen, dict[str, Any]]:
        known: list[dict[str, Any]] = []
        errors = bytearray()
        name = self.bench.guest.name
        with control.Session(name, argv) as session:
            seen = conduct(
                messages(session, errors), Input(session), at_ready=lambda said: known.append(facts(said["ready"])),
                answer=lambda asked: self._answer(asked, known[0]["pid"]),
            )  # fmt: skip
        if not known:
            said = errors.decode("utf-8", "replace").strip().splitlines()
            raise WallError(
                f"the probes did not start in the machine: {said[-1] if said else 'no message'}",
                hint="`stockade run` shows whether anything does",
            )
        return seen, known[0]

    def _answer(self, asked: dict[str, Any], pid: int) -> str:
        """What only the outside knows: whose a file is beside the jail, what stands in the image."""
        if asked["ask"] == "image":
            with open(images.file(self.bench.image.name), "rb") as file:
                content = os.pread(file.fileno(), len(asked["mark"]), asked["offset"])
            return "changed" if content == asked["mark"].encode() else "unchanged"
        return str(self.bench.beside("owner", str(pid), asked["path"]))

    def _differences(self, plan: LaunchPlan, facts: dict[str, Any]) -> tuple[Finding, ...]:
        """The state after the exec, compared with the plan, in copies of what stands in the machine's /proc."""
        with tempfile.TemporaryDirectory(prefix="stockade-prove-") as scratch:
            places = []
            for name in ("process", "beside"):
                place = Path(scratch, name)
                (place / "ns").mkdir(parents=True)
                for file in ("status", "limits", "mountinfo"):
                    (place / file).write_bytes(bytes.fromhex(facts[name][file]))
                for kind, target in facts[name]["ns"].items():
                    (place / "ns" / kind).symlink_to(target)
                places.append(place)
            return truth.compared(
                plan, places[0], places[1],
                opened={int(number): target for number, target in facts["process"]["fd"].items()},
                environ=bytes.fromhex(facts["process"]["environ"]), extra=(PLACE,),
            )  # fmt: skip


def _nothing(_: int) -> dict[str, Any]:
    """Of root in the machine nothing is compared."""
    return {"pid": 1}


def _fields(text: str) -> dict[str, str]:
    lines = bytes.fromhex(text).decode("ascii", "replace").splitlines()
    return {key: rest.strip() for key, _, rest in (line.partition(":") for line in lines)}
