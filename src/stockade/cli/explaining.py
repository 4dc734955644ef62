"""The verb explain: what is in a jail, and why."""

from __future__ import annotations

import argparse
from collections import Counter

from stockade import resolve
from stockade.build.lock import closure_of
from stockade.cli import asking, auditing, console, names
from stockade.cli.parser import Subparsers, add_verb
from stockade.errors import UsageError
from stockade.records.generation import Generation
from stockade.records.lock import LockEntry
from stockade.records.report import ExplainReport, Link, SummaryReport
from stockade.records.text import escape, unescape

__all__ = ["register"]

_PASSWD = "/etc/passwd"


def register(subparsers: Subparsers) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        subparsers, "explain", explain, json=True,
        help="tell what is in a jail, why a path is in it, or what a rule of the audit is about",
        description="Without PATH a summary of the jail; with PATH the chain of evidence that led to it. For the code "
        "of a rule, what it is about and what to do.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME|CODE", help="name of the jail, or the code of a rule")
    parser.add_argument("path", metavar="PATH", nargs="?", help="a path in the jail")
    parser.add_argument("--policy", action="store_true", help="the narrowest policy that is enough, as TOML for a spec")


def explain(arguments: argparse.Namespace) -> None:
    """Explain a jail or a path of it, or a rule."""
    if arguments.path is None and auditing.is_code(arguments.name):
        auditing.explain_rule(arguments.name, json=arguments.json)
        return
    generation = names.built(arguments.name)
    if arguments.policy:
        if arguments.path is not None:
            raise UsageError("`--policy` is about the whole jail", hint="leave out the path")
        asking.policy(arguments.name, generation, json=arguments.json)
    elif arguments.path is None:
        _summary(arguments, generation)
    else:
        _chain(arguments, generation)


def _chain(arguments: argparse.Namespace, generation: Generation) -> None:
    steps = resolve.chain(closure_of(generation.lock), arguments.path)
    entry = next(entry for entry in generation.lock.entries if unescape(entry.path) == steps[0].path)
    report = ExplainReport(
        name=arguments.name,
        path=entry.path,
        type=entry.type,
        mode=f"{entry.mode:04o}",
        owner=f"{entry.uid}:{entry.gid}",
        bytes=entry.size,
        target=entry.target,
        sha256=entry.sha256,
        package=f"{entry.package} {entry.package_version}".strip(),
        chain=tuple(
            Link(path=escape(step.path), kind=step.evidence.kind, detail=step.evidence.detail) for step in steps
        ),
    )
    if arguments.json:
        console.json_report(report)
        return
    console.text(console.visible(_described(report)))
    for depth, link in enumerate(report.chain):
        why = f"{link.kind}: {link.detail}" if link.detail else link.kind
        console.text(console.visible(f"{'  ' * (depth + 1)}{link.path}  {why}"))


def _described(report: ExplainReport) -> str:
    words = [report.path, f"-> {report.target}" if report.target else report.type, report.mode, report.owner]
    words += [console.size(report.bytes)] if report.type == "file" else []
    words += [f"from {report.package}"] if report.package else []
    return "  ".join(words)


def _summary(arguments: argparse.Namespace, generation: Generation) -> None:
    lock = generation.lock
    found = resolve.summary(closure_of(lock))
    report = SummaryReport(
        name=arguments.name,
        generation=generation.number,
        files=found.files,
        bytes=found.size_bytes,
        directories=found.directories,
        symlinks=found.symlinks,
        programs=tuple(escape(path) for path in found.programs),
        setuid=tuple(entry.path for entry in lock.entries if entry.type == "file" and _privileged(entry)),
        accounts=_accounts(generation),
        devices=lock.devices,
        capabilities=lock.capabilities,
        writable=tuple(directory.path for directory in lock.directories),
        packages=dict(Counter(entry.package for entry in lock.entries if entry.package).most_common()),
        evidence=found.evidence,
        false_positives=dict(lock.false_positives),
    )
    if arguments.json:
        console.json_report(report)
        return
    _show(report)
    console.next_command(f"`stockade explain {arguments.name} PATH` tells why a path is there")


def _privileged(entry: LockEntry) -> bool:
    return bool(entry.mode & 0o6000 or entry.capabilities)


def _accounts(generation: Generation) -> tuple[str, ...]:
    """Return the names in the jail's passwd: a file that the build wrote, so it has no link in its path."""
    try:
        lines = (generation.rootfs / _PASSWD[1:]).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (FileNotFoundError, PermissionError):
        return ()
    return tuple(line.partition(":")[0] for line in lines if line)


def _show(report: SummaryReport) -> None:
    console.text(f"{report.name}, generation {report.generation}")
    console.text(
        f"{report.files} files with {console.size(report.bytes)}, {report.directories} directories, "
        f"{report.symlinks} symbolic links"
    )
    for title, items in (
        ("programs", report.programs), ("setuid, setgid or with capabilities", report.setuid),
        ("accounts", report.accounts), ("devices", report.devices), ("capabilities", report.capabilities),
        ("writable directories", report.writable),
    ):  # fmt: skip
        console.listed(f"{title}, {len(items)}" if items else title, [*map(console.visible, items)] or ["none"])
    for title, counts in (
        ("packages, by files", report.packages), ("why entries are there", report.evidence),
        ("failed, and is not needed", report.false_positives),
    ):  # fmt: skip
        console.listed(title, [f"{name} ({count})" for name, count in counts.items()] or ["none"])
