"""The verbs of `guest` for a break-in and for changes: freeze, thaw, evidence, changes, restore, clone, trial …"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from stockade import machines, places
from stockade.cli import console
from stockade.cli.parser import Subparsers, add_verb
from stockade.errors import StateError, UsageError
from stockade.records.guest import Change, GuestFinding, TrialReport
from stockade.records.machine import ChangesReport, EvidenceReport, GuestAuditReport, TrialsReport
from stockade.vm import audit as auditing
from stockade.vm import changes as comparing
from stockade.vm import control, images, incident, snapshots, sparse, store, whole
from stockade.vm.trial import trial as try_out

__all__ = ["register"]

_SHOWN = 40
_TABLES = ("tcp", "tcp6", "udp", "udp6")


def register(family: Subparsers) -> None:
    """Add the verbs to those of `guest`."""
    parser = add_verb(
        family, "freeze", freeze, help="stop a running guest in place, with its memory",
        description="Stop the guest where it is. Before that its kernel writes what it holds of the disk, so that the "
        "evidence has it; nothing in the guest is asked.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the guest")
    parser.add_argument("--no-sync", action="store_true", help="at once: the disk as it is, the rest in memory alone")
    parser = add_verb(family, "thaw", thaw, help="let a frozen guest go on")
    parser.add_argument("name", metavar="NAME", help="name of the guest")
    parser = add_verb(
        family, "evidence", evidence, json=True, help="write one archive of a guest: disk, memory, console, changes",
        description="Write one archive with the guest's disk, its memory, its console, Stockade's records, a manifest "
        "with SHA-256, and what differs from the clean image.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the guest")
    parser.add_argument("file", metavar="FILE", help="the archive to make, for example web.tar.zst")
    parser.add_argument("--no-memory", action="store_true", help="without the memory")
    parser = add_verb(family, "changes", changes, json=True, help="list what differs from the clean image")
    parser.add_argument("name", metavar="NAME", help="name of the guest")
    parser = add_verb(
        family, "restore", restore, help="have the service answer again, from a clean state",
        description="End the guest without asking anything in it, put its disk back to the newest snapshot that is "
        "marked as good (or the one that is named, or the image), and start it.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the guest")
    parser.add_argument("--clean", action="store_true", help="to the newest good snapshot, or the image without one")
    parser.add_argument("--snapshot", metavar="SNAPSHOT", default="", help="to this snapshot")
    parser = add_verb(
        family, "clone", clone, help="make copies of a guest, one for each who studies it",
        description="Make N guests NAME-1, NAME-2, … with the disk of NAME as it is now, or of a snapshot.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the guest")
    parser.add_argument("--count", metavar="N", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--network", choices=("none",), default="none", help="copies have no network")
    parser.add_argument("--snapshot", metavar="SNAPSHOT", default="", help="from this snapshot")
    parser.add_argument("--prefix", metavar="NAME", default="", help="what their names begin with (default: NAME)")
    parser.add_argument("--start", action="store_true", help="start them")
    _register_trials(family)


def _register_trials(family: Subparsers) -> None:
    parser = add_verb(
        family, "trial", trial, json=True, command="-- COMMAND ...",
        help="try a change on a throw-away clone, and say what it does",
        description="Run COMMAND as root in a clone of the guest, then the exercises, and list what changed. Ends with "
        "1 when anything failed.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the guest")
    parser.add_argument("--script", metavar="FILE", help="a shell script to run instead of COMMAND")
    parser.add_argument(
        "--exercise", metavar="COMMAND", action="append", default=[],
        help="a shell command here that must succeed, $PORT_80 is the clone's port 80; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--inside", metavar="COMMAND", action="append", default=[], help="a command in the clone that must succeed"
    )
    parser.add_argument("--network", choices=("none", "nat"), default="nat", help="the clone's network (default: nat)")
    parser.add_argument("--snapshot", metavar="SNAPSHOT", default="", help="start from this snapshot")
    parser.add_argument(
        "--commit", action="store_true", help="keep it when all passed; what was before becomes a snapshot"
    )
    parser = add_verb(
        family, "audit", audit, json=True, help="look a guest's system over, with the command that mends each finding",
        description="Look for services, accounts, programs and rights that nobody needs. Ends with 1 when something "
        "was found.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the guest")
    parser.add_argument(
        "--keep", metavar="SERVICE", action="append", default=[], help="a service or tool that is wanted"
    )
    parser.add_argument("--fix", action="store_true", help="try the remedies on a clone")
    parser.add_argument("--commit", action="store_true", help="with --fix: keep them when all passed")
    parser.add_argument(
        "--exercise", metavar="COMMAND", action="append", default=[], help="as with `guest trial`, after the remedies"
    )


def freeze(arguments: argparse.Namespace) -> None:
    """Stop a guest in place."""
    store.load(arguments.name)
    incident.freeze(arguments.name, sync=not arguments.no_sync)
    console.text(f"{arguments.name}: frozen")
    console.next_command(
        f"`stockade guest evidence {arguments.name} FILE`, then `stockade guest restore --clean {arguments.name}`"
    )


def thaw(arguments: argparse.Namespace) -> None:
    """Let a guest go on."""
    store.load(arguments.name)
    incident.thaw(arguments.name)
    console.text(f"{arguments.name}: goes on")


def evidence(arguments: argparse.Namespace) -> None:
    """Write the archive."""
    target = Path(arguments.file)
    if target.exists():
        raise StateError(f"`{target}` is there already", hint="evidence is never overwritten: name another file")
    manifest = incident.evidence(arguments.name, target, memory=not arguments.no_memory)
    digest = sparse.file_sha256(target)
    if arguments.json:
        console.json_report(EvidenceReport(archive=str(target), sha256=digest, manifest=manifest))
        return
    _show_changes(manifest.changes)
    for account in manifest.accounts:
        console.text(f"account `{account}` is new or different")
    if not manifest.compared:
        console.text("the disk cannot be read as a file system: nothing was compared")
    console.text(f"{digest}  {target}")
    console.next_command(f"`stockade guest restore --clean {arguments.name}`")


def _show_changes(found: Sequence[Change]) -> None:
    for change in sorted(found, key=lambda change: (not change.notes, change.path))[:_SHOWN]:
        console.text(f"{change.kind:8} {change.path}" + (f"  ({', '.join(change.notes)})" if change.notes else ""))
    if len(found) > _SHOWN:
        console.text(f"and {len(found) - _SHOWN} more: `--json` has them all")


def changes(arguments: argparse.Namespace) -> None:
    """List what differs from the clean image."""
    found = incident.changes_of(arguments.name)
    if arguments.json:
        console.json_report(ChangesReport(guest=arguments.name, changes=tuple(found)))
        return
    _show_changes(found)


def restore(arguments: argparse.Namespace) -> None:
    """Have the service answer again."""
    if arguments.clean == bool(arguments.snapshot):
        raise UsageError("to which state is not said", hint="`--clean`, or `--snapshot SNAPSHOT`")
    began = time.monotonic()
    name = arguments.name
    guest = store.load(name)
    machines.prepare(guest.walls, guest.kernel)
    to = arguments.snapshot
    if not to:
        with contextlib.suppress(StateError):
            to = (
                snapshots.latest_good(name)
                if any(snapshots.load(name, one).good for one in snapshots.names(name))
                else ""
            )
    incident.restore(name, to)
    machines.start_guest(name).close()
    state = f"snapshot `{to}`" if to else f"image `{guest.image}`"
    console.text(f"{name}: up again from {state} after {time.monotonic() - began:.2f} s")


def clone(arguments: argparse.Namespace) -> None:
    """Make copies."""
    if not 1 <= arguments.count <= 1000:
        raise UsageError(f"`--count {arguments.count}` is not between 1 and 1000", hint="one for each who studies it")
    for guest in incident.clones(arguments.name, arguments.count, snapshot=arguments.snapshot, prefix=arguments.prefix):
        if arguments.start:
            machines.start_guest(guest.name).close()
        console.text(guest.name)


def trial(arguments: argparse.Namespace) -> int:
    """Try a change."""
    if bool(arguments.command) == bool(arguments.script):
        raise UsageError("what to try is not said", hint="a command after `--`, or `--script FILE`")
    commands = [arguments.command]
    if arguments.script:
        commands = [["sh", "-euc", Path(arguments.script).read_text(encoding="utf-8", errors="surrogateescape")]]
    report = _try(arguments, commands, network=arguments.network, snapshot=arguments.snapshot)
    if arguments.json:
        console.json_report(TrialsReport(trial=report))
    else:
        _show_trial(report)
    return 0 if report.passed else 1


def _try(
    arguments: argparse.Namespace, commands: list[list[str]], *, network: str = "none", snapshot: str = ""
) -> TrialReport:
    guest = store.load(arguments.name)
    with console.Progress() as progress:
        machines.prepare(guest.walls, guest.kernel, progress.doing)
        return try_out(
            arguments.name, commands, exercises=arguments.exercise,
            inside=[shlex.split(text) for text in getattr(arguments, "inside", [])], commit=arguments.commit,
            network=network, snapshot=snapshot, say=progress.doing,
        )  # fmt: skip


def _show_trial(report: TrialReport) -> None:
    for step in (*report.steps, *report.exercises):
        mark = "passed" if step.status == 0 else f"FAILED, status {step.status}"
        console.text(f"{mark}: {shlex.join(step.command)} ({step.seconds:.1f} s)")
        if step.status:
            for line in step.output.splitlines()[-10:]:
                console.text(f"  | {line}")
    for package in report.packages:
        console.text(f"package {package.package}: {package.before or 'new'} → {package.after or 'removed'}")
    _show_changes(report.changes)
    if report.committed:
        console.text(f"kept; `stockade snapshot list {report.guest}` has the state before")
    elif report.passed:
        console.next_command("the same with `--commit` keeps it")


def audit(arguments: argparse.Namespace) -> int:
    """Look a guest's system over."""
    guest = store.load(arguments.name)
    with whole.scratch(places.guest(guest.name), "audit") as scratch:
        copy = scratch / "disk.cow"
        with snapshots.held(guest):
            store.copy_disk(store.disk(guest.name), copy, 0, 0)
        with comparing.merged(copy, images.file(guest.image), scratch) as disk:
            found = auditing.audit(disk, keep=arguments.keep)
    found += _listening(guest.name, [port.target for port in guest.publish])
    if arguments.json and not arguments.fix:
        console.json_report(GuestAuditReport(guest=guest.name, findings=tuple(found)))
    elif not arguments.fix:
        _show_findings(found)
    else:
        commands = [["sh", "-c", finding.remedy] for finding in found if finding.remedy]
        if not commands:
            raise StateError("there is nothing that a command can mend", hint="without `--fix` the findings are shown")
        report = _try(arguments, commands)
        _show_trial(report)
        return 0 if report.passed else 1
    return 1 if found else 0


def _listening(name: str, published: Sequence[int]) -> list[GuestFinding]:
    """Open ports of a running guest."""
    if not control.is_running(name):
        return []
    tables = {}
    for table in _TABLES:
        status, text, _ = control.execute(name, ["@read", f"/proc/net/{table}"])
        if status == 0:
            tables[table] = text.decode("ascii", "replace")
    return auditing.listening(tables, published)


def _show_findings(found: Sequence[GuestFinding]) -> None:
    for finding in found:
        console.text(f"{finding.severity:6} {finding.code}: {finding.seen}")
        if finding.remedy:
            console.text(f"       {finding.remedy}")
    console.text(f"{len(found)} {'finding' if len(found) == 1 else 'findings'}")
