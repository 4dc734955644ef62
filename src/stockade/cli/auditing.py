"""The verb audit, and what explain says of a rule."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from stockade.assure import audit as auditing
from stockade.build.generations import ids_of, on_files
from stockade.cli import console, names
from stockade.cli.parser import Subparsers, add_verb
from stockade.errors import NotFoundError, UsageError
from stockade.records.finding import Accepted, Finding, Mending, Unchecked
from stockade.records.report import AuditReport, RuleReport

if TYPE_CHECKING:
    from stockade.assure.audit import Baseline, Proposal, Subject

__all__ = ["explain_rule", "is_code", "register"]

_CODE = re.compile(r"[A-Z][A-Z0-9]*(?:-[A-Z0-9]+)*")
_SHOWN = 10


def register(subparsers: Subparsers) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        subparsers, "audit", audit, json=True,
        help="find what is wrong with a jail, or with any directory that is to be a root",
        description="Look at every file, account and right of a jail, and compare its policy with what the service was "
        "seen to need; or, with --root, look at a directory that another tool made. Nothing is executed. The exit "
        "status is 1 if anything is found that neither the spec nor a baseline accepts.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", nargs="?", help="name of the jail")
    parser.add_argument("--root", metavar="DIR", help="audit this directory instead of a jail")
    parser.add_argument("--user", metavar="USER", help="with --root: name or number of the service's user")
    parser.add_argument("--baseline", metavar="FILE", help="TOML file of findings that are accepted, with reasons")
    parser.add_argument("--fix", action="store_true", help="with --root: mend what is safe to mend, after asking")
    parser.add_argument("--force", action="store_true", help="with --fix: do not ask")


def audit(arguments: argparse.Namespace) -> int:
    """Audit a jail or a directory; 1 when something was found."""
    _check(arguments)
    baseline = auditing.read_baseline(Path(arguments.baseline)) if arguments.baseline is not None else None
    with console.Progress() as progress:
        if arguments.root is None:
            report = _jail(arguments.name, baseline, progress)
        else:
            report = _directory(arguments, baseline, progress)
    if arguments.json:
        console.json_report(report)
    else:
        _show(report, everything=arguments.verbose > 0)
    return 1 if report.counts else 0


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.name is None) == (arguments.root is None):
        raise UsageError("`stockade audit` takes a jail or a directory", hint="name a jail, or give `--root DIR`")
    if arguments.root is not None:
        return
    if arguments.fix:
        raise UsageError(
            "`--fix` mends a directory, and a jail is made from its spec",
            hint=f"change the spec, then `stockade build {arguments.name}`; `stockade explain CODE` has the remedy",
        )
    if arguments.user is not None:
        raise UsageError("`--user` is for `--root`: a jail's spec names its user", hint="leave it out")


def _jail(name: str, baseline: Baseline | None, progress: console.Progress) -> AuditReport:
    generation = names.built(name)
    progress.doing(f"auditing `{name}`, generation {generation.number}")
    subject = auditing.of_generation(name, generation)
    entries = generation.lock.entries
    owner = (entries[0].uid, entries[0].gid) if entries else (0, 0)
    return on_files(ids_of(names.existing(name), *owner), auditing.audit, subject, baseline)


def _directory(arguments: argparse.Namespace, baseline: Baseline | None, progress: console.Progress) -> AuditReport:
    root = Path(arguments.root)
    progress.doing(f"auditing `{root}`")
    user = auditing.find_user(root, arguments.user) if arguments.user is not None else None
    subject = auditing.of_directory(root, user=user)
    report, proposals = auditing.examine(subject, baseline, progress=progress.doing)
    if not arguments.fix:
        return report
    mended = _mend(subject, proposals, progress, force=arguments.force)
    if arguments.baseline is not None:
        baseline = auditing.read_baseline(Path(arguments.baseline))
    again = auditing.audit(subject, baseline, progress=progress.doing)
    return msgspec.structs.replace(again, mended=mended)


def _mend(
    subject: Subject, proposals: tuple[Proposal, ...], progress: console.Progress, *, force: bool
) -> tuple[Mending, ...]:
    """Show what would be changed, ask, and change it."""
    progress.pause()
    if not proposals:
        console.note("nothing that was found is safe to mend without you")
        return ()
    for proposal in proposals:
        console.note(console.visible(f"would mend {proposal.code}: {proposal.path}: {auditing.described(proposal)}"))
    many = f"{len(proposals)} {'change' if len(proposals) == 1 else 'changes'}"
    console.confirm(f"make {many} in `{subject.root}`", force=force)
    return auditing.mend(subject.root, proposals)


def _show(report: AuditReport, *, everything: bool) -> None:
    limit = None if everything else _SHOWN
    for mended in report.mended:
        what = f"could not mend {mended.code}" if mended.failed else f"mended {mended.code}"
        console.text(console.visible(f"{what}: {mended.path}: {mended.failed or mended.change}"))
    for code, group in groupby(report.findings, key=lambda finding: finding.code):
        _rule(list(group), report.counts[code], limit)
    _accepted(report.accepted, limit)
    _unchecked(report.unchecked)
    where = f"{report.target}, generation {report.generation}" if report.generation is not None else report.target
    found = sum(report.counts.values())
    console.text(
        console.visible(
            f"{where}: {_many(found, 'finding')}, {len(report.accepted)} accepted; score {report.score:g} of 100, "
            f"{report.score_with_accepted:g} with what is accepted"
        )
    )  # fmt: skip
    if report.findings:
        console.next_command(f"`stockade explain {report.findings[0].code}` tells what the rule is about")
    elif report.kind == "jail":
        console.next_command(f"`stockade start {report.target}`")


def _rule(findings: list[Finding], count: int, limit: int | None) -> None:
    rule = auditing.rules()[findings[0].code]
    console.text(f"{rule.severity}  {rule.code}: {rule.title}")
    for finding in findings[:limit]:
        console.text(console.visible(f"    {': '.join(filter(None, (finding.path, finding.message)))}"))
    if count > len(findings[:limit]):
        console.text(f"    and {count - len(findings[:limit])} more")
    console.text(f"    remedy: {rule.remedy}")


def _accepted(accepted: Iterable[Accepted], limit: int | None) -> None:
    listed = list(accepted)
    for each in listed[:limit]:
        what = ": ".join(filter(None, (each.finding.path, each.finding.message)))
        console.text(console.visible(f"accepted  {each.finding.code}: {what} ({each.by}: {each.reason})"))
    if limit is not None and len(listed) > limit:
        console.text(f"accepted  and {len(listed) - limit} more")


def _unchecked(unchecked: Iterable[Unchecked]) -> None:
    by_reason: dict[str, list[str]] = {}
    for each in unchecked:
        by_reason.setdefault(each.reason, []).append(each.code)
    for reason, codes in by_reason.items():
        console.text(console.visible(f"not checked: {', '.join(codes)}: {reason}"))


def _many(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def is_code(word: str) -> bool:
    """Whether `word` can only be the code of a rule: names of jails have no capital letters."""
    return _CODE.fullmatch(word) is not None


def explain_rule(code: str, *, json: bool) -> None:
    """Tell what a rule is about. NotFoundError, with the nearest code, where there is none."""
    rule = auditing.rule(code)
    if rule is None:
        raise NotFoundError(
            f"there is no rule `{code}`{console.nearest(code, auditing.rules())}", hint="docs/audit.md lists the rules"
        )
    if json:
        console.json_report(
            RuleReport(
                code=rule.code, severity=rule.severity, title=rule.title, remedy=rule.remedy, source=rule.source,
                acceptable=rule.reason, mendable=rule.fix,
            )  # fmt: skip
        )
        return
    console.text(f"{rule.code}, {rule.severity}: {rule.title}")
    console.text(f"remedy: {rule.remedy}")
    console.text(f"source: {rule.source}")
    if rule.reason:
        console.text("accepted where `files.reasons` of the spec gives a reason for the path")
    if rule.fix:
        console.text("`stockade audit --root DIR --fix` mends it")
