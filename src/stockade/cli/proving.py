"""The verbs prove and verify-certificate."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stockade.cli import behind, console, names
from stockade.cli.parser import Subparsers, add_verb
from stockade.errors import UsageError
from stockade.records.report import CertificateReport, ProofReport

if TYPE_CHECKING:
    from stockade.records.finding import Finding
    from stockade.records.proof import ProbeRun, Proof

__all__ = ["register"]

_MARKS = {"held": "held", "escaped": "ESCAPED", "not limited": "NO LIMIT", "not testable": "?", "not applicable": "-"}
_PLACES = {
    "jail": "service", "service": "service", "guest": "root of the machine", "machine": "the machine's process",
}  # fmt: skip
_COLUMNS = ("held", "escaped", "not limited", "not testable", "not applicable")


def register(subparsers: Subparsers) -> None:
    """Add the verbs to the parser."""
    parser = add_verb(
        subparsers, "prove", prove, json=True,
        help="try the documented ways out of a jail, from inside",
        description="Run every probe of the catalogue inside the jail, through its own launch, as the service's user "
        "and as the jail's root, in each kind of network, and judge from outside what got through. The probes open and "
        "never write; the jail's files and volumes stay as they are. The exit status is 1 if anything escaped, if the "
        "state after the exec differs from the policy, or if a limit is not set. With a machine among the walls, a "
        "throw-away machine is tried: as the service in it, as its root, and in the place of its own process on the "
        "host, against the jail around that.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the jail")
    parser.add_argument("--walls", metavar="WALLS", help="jail, vm, jail,vm or jail,vm,jail (default: the spec's)")
    parser.add_argument(
        "--against", metavar="LIST", default="",
        help="as root: try the same behind programs, separated by commas: chroot, chroot-nobody, bubblewrap, "
        "bubblewrap-all, firejail, nspawn",
    )
    parser.add_argument("--certificate", metavar="FILE", help="write what was shown to this file")
    parser.add_argument("--all", action="store_true", help="list every probe, not only what was found")
    checker = add_verb(
        subparsers, "verify-certificate", verify, json=True,
        help="say whether a certificate still describes its jail",
        description="Compare the jail as it is on disk now with what a certificate says of it. The exit status is 1 if "
        "its lock, its files, its spec or its compiled policy have changed.",
    )  # fmt: skip
    checker.add_argument("file", metavar="FILE", help="what `stockade prove --certificate FILE` wrote")


def prove(arguments: argparse.Namespace) -> int:
    """Prove, and report; 1 when something was found."""
    names.built(arguments.name)
    walls = behind.walls_of(arguments)
    start = time.monotonic()
    with console.Progress() as progress:
        progress.doing(f"proving `{arguments.name}`")
        against = [word for word in arguments.against.split(",") if word]
        proof = _proof(arguments.name, walls, against, progress, asked=bool(arguments.walls))
        seconds = time.monotonic() - start
        if arguments.certificate is not None:
            progress.doing(f"writing the certificate `{arguments.certificate}`")
            _certify(proof, Path(arguments.certificate))
    if arguments.json:
        console.json_report(
            ProofReport(proof=proof, escapes=proof.escapes, findings=proof.findings, seconds=seconds)
        )
    else:
        _show(proof, everything=arguments.all)
    if arguments.certificate is not None:
        console.next_command(f"`stockade verify-certificate {arguments.certificate}` tells whether it still holds")
    elif not proof.findings:
        console.next_command(f"`stockade prove {arguments.name} --certificate FILE` keeps this")
    return 1 if proof.findings else 0


def _proof(
    name: str, walls: Sequence[str], against: Sequence[str], progress: console.Progress, *, asked: bool
) -> Proof:
    if "vm" in walls:
        from stockade import machineproof

        return machineproof.prove(name, walls, against=against, progress=progress.doing)
    if asked and tuple(walls) != ("jail",):
        raise UsageError(
            f"`{','.join(walls)}` are no walls that can be tried", hint="`jail`, `vm`, `jail,vm` or `jail,vm,jail`"
        )
    from stockade.assure import prove as proving

    return proving.prove(name, against=against, progress=progress.doing, alone=asked)


def _certify(proof: Proof, path: Path) -> None:
    from stockade.assure import certificate

    certificate.write(certificate.certify(proof, audit=_audit(proof.name)), path)


def _audit(name: str) -> tuple[Finding, ...]:
    from stockade.assure import audit as auditing
    from stockade.build.generations import ids_of, on_files

    generation = names.built(name)
    entries = generation.lock.entries
    owner = (entries[0].uid, entries[0].gid) if entries else (0, 0)
    subject = auditing.of_generation(name, generation)
    return on_files(ids_of(names.existing(name), *owner), auditing.audit, subject).findings


def _show(proof: Proof, *, everything: bool) -> None:
    console.text(f"{proof.name}, generation {proof.generation}, on Linux {proof.kernel}, started by {proof.user}")
    console.text()
    console.rows(
        (_counts(run) for run in (*proof.runs, *proof.peers)), heading=("WALLS", "PLACE", "USER", "NETWORK", *_COLUMNS)
    )
    for run in proof.peers:
        console.text(f"{run.walls}: {run.version}: {run.command}")
    if everything or proof.peers:
        console.text()
        _table(proof)
    _details(proof.runs, "escaped", "escaped")
    for run in proof.runs:
        for difference in run.differences:
            console.text(f"differs from the policy, as {run.user}: {difference.message} {difference.path}".rstrip())
    _details(proof.runs, "not limited", "not limited")
    for missing in proof.not_limited:
        cure = f"; {missing.remedy}" if missing.remedy else ""
        console.text(f"not limited: {missing.limit}: {missing.reason}{cure}")
    _details(proof.runs, "not testable", "not testable here")
    for skipped in proof.skipped:
        console.text(f"not tried: {skipped.what}: {skipped.reason}")
    console.text()
    console.text(f"{proof.name}: {proof.escapes} escapes, {proof.findings - proof.escapes} limits not set")


def _counts(run: ProbeRun) -> tuple[str, ...]:
    return (run.walls, _PLACES[run.place], run.user, run.network, *(str(len(run.of(outcome))) for outcome in _COLUMNS))  # type: ignore[arg-type]


def _details(runs: Iterable[ProbeRun], outcome: str, word: str) -> None:
    """Each finding once, with the states in which it was seen."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        for result in run.of(outcome):  # type: ignore[arg-type]
            seen.setdefault((result.id, result.title, result.detail), []).append(_state(run))
    for (code, title, detail), where in seen.items():
        tail = f" ({'; '.join(where)})" if outcome == "escaped" else ""
        console.text(f"{word}: {code} {title}: {detail}{tail}")


def _state(run: ProbeRun) -> str:
    place = "" if run.place == "jail" else f" as {_PLACES[run.place]}"
    return f"{run.user}{place}, {run.network}"


def _table(proof: Proof) -> None:
    """A row for each probe, a column for each of the walls: the worst of what was seen behind them."""
    order = ("escaped", "not limited", "held", "not testable", "not applicable")
    walls: dict[str, dict[str, str]] = {}
    titles: dict[str, str] = {}
    for run in (*proof.runs, *proof.peers):
        column = walls.setdefault(run.walls if run.place == "jail" else _PLACES[run.place], {})
        for result in run.results:
            titles[result.id] = result.title
            before = column.get(result.id, "not applicable")
            column[result.id] = min(before, result.outcome, key=order.index)
    console.rows(
        ((code, *(_MARKS[column.get(code, "not applicable")] for column in walls.values()), title)
         for code, title in titles.items()),
        heading=("PROBE", *walls, ""),
    )  # fmt: skip


def verify(arguments: argparse.Namespace) -> int:
    """Compare; 1 when the certificate no longer describes the jail."""
    from stockade.assure import certificate

    known = certificate.read(Path(arguments.file))
    changed = certificate.compare(known)
    valid = all(change.what == "kernel" for change in changed)
    name = known.proof.name
    if arguments.json:
        console.json_report(CertificateReport(name=name, time=known.proof.time, valid=valid, changed=changed))
        return 0 if valid else 1
    for change in changed:
        console.text(f"{change.what} has changed: {change.then} then, {change.now} now")
    if valid:
        console.text(f"the certificate of {known.proof.time} still describes `{name}`")
        return 0
    console.text(f"the certificate of {known.proof.time} does not describe `{name}` any more")
    console.next_command(f"`stockade prove {name} --certificate {arguments.file}` makes a new one")
    return 1
