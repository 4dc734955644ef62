"""The page that compares, made from one run:

stockade prove NAME --against LIST --json | python -m stockade.cli.peers_page > docs/peers.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import msgspec

from stockade.assure.catalogue import catalogue
from stockade.assure.peers import peers
from stockade.records.proof import ProbeResult, ProbeRun, Proof
from stockade.records.report import ProofReport

__all__ = ["page"]

_HEAD = """\
# The same probes behind other programs

Made from one run, never by hand:
`stockade prove {name} --against {against} --json | python -m stockade.cli.peers_page > docs/peers.md`

{date}, {system}, Linux {kernel}.

The file system is that of the jail `{name}`, but for firejail, which is meant for the host's own. Each program is
called as its own documentation shows it. Other options hold more back: the column `bubblewrap-all` shows how much, and
a seccomp filter can be given to bubblewrap as well.

The probes, the canaries and the judge outside are the same for all. So is the launcher's state, which is a careless
one: an open directory is inherited, a secret stands in the environment, the caller has a further group and an
inheritable capability, and a terminal of the caller's is standard input. `stockade` stands for all runs together: as
the service's user and as root inside, in each kind of network; what escapes in one of them counts.

| name | called as | version | source |
|---|---|---|---|
"""

_KEY = """
**escaped**: the probe got what the catalogue says must be out of reach. For rows F, P, T, N and I that is something of
the host's; for V and K often a part of the kernel that no service needs, which is a place to look for holes, not a way
out by itself. *no limit*: nothing limits it. held: it was stopped. ?: it cannot be tried here, and does not count as
held. A dash: there is nothing to try in that state (root's probes without root), or it was not tried (F19, which only
chroot is put to).
"""

_WORDS = {
    "held": "held", "escaped": "**escaped**", "not limited": "*no limit*", "not testable": "?", "not applicable": "–",
}  # fmt: skip
_ORDER = ("escaped", "not limited", "held", "not testable", "not applicable")


def page(report: ProofReport) -> str:
    """Return the whole page."""
    proof = report.proof
    columns = {"stockade": _worst(proof.runs)} | {run.walls: _worst([run]) for run in proof.peers}
    head = _HEAD.format(
        name=proof.name, against=",".join(run.walls for run in proof.peers), date=proof.time[:10], system=proof.system,
        kernel=proof.kernel,
    )  # fmt: skip
    tables = (*_programs(proof), _KEY, *_counts(columns), "", *_rows(columns), "", *_reasons(proof))
    return head + "\n".join(tables) + "\n"


def _programs(proof: Proof) -> Iterator[str]:
    for run in proof.peers:
        source = peers()[run.walls].source
        yield f"| {run.walls} | `{run.command}`, as {_user(run)} | {run.version} | {source} |"
    for skipped in proof.skipped:
        yield f"| {skipped.what} | not tried: {skipped.reason} | | |"


def _user(run: ProbeRun) -> str:
    return "root" if run.uid == 0 else f"the ordinary user {run.uid}"


def _worst(runs: Iterable[ProbeRun]) -> dict[str, ProbeResult]:
    found: dict[str, ProbeResult] = {}
    for run in runs:
        for result in run.results:
            before = found.get(result.id)
            if before is None or _ORDER.index(result.outcome) < _ORDER.index(before.outcome):
                found[result.id] = result
    return found


def _counts(columns: dict[str, dict[str, ProbeResult]]) -> Iterator[str]:
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for outcome in _ORDER:
        numbers = (sum(result.outcome == outcome for result in column.values()) for column in columns.values())
        yield f"| {outcome} | {' | '.join(map(str, numbers))} |"


def _rows(columns: dict[str, dict[str, ProbeResult]]) -> Iterator[str]:
    yield f"| probe | | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 2) + "|"
    for code, row in catalogue().items():
        cells = (_WORDS[column[code].outcome] if code in column else "–" for column in columns.values())
        yield f"| {code} | {row.title} | {' | '.join(cells)} |"


def _reasons(proof: Proof) -> Iterator[str]:
    yield "What cannot be tried here, and why:"
    yield ""
    reasons = {result.id: result.detail for run in proof.runs for result in run.of("not testable")}
    for code in catalogue():
        if code in reasons:
            yield f"- {code}: {reasons[code]}"


if __name__ == "__main__":
    print(page(msgspec.json.decode(sys.stdin.buffer.read(), type=ProofReport)), end="")
