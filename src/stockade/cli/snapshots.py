"""The verbs about snapshots: snapshot create, list, restore, clone, export, import, rm."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from stockade import machines
from stockade.cli import console
from stockade.cli.families import add_family
from stockade.cli.parser import Parser, Subparsers, add_verb
from stockade.records.machine import SnapshotReport, SnapshotsReport
from stockade.vm import control, snapshots
from stockade.vm.start import stop

__all__ = ["register", "restore_to"]


def register(subparsers: Subparsers) -> None:
    """Add the verbs to the parser."""
    family = add_family(subparsers, "snapshot", help="keep the state of a guest's disk, and go back to it")
    parser = add_verb(
        family, "create", create, json=True, help="keep a guest's disk as it is now",
        description="Keep the guest's disk as it is now. A running guest is synced and stands still meanwhile.",
    )  # fmt: skip
    _names(parser)
    parser.add_argument("--good", action="store_true", help="a state to go back to after a break-in")
    parser = add_verb(family, "list", list_snapshots, json=True, help="list a guest's snapshots")
    parser.add_argument("guest", metavar="GUEST", help="name of the guest")
    parser = add_verb(family, "restore", restore, help="put a guest's disk back to a snapshot")
    _names(parser)
    parser.add_argument(
        "--stop", action="store_true", help="end the guest first, without its own doing, and start it again"
    )
    parser = add_verb(family, "clone", clone, help="make another guest from a snapshot")
    _names(parser)
    parser.add_argument("new", metavar="NEW", help="name of the guest to make")
    parser = add_verb(
        family, "export", export, help="write a snapshot to a file",
        description="Write the snapshot to FILE, without the image that it belongs to, and print the file's SHA-256.",
    )  # fmt: skip
    _names(parser)
    parser.add_argument("file", metavar="FILE", help="the file to make, for example web.tar.zst")
    parser = add_verb(family, "import", import_snapshot, help="take in a snapshot from a file")
    parser.add_argument("file", metavar="FILE", help="what `snapshot export` wrote")
    parser.add_argument("guest", metavar="GUEST", help="name of the guest; made where there is none")
    parser.add_argument("--name", metavar="SNAPSHOT", default="", help="name of the snapshot (default: the one it had)")
    parser = add_verb(family, "rm", remove, help="remove a snapshot")
    _names(parser)


def _names(parser: Parser) -> None:
    parser.add_argument("guest", metavar="GUEST", help="name of the guest")
    parser.add_argument("name", metavar="SNAPSHOT", help="name of the snapshot")


def create(arguments: argparse.Namespace) -> None:
    """Keep a guest's disk."""
    began = time.monotonic()
    snapshot = snapshots.create(arguments.guest, arguments.name, good=arguments.good)
    seconds = time.monotonic() - began
    if arguments.json:
        console.json_report(SnapshotReport(snapshot=snapshot, seconds=seconds))
        return
    console.text(
        f"{arguments.guest} {snapshot.name}: {console.size(snapshot.bytes)} after {seconds:.2f} s, {snapshot.state}"
    )
    console.next_command(f"`stockade snapshot restore {arguments.guest} {snapshot.name} --stop`")


def list_snapshots(arguments: argparse.Namespace) -> None:
    """List a guest's snapshots."""
    found = tuple(snapshots.load(arguments.guest, name) for name in snapshots.names(arguments.guest))
    if arguments.json:
        console.json_report(SnapshotsReport(guest=arguments.guest, snapshots=found))
        return
    console.rows(
        (
            (one.name, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.created)), one.state,
             "good" if one.good else "-", console.size(one.bytes), one.digest[:16])
            for one in found
        ),
        heading=("NAME", "TAKEN", "GUEST WAS", "MARK", "SIZE", "DIGEST"),
    )  # fmt: skip


def restore(arguments: argparse.Namespace) -> None:
    """Put a guest's disk back."""
    began = time.monotonic()
    snapshots.load(arguments.guest, arguments.name)
    if arguments.stop:
        restore_to(arguments.guest, arguments.name)
    else:
        snapshots.restore(arguments.guest, arguments.name)
    console.text(f"{arguments.guest}: as in snapshot `{arguments.name}` after {time.monotonic() - began:.2f} s")


def restore_to(guest: str, snapshot: str) -> None:
    """End the guest without asking anything in it, put its disk back, and start it again if it ran."""
    ran = control.is_running(guest)
    if ran:
        stop(guest, timeout_s=0.0, kill=True)
    snapshots.restore(guest, snapshot)
    if ran:
        machines.start_guest(guest).close()


def clone(arguments: argparse.Namespace) -> None:
    """Make another guest."""
    guest = snapshots.clone(arguments.guest, arguments.new, snapshot=arguments.name)
    console.text(f"{guest.name}: from snapshot `{arguments.name}` of `{arguments.guest}`, without a network")
    console.next_command(f"`stockade guest start {guest.name}`")


def export(arguments: argparse.Namespace) -> None:
    """Write a snapshot to a file."""
    console.text(f"{snapshots.export(arguments.guest, arguments.name, Path(arguments.file))}  {arguments.file}")


def import_snapshot(arguments: argparse.Namespace) -> None:
    """Take in a snapshot."""
    snapshot = snapshots.import_(Path(arguments.file), arguments.guest, name=arguments.name)
    console.text(f"{snapshot.guest} {snapshot.name}: {console.size(snapshot.bytes)}")
    console.next_command(f"`stockade snapshot restore {snapshot.guest} {snapshot.name}`")


def remove(arguments: argparse.Namespace) -> None:
    """Remove a snapshot."""
    snapshots.remove(arguments.guest, arguments.name)
    console.note(f"{arguments.guest} {arguments.name}: removed")
