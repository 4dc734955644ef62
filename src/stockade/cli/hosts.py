"""The verbs about this host and this command line: doctor, completion."""

from __future__ import annotations

import argparse

from stockade.cli import console
from stockade.cli.parser import Subparsers, add_verb
from stockade.records.host import Feature
from stockade.records.report import DoctorReport

__all__ = ["register"]

_SHELLS = ("bash", "zsh", "tcsh")
_MARKS = {"present": "ok", "limited": "part", "absent": "NO", "not needed": "-"}


def register(subparsers: Subparsers) -> None:
    """Add the verbs to the parser."""
    add_verb(
        subparsers, "doctor", doctor, json=True,
        help="try what this host offers, and say what to install",
        description="Try every kernel feature and look for every program that Stockade uses; say what its absence "
        "costs and what brings it. Ends with 1 if something is missing without which nothing works.",
    )  # fmt: skip
    parser = add_verb(
        subparsers, "completion", completion,
        help="print a completion script for a shell",
        description="Print a completion script, for example: stockade completion bash "
        "> /etc/bash_completion.d/stockade",
    )  # fmt: skip
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=f"one of {', '.join(_SHELLS)}")


def doctor(arguments: argparse.Namespace) -> int:
    """Examine the host."""
    from stockade.doctor import examine

    host = examine()
    if arguments.json:
        console.json_report(DoctorReport(host=host))
    else:
        console.text(f"{host.system}, Linux {host.kernel} on {host.architecture}, as user {host.user}")
        console.text()
        wide = arguments.verbose > 0
        console.rows(
            (
                (_MARKS[feature.state], feature.name, feature.seen, *([feature.purpose] if wide else []))
                for feature in host.features
            ),
            heading=("", "WHAT", "SEEN", *(["FOR"] if wide else [])),
        )
        for feature in host.features:
            _cure(feature)
    if host.missing:
        console.note(f"error: nothing works without {', '.join(feature.name for feature in host.missing)}")
        return 1
    console.next_command("`stockade recipes` lists what can be built")
    return 0


def _cure(feature: Feature) -> None:
    if feature.cost:
        console.text()
        console.text(f"{feature.name}: {feature.cost}")
        console.text(f"  cure: {feature.cure}")


def completion(arguments: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    from stockade.cli.parser import build

    console.text(shtab.complete(build(), shell=arguments.shell).rstrip("\n"))
