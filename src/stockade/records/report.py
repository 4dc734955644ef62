"""What the command line reports with `--json`: one record for each report, with its name and version in it."""

from __future__ import annotations

from typing import Literal

import msgspec

from .buildreport import BuildReport, Report
from .finding import Accepted, Finding, Mending, Severity, Unchecked
from .host import Host
from .proof import Changed, Proof
from .proposal import Proposal, Refusal


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """A ready-made spec."""

    name: str
    description: str
    walls: tuple[str, ...]
    exercises: int
    path: str


class RecipesReport(Report, frozen=True, kw_only=True, tag="recipes"):
    """`stockade recipes`: what can be built without writing a spec."""

    recipes: tuple[Recipe, ...]


class Jail(msgspec.Struct, frozen=True, kw_only=True):
    """A jail that was built. `generation` is the current one; `bytes` counts the contents of its files."""

    name: str
    generation: int
    generations: tuple[int, ...]
    files: int
    bytes: int
    running: bool


class ListReport(Report, frozen=True, kw_only=True, tag="list"):
    """`stockade list`: the jails of this caller."""

    jails: tuple[Jail, ...]


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A running jail, or one command that runs in it beside the service.

    `instance` is the name for the service and NAME@NUMBER for a command. Pids are those of the host: `pid` of the
    jail's first process, `service_pid` of the command itself, null once it has gone into the background.

    state: "restarting" between two lives, when there is no process. memory in bytes and cpu_s are those of its control
    groups where it has some, else sums over its processes. `ports` are what its spec opens outside. `helper_lost`: its
    network helper has ended, and what it carried is cut off. `supervised`: nobody killed its supervisor. `walls` with
    "vm" among them: a machine, whose `pid` is that of its own first process, and which can be "frozen".
    """

    name: str
    instance: str
    pid: int
    service_pid: int | None
    generation: int | None
    uptime_s: float
    processes: int
    state: Literal["running", "restarting", "frozen"] = "running"
    memory: int | None = None
    cpu_s: float | None = None
    restarts: int = 0
    ports: tuple[str, ...] = ()
    helper_lost: bool = False
    supervised: bool = True
    walls: tuple[str, ...] = ("jail",)


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A jail that was started and ended by itself. `ended` is in seconds since 1970.

    status is 128 + n after signal n, and null when nobody was left to see it. `failed` is the launch step that failed.
    """

    name: str
    instance: str
    generation: int | None
    status: int | None
    failed: str = ""
    restarts: int = 0
    ended: float


class PsReport(Report, frozen=True, kw_only=True, tag="ps"):
    """`stockade ps`: the jails that are running, and with `--all` those that were started and have ended."""

    jails: tuple[Process, ...]
    ended: tuple[Ended, ...] = ()


class WhyReport(Report, frozen=True, kw_only=True, tag="why"):
    """`stockade why NAME`: what the walls refused, and the lines of a spec that allow it.

    `works` tells whether everything worked as the jail is, `works_with_lines` whether it did in the last run, with
    the lines in force that could be tried. `toml` has all lines together, each list whole. `output` is the last that
    was written in the first run, where that did not work.
    """

    name: str
    command: tuple[str, ...]
    works: bool
    works_with_lines: bool
    runs: int
    refusals: tuple[Refusal, ...]
    toml: str = ""
    output: str = ""


class PolicyReport(Report, frozen=True, kw_only=True, tag="policy"):
    """`stockade explain NAME --policy`: what the build proposes as a policy, and what the spec says now."""

    name: str
    generation: int
    proposal: Proposal


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One link of a chain of evidence: a path and why it is there."""

    path: str
    kind: str
    detail: str = ""


class ExplainReport(Report, frozen=True, kw_only=True, tag="explain"):
    """`stockade explain NAME PATH`: the chain that led to a path, from the path to its first cause."""

    name: str
    path: str
    type: str
    mode: str
    owner: str
    bytes: int
    target: str = ""
    sha256: str = ""
    package: str = ""
    chain: tuple[Link, ...]


class SummaryReport(Report, frozen=True, kw_only=True, tag="summary"):
    """`stockade explain NAME`: what is in a jail."""

    name: str
    generation: int
    files: int
    bytes: int
    directories: int
    symlinks: int
    programs: tuple[str, ...]
    setuid: tuple[str, ...]
    accounts: tuple[str, ...]
    devices: tuple[str, ...]
    capabilities: tuple[str, ...]
    writable: tuple[str, ...]
    packages: dict[str, int]
    evidence: dict[str, int]
    false_positives: dict[str, int]


class GenerationLine(msgspec.Struct, frozen=True, kw_only=True):
    """A kept generation. `built` is in seconds since 1970."""

    number: int
    current: bool
    built: float
    files: int
    bytes: int


class StatusReport(Report, frozen=True, kw_only=True, tag="status"):
    """`stockade status`: where a jail stands. `spec_changed` tells that its spec is no longer what was built."""

    name: str
    running: Process | None
    ended: Ended | None = None
    generations: tuple[GenerationLine, ...]
    spec: str | None
    spec_changed: bool


class DoctorReport(Report, frozen=True, kw_only=True, tag="doctor"):
    """`stockade doctor`: what this host offers."""

    host: Host


class AuditReport(Report, frozen=True, kw_only=True, tag="audit"):
    """`stockade audit`: what is wrong with a jail or a directory tree.

    `target` is a jail's name or a path. `findings` are those that nobody accepts, the worst first; `counts` has the
    number of all of them by code, also of those that are not listed one by one. `score` is 100 for nothing found; it
    is 100 / (1 + `points` / `half`), where a rule that is broken n times gives (1 + log2 n) times the weight of its
    severity. `score_with_accepted` counts the accepted findings too. `mended` is there after `--fix`.
    """

    target: str
    kind: Literal["jail", "directory"]
    generation: int | None = None
    examined: int
    seconds: float
    score: float
    score_with_accepted: float
    points: float
    half: float
    weights: dict[Severity, float]
    counts: dict[str, int]
    findings: tuple[Finding, ...]
    accepted: tuple[Accepted, ...]
    unchecked: tuple[Unchecked, ...]
    mended: tuple[Mending, ...] = ()


class RuleReport(Report, frozen=True, kw_only=True, tag="rule"):
    """`stockade explain CODE`: what a rule of the audit is about."""

    code: str
    severity: Severity
    title: str
    remedy: str
    source: str
    acceptable: bool
    mendable: bool


class ProofReport(Report, frozen=True, kw_only=True, tag="prove"):
    """`stockade prove`: what the probes showed.

    `escapes` counts differences from the policy too, `findings` also limits that nothing sets.
    """

    proof: Proof
    escapes: int
    findings: int
    seconds: float


class CertificateReport(Report, frozen=True, kw_only=True, tag="verify-certificate"):
    """`stockade verify-certificate`: what is no longer as certified.

    A changed kernel alone does not make a certificate invalid.
    """

    name: str
    time: str
    valid: bool
    changed: tuple[Changed, ...]


REPORTS: tuple[type[Report], ...] = (
    RecipesReport, ListReport, PsReport, BuildReport, ExplainReport, SummaryReport, StatusReport, DoctorReport,
    AuditReport, RuleReport, ProofReport, CertificateReport, WhyReport, PolicyReport,
)  # fmt: skip
