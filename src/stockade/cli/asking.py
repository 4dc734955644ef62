"""The verb why, and the policy that explain shows: what was refused, and which lines of a spec would be enough."""

from __future__ import annotations

import argparse

from stockade.cli import console, names
from stockade.cli.parser import Subparsers, add_verb
from stockade.errors import NotFoundError
from stockade.records.generation import Generation
from stockade.records.proposal import Proposal, Refusal
from stockade.records.report import PolicyReport, WhyReport

__all__ = ["brief", "policy", "register"]


def register(subparsers: Subparsers) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        subparsers, "why", why, json=True, command="[-- COMMAND ...]",
        help="tell why something was blocked, and the line of the spec that allows it",
        description="Run the service of the jail with its exercises, or COMMAND in the service's place, behind the "
        "jail's walls under observation. Each system call, capability, device, place or file that was refused, and "
        "each limit that was reached, is listed with the reason and the line for the spec that allows it, or the "
        "reason why no policy can. The lines are tried in further runs, all at once. The run has a network and "
        "volumes of its own that vanish.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the jail")


def why(arguments: argparse.Namespace) -> None:
    """Find out, and report."""
    names.built(arguments.name)
    with console.Progress() as progress:
        progress.doing(f"running `{arguments.name}` to see what is refused")
        from stockade.why import why as find_out

        report = find_out(arguments.name, arguments.command, progress=progress.doing)
    if arguments.json:
        console.json_report(report)
        return
    _show(report)
    if report.toml and not report.works:
        console.next_command(f"put the lines that it needs into the spec, then `stockade build {report.name}`")


def _show(report: WhyReport) -> None:
    state = "everything worked" if report.works else "something failed"
    said = [console.visible(line) for line in report.output.strip().splitlines()]
    if not report.refusals:
        console.text(f"{report.name}: nothing was refused, and {state}{f': {said[-1]}' if said else ''}")
        return
    console.text(f"{report.name}: {len(report.refusals)} refused, and {state}{f': {said[-1]}' if said else ''}")
    for refusal in report.refusals:
        for line in _lines(refusal):
            console.text(console.visible(line))
    if report.toml:
        again = "it works" if report.works_with_lines else "it does not work yet"
        tried = f" ({again} with those that could be tried)" if report.runs > 1 and not report.works else ""
        wanted = "it needs none of this; to allow it all the same" if report.works else f"all lines together{tried}"
        console.text(f"\n{wanted}:\n")
        console.text(report.toml)


def _lines(refusal: Refusal) -> list[str]:
    from stockade.why import described

    found = [f"- {described(refusal)}"]
    effect = {True: "tried, it is allowed then", False: "", None: "not tried"}[refusal.confirmed]
    return found + [f"    [{line.table}] {line.line}    # {effect}" for line in refusal.lines]


def policy(name: str, generation: Generation, *, json: bool) -> None:
    """Write the policy that the build of `generation` found to be enough, as TOML with facts as comments."""
    proposal = generation.proposal()
    if proposal is None:
        raise NotFoundError(
            f"jail `{name}` was built without being tried, so that nothing is known of what it needs",
            hint=f"`stockade build {name}` tries it",
        )
    if json:
        console.json_report(PolicyReport(name=name, generation=generation.number, proposal=proposal))
        return
    console.text(f"# The narrowest policy in which all that was exercised in `{name}` works.")
    for line in _facts(proposal):
        console.text(console.visible(f"# {line}"))
    console.text("")
    console.text(proposal.toml or "# The spec says it already.")


def brief(name: str, proposal: Proposal) -> list[str]:
    """Return what a build says of the policy."""
    now = f", not `{proposal.preset_now}`" if proposal.preset != proposal.preset_now else ""
    words = [f"preset `{proposal.preset}`{now}, of which {proposal.used} calls are used and {proposal.unused} are not"]
    words += [f"capabilities {', '.join(proposal.capabilities) or 'none'}"]
    words += [f"listens on {', '.join(proposal.ports)}"] if proposal.ports else []
    lines = [f"policy that is enough: {'; '.join(words)}"]
    if proposal.refused:
        lines.append(
            f"note: {len(proposal.refused)} refused, though nothing failed: {', '.join(proposal.refused[:5])}; "
            f"`stockade why {name}` tells more"
        )
    if proposal.lines:
        lines.append(f"note: `stockade explain {name} --policy` has the lines for the spec")
    return lines


def _facts(proposal: Proposal) -> list[str]:
    found = [
        f"System calls: {proposal.used} are used, {proposal.unused} that `{proposal.preset}` allows are not.",
        f"Capabilities: {', '.join(proposal.capabilities) or 'none'}.",
    ]
    found += [
        f"Without `{missed.capability}` nothing failed, but these were refused: {', '.join(missed.calls)}."
        for missed in proposal.missed
    ]
    found += [f"Refused, though nothing failed: {what}." for what in proposal.refused]
    found += [f"Devices beside the usual ones: {', '.join(proposal.devices)}."] if proposal.devices else []
    found += [
        f"Written: {path}, {'kept' if kind == 'volume' else 'empty at each start'} ({kind})."
        for path, kind in proposal.written.items()
    ]
    found += [f"Listens on: {', '.join(proposal.ports)}."] if proposal.ports else []
    return found
