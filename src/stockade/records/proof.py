"""What `prove` shows: probes, their results behind one set of walls, and the certificate that keeps them."""

from __future__ import annotations

from typing import Literal

import msgspec

from .finding import Finding
from .policy import NotLimited

PROOF_VERSION = 1

Outcome = Literal[
    "held",
    "escaped",
    "not limited",      # a limit that nothing sets: a finding, as an escape is
    "not testable",     # this host cannot show it: `detail` says why. Never counted as held
    "not applicable",   # the spec or the state leaves nothing to try
]


What = Literal["generation", "kernel", "lock", "machine", "plan", "rootfs", "spec"]

Place = Literal[
    "jail",       # the service's place in a jail of the host's
    "service",    # the service's place in a machine
    "guest",      # root's in a machine
    "machine",    # that of the machine's own process on the host
]


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Probe(_Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the catalogue.

    `needs`: "root" when the attempt makes sense for root or a capability, else "any". `plain`: who escapes a plain
    chroot: "root", "any" (an ordinary user as well), "object" (only when the object is inside), "" (nothing is said).
    `canaries`: contents of which at least one must have been read; where it is empty the attempt's own result counts.
    `networks`: the modes in which there is something to try.
    """

    id: str
    title: str
    needs: Literal["root", "any"] = "any"
    plain: Literal["root", "any", "object", ""]
    expected: str
    canaries: tuple[str, ...] = ()
    networks: tuple[Literal["none", "private", "host", "publish", "nat"], ...] = (
        "none", "private", "host", "publish", "nat",
    )  # fmt: skip


class ProbeResult(_Record, frozen=True, kw_only=True):
    """What one probe gave. `detail` says what stopped it, what got through, or why it could not be tried."""

    id: str
    title: str
    outcome: Outcome
    detail: str


class ProbeRun(_Record, frozen=True, kw_only=True):
    """All probes behind one set of walls, as one user, in one kind of network.

    `walls` are the jail's ("jail", "jail,vm,jail"), or the name of another program and `command` how that was called.
    `place` is where behind them the probes ran. `differences` are those of the state after the exec from the policy.
    """

    walls: str
    place: Place = "jail"
    command: str = ""
    version: str = ""
    user: str
    uid: int
    network: str
    seconds: float
    results: tuple[ProbeResult, ...]
    differences: tuple[Finding, ...] = ()

    def of(self, outcome: Outcome) -> tuple[ProbeResult, ...]:
        """The results with this outcome."""
        return tuple(result for result in self.results if result.outcome == outcome)


class Skipped(_Record, frozen=True, kw_only=True):
    """Walls or a state that could not be tried, and why."""

    what: str
    reason: str


class Machine(_Record, frozen=True, kw_only=True):
    """What a service in a machine stood behind: the walls, the kernel's file, its version and digest.

    `jail` is the name of the jail around it and `lock` the digest of that one's lock, both "" where there is none.
    """

    walls: tuple[str, ...]
    kernel: str
    version: str
    sha256: str
    jail: str = ""
    lock: str = ""


class Proof(_Record, frozen=True, kw_only=True):
    """Everything that one `prove` showed about a jail. `machine`: for walls with a machine among them."""

    name: str
    generation: int
    kernel: str
    system: str
    user: str
    time: str                 # ISO 8601, UTC
    runs: tuple[ProbeRun, ...]
    peers: tuple[ProbeRun, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    not_limited: tuple[NotLimited, ...] = ()
    machine: Machine | None = None

    @property
    def escapes(self) -> int:
        """Probes that escaped the jail, and differences from its policy."""
        return sum(len(run.of("escaped")) + len(run.differences) for run in self.runs)

    @property
    def findings(self) -> int:
        """The escapes, and limits that nothing sets, each counted once."""
        return self.escapes + len({result.id for run in self.runs for result in run.of("not limited")})


class Changed(_Record, frozen=True, kw_only=True):
    """Something that is no longer as a certificate says: digests, or numbers as text."""

    what: What
    then: str
    now: str


class Certificate(_Record, frozen=True, kw_only=True):
    """What was shown about exactly this jail. `plan` is the digest of the compiled policy, `rootfs` that of the tree.

    `exercises` are the names of those that the last build saw pass inside; `audit` the findings of the static audit.
    """

    certificate: int = PROOF_VERSION
    stockade: str
    lock: str
    rootfs: str
    plan: str
    spec: str
    capabilities: tuple[str, ...]
    syscalls: str
    exercises: tuple[str, ...]
    audit: tuple[Finding, ...]
    proof: Proof
