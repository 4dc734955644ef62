"""The verb build: from a spec to a jail that was tried."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stockade.cli import console
from stockade.cli.parser import Subparsers, add_verb

if TYPE_CHECKING:
    from stockade.records.buildreport import BuildReport
    from stockade.records.closure import Advice

__all__ = ["register"]

_SHOWN = 12
_NOTED = 3


def register(subparsers: Subparsers) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        subparsers, "build", build, json=True,
        help="make a jail: watch the service, copy what it needs, try it inside",
        description="Run the service and its exercises in a throwaway view of the host, build a root file system from "
        "what was observed, try the same inside until nothing is missing, and make the result current. A build that "
        "fails leaves the jail as it was.",
    )  # fmt: skip
    parser.add_argument(
        "spec", metavar="NAME|FILE", help="a spec or recipe by name; a file by a path with `/` or ending in .toml"
    )
    parser.add_argument("--no-observe", action="store_true", help="take only what the spec names, with its libraries")
    parser.add_argument("--no-verify", action="store_true", help="do not try the result")
    parser.add_argument("--lock", metavar="FILE", help="build exactly what this lock says, from this host's files")


def build(arguments: argparse.Namespace) -> None:
    """Build, and report how it went."""
    with console.Progress() as progress:
        progress.doing(f"reading the spec `{arguments.spec}`")
        from stockade import specfile

        spec = specfile.read(arguments.spec)
        from stockade import workflow

        verify = not arguments.no_verify
        if arguments.lock is not None:
            from stockade.build.lock import read_lock

            report = workflow.build_from_lock(
                read_lock(Path(arguments.lock)), spec, verify=verify, progress=progress.doing
            )
        else:
            report = workflow.build(spec, observe=not arguments.no_observe, verify=verify, progress=progress.doing)
    if arguments.json:
        console.json_report(report)
        return
    _show(report)
    verb = "run" if report.ends else "start"
    console.next_command(f"`stockade {verb} {report.name}`; `stockade explain {report.name}` shows what is in it")


def _show(report: BuildReport) -> None:
    for made in report.rounds:
        console.text(f"round {made.number}: {_added(made.added)}")
    if report.exercises:
        passed = sum(exercise.passed for exercise in report.exercises)
        console.text(f"exercises: {passed} of {len(report.exercises)} passed inside")
    for line in _notes(report.advice):
        console.text(f"note: {line}")
    for secret in report.new_secrets:
        value = f": {secret.value.strip()}" if secret.value else ""
        console.text(f"new {secret.kind} `{secret.name}`{value}, kept in {secret.kept}")
    if report.proposal is not None:
        from stockade.cli import asking

        for line in asking.brief(report.name, report.proposal):
            console.text(console.visible(line))
    if report.stages:
        times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.stages.items())
        console.text(f"time: {times}; together {sum(report.stages.values()):.1f} s")
    console.text(
        f"{report.name}: generation {report.generation}, {report.files} files with {console.size(report.bytes)}"
    )


def _notes(advice: Iterable[Advice]) -> Iterator[str]:
    """A line for each kind of advice with its path, or, where it is given on many, with the directory above them."""
    places: dict[str, list[str]] = {}
    for one in advice:
        places.setdefault(one.message, []).append(one.path)
    for message, paths in places.items():
        if len(paths) > _NOTED:
            yield f"{message} ({len(paths)} paths below {os.path.commonpath(paths)})"
        else:
            yield from (f"{message} ({path})" for path in paths)


def _added(paths: tuple[str, ...]) -> str:
    if not paths:
        return "nothing was missing"
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{len(paths)} missing, added: {', '.join(paths[:_SHOWN])}{more}"
