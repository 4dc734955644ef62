"""The verbs about guests: guest create, start, stop, list, exec, console, log, cp, rm, flatten, prepare."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import termios
import tty
from pathlib import Path

from stockade import machines, places
from stockade.cli import console, incidents, machinelife, snapshots
from stockade.cli.families import add_family
from stockade.cli.images import byte_count
from stockade.cli.joining import LEAVE, join
from stockade.cli.parser import Parser, Subparsers, add_verb
from stockade.errors import StateError, UsageError
from stockade.records.guest import Guest
from stockade.records.machine import GuestsReport
from stockade.records.publish import Published, parse
from stockade.records.text import escape
from stockade.vm import control, images, manage, record, store, transfer
from stockade.vm.start import stop as stop_guest

__all__ = ["published", "register", "relay"]

_READ = 65536


def register(subparsers: Subparsers) -> None:
    """Add the verbs to the parser."""
    family = add_family(subparsers, "guest", help="machines of their own: make, start, use and examine them")
    _register_making(family)
    _register_use(family)
    incidents.register(family)
    snapshots.register(subparsers)


def _register_making(family: Subparsers) -> None:
    parser = add_verb(
        family, "create", create,
        help="make a guest of an image or a jail",
        description="Make the guest NAME with a disk of its own, of an image, or of a jail with the ports that its "
        "spec publishes.",
    )  # fmt: skip
    _name(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image", metavar="IMAGE", help="of this image")
    source.add_argument("--jail", metavar="JAIL", help="of an image of this jail, made where it is missing")
    parser.add_argument(
        "--memory", metavar="SIZE", type=byte_count, default=128 << 20, help="its memory (default: 128M)"
    )
    parser.add_argument(
        "--walls", metavar="WALLS", help="vm, jail,vm or jail,vm,jail (default: those of the jail's spec, else jail,vm)"
    )
    parser.add_argument(
        "--network", choices=("none", "publish", "nat"),
        help="none, published ports alone, or egress too (default: publish where a port is published)",
    )  # fmt: skip
    parser.add_argument(
        "--publish", metavar="[ADDRESS:]PORT:PORT[/PROTOCOL]", action="append", default=[], type=published,
        help="a port here that leads to one of the guest; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--link", metavar="GUEST", action="append", default=[], help="a wire to this guest")
    parser.add_argument("--kernel", metavar="FILE", default="", help="a User-Mode Linux kernel (default: the newest)")
    parser.add_argument(
        "--record", action="store_true", help="keep what is executed and typed in it outside of it: see `guest record`"
    )
    parser.add_argument("--start", action="store_true", help="start it at once")

    parser = add_verb(family, "flatten", flatten, help="make an image of a guest's disk as it is now")
    _name(parser)
    parser.add_argument("image", metavar="IMAGE", help="name of the image to make")

    parser = add_verb(family, "rm", remove, help="remove guests with their disks and snapshots")
    parser.add_argument("name", metavar="NAME", nargs="+", help="name of the guest")
    parser.add_argument("--force", action="store_true", help="do not ask, and end those that run")

    parser = add_verb(family, "prepare", prepare, help="build the jail that stands around the kernel of guests")
    parser.add_argument("--kernel", metavar="FILE", default="", help="a User-Mode Linux kernel (default: the newest)")


def _register_use(family: Subparsers) -> None:
    parser = add_verb(
        family, "start", start, help="start guests",
        description="Start guests, and return once the service of each answers, where its image names a port.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", nargs="+", help="name of the guest")
    parser = add_verb(
        family, "stop", stop, help="end guests",
        description="Tell PID 1 of the guest to end it; when it has not after SECONDS halt its kernel, then end its "
        "processes.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", nargs="+", help="name of the guest")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float,
        help="how long its PID 1 has (default: what its image asks for, 20 at least)",
    )  # fmt: skip
    add_verb(family, "list", list_guests, json=True, help="list the guests with their memory and disk")
    parser = add_verb(
        family, "exec", execute, command="-- COMMAND ...",
        help="run a command in a guest, without a network",
        description="Run COMMAND in the guest as its root and pass its status on; 125 when that is not possible.",
    )  # fmt: skip
    _name(parser)
    parser.add_argument("--user", metavar="UID[:GID]", default="0", help="numbers of the guest (default: 0)")
    parser.add_argument("--directory", metavar="DIRECTORY", default="/", help="working directory")
    parser.add_argument("--no-terminal", action="store_true", help="no terminal, even on a terminal")
    parser = add_verb(
        family, "console", attach, help="watch a guest's console, and type on it",
        description="Join this terminal with the guest's console until Ctrl-] is typed or the guest ends.",
    )  # fmt: skip
    _name(parser)
    parser = add_verb(
        family, "log", log, help="print what a guest's console has said",
        description="Print what a guest's console has said, byte for byte; to a terminal control characters are "
        "written out.",
    )  # fmt: skip
    _name(parser)
    parser = add_verb(
        family, "record", show_record, help="print what was executed and typed in a guest that is recorded",
        description="Print what the kernel of a guest made with --record told: each program that was executed and what "
        "was typed on its terminals, as auditd writes it, for `ausearch -if`.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the guest, or path of a record that `stockade run` kept")
    parser.add_argument("--typed", action="store_true", help="only what was typed, as it was typed")
    parser = add_verb(
        family, "cp", copy, help="copy files into a guest or out of it",
        description="Copy a file or a directory; one of SOURCE and TARGET is GUEST:/PATH.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="a path here, or GUEST:/PATH")
    parser.add_argument("target", metavar="TARGET", help="a path here, or GUEST:/PATH")


def _name(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the guest")


def published(text: str) -> Published:
    """A published port of the command line."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def create(arguments: argparse.Namespace) -> None:
    """Make a guest."""
    walls = tuple(arguments.walls.split(",")) if arguments.walls else _usual_walls(arguments.jail)
    manage.check_walls(walls)
    with console.Progress() as progress:
        if arguments.jail:
            guest = machines.guest_of_jail(
                arguments.jail, walls, name=arguments.name, memory=arguments.memory, network=arguments.network,
                publish=arguments.publish or None, record=arguments.record, progress=progress.doing,
            )  # fmt: skip
        else:
            ports = tuple(arguments.publish)
            guest = store.create(
                arguments.name, images.load(arguments.image), memory=arguments.memory, walls=walls,
                network=arguments.network or ("publish" if ports else "none"), publish=ports,
                kernel=arguments.kernel and os.path.realpath(arguments.kernel), record=arguments.record,
            )  # fmt: skip
        for peer in arguments.link:
            manage.link(guest.name, peer)
        console.text(f"{guest.name}: made of image `{guest.image}`, walls {','.join(guest.walls)}")
        if arguments.start:
            _start(guest.name, progress)
            return
    console.next_command(f"`stockade guest start {guest.name}`")


def _usual_walls(jail: str | None) -> tuple[str, ...]:
    own = machinelife.walls_of(jail) if jail else ()
    return own if "vm" in own else ("jail", "vm")


def _start(name: str, progress: console.Progress) -> None:
    progress.doing(f"starting `{name}`")
    started = machines.start_guest(name, progress=progress.doing)
    ports = ", ".join(f"{port.address}:{port.port}" for port in store.load(name).publish)
    progress.done(
        f"{name}: up after {started.seconds['ready']:.2f} s, pid {started.pid}" + (f", on {ports}" if ports else "")
    )
    started.close()


def start(arguments: argparse.Namespace) -> None:
    """Start guests."""
    with console.Progress() as progress:
        for name in arguments.name:
            _start(name, progress)
    console.next_command(
        f"`stockade guest exec {arguments.name[-1]} -- COMMAND`, `stockade guest stop {arguments.name[-1]}`"
    )


def stop(arguments: argparse.Namespace) -> None:
    """End guests."""
    if arguments.timeout is not None and arguments.timeout < 0:
        raise UsageError("`--timeout` cannot be negative", hint="0 halts the kernel at once")
    for name in arguments.name:
        store.load(name)
        last = stop_guest(name, timeout_s=arguments.timeout)
        status = "" if last.get("status") is None else f", its service with status {last['status']}"
        console.note(f"{name}: {last.get('cause', 'ended')}{status}")


def list_guests(arguments: argparse.Namespace) -> None:
    """List the guests. What a `run` or `boot` that was killed left is swept first."""
    machines.sweep()
    found = tuple(manage.state(name) for name in store.names())
    if arguments.json:
        console.json_report(GuestsReport(guests=found))
        return
    console.rows(
        (
            (
                one.name, f"{one.state}: {one.cause}" if one.fault and one.cause else one.state, one.image,
                ",".join(one.walls), one.network, console.size(one.memory),
                "-" if one.memory_used is None else console.size(one.memory_used), console.size(one.disk),
                str(one.snapshots), ", ".join(one.publish) or "-",
            )
            for one in found
        ),
        heading=("NAME", "STATE", "IMAGE", "WALLS", "NETWORK", "MEMORY", "HELD", "DISK", "SNAPSHOTS", "PORTS"),
    )  # fmt: skip
    for one in found:
        if one.fault:
            console.note(f"{one.name}: {one.fault}")


def execute(arguments: argparse.Namespace) -> int:
    """Run a command in a guest and pass its status on."""
    if not arguments.command:
        raise UsageError(
            "`stockade guest exec` needs a command",
            hint=f"put it after `--`: `stockade guest exec {arguments.name} -- ls /`",
        )
    store.load(arguments.name)
    uid, _, gid = arguments.user.partition(":")
    if not uid.isdecimal() or not (gid or uid).isdecimal():
        raise UsageError(
            f"`--user {arguments.user}` has no number", hint="the guest's accounts are its own: `--user 33:33`"
        )
    terminal = not arguments.no_terminal and sys.stdin.isatty() and sys.stdout.isatty()
    size = os.get_terminal_size(0) if terminal else None
    try:
        session = control.Session(
            arguments.name, arguments.command, directory=arguments.directory, uid=int(uid), gid=int(gid or uid),
            terminal=None if size is None else (size.lines, size.columns),
            environment={"TERM": os.environ.get("TERM", "dumb")} if terminal else {},
        )  # fmt: skip
    except StateError as error:
        error.exit_code = 125
        raise
    with session:
        return relay(session, terminal=terminal)


def relay(session: control.Session, *, terminal: bool) -> int:
    """Carry this process's standard streams to the session and back until it ends."""
    before = termios.tcgetattr(0) if terminal else None
    if terminal:
        tty.setraw(0)

        def resized(*_: object) -> None:
            size = os.get_terminal_size(0)
            session.resize(size.lines, size.columns)

        signal.signal(signal.SIGWINCH, resized)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: session.signal(number))
    reading = True
    try:
        while session.status is None:
            wanted = [session.fileno(), *([0] if reading and session.credit else [])]
            for ready in select.select(wanted, [], [])[0]:
                if ready == 0:
                    data = os.read(0, min(_READ, session.credit))
                    if data:
                        session.write(data)
                    else:
                        session.end_input()
                        reading = False
                    continue
                for stream, data in session.read(None):
                    console.write(data, error=stream == 2)
        return session.status
    finally:
        if before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, before)


def attach(arguments: argparse.Namespace) -> None:
    """Join this terminal with the guest's console."""
    store.load(arguments.name)
    with control.connect(arguments.name) as connection:
        control.ask(connection, "console")
        console.note(f"{LEAVE} leaves the console; the guest goes on")
        join(connection, keys=True)


def log(arguments: argparse.Namespace) -> None:
    """Print what the console has said."""
    store.load(arguments.name)
    for file in ("console.log.1", "console.log"):
        path = places.guest(arguments.name) / file
        if path.exists():
            console.copy([path.read_bytes()])


def show_record(arguments: argparse.Namespace) -> None:
    """Print what was recorded of a guest."""
    kept = "/" in arguments.name
    path = Path(arguments.name) if kept else places.guest(store.load(arguments.name).name) / record.NAME
    if not path.exists():
        raise StateError(
            f"nothing was recorded of guest `{arguments.name}`",
            hint="`stockade guest create --record`, or `record = true` in the spec of its jail, before its first start",
        )
    if arguments.typed:
        for program, data in record.typed(path):
            console.text(console.visible(f"{program}: {escape(data.decode('utf-8', 'surrogateescape'))}"))
        return
    console.copy([path.read_bytes()])


def copy(arguments: argparse.Namespace) -> None:
    """Copy files in or out."""
    (from_guest, source), (to_guest, target) = (_split(text) for text in (arguments.source, arguments.target))
    if bool(from_guest) == bool(to_guest):
        raise UsageError(
            "one of the two has to be a guest's, and one a path here", hint="`stockade guest cp web:/etc/hosts .`"
        )
    if from_guest:
        place = Path(target)
        if place.is_dir():
            place /= os.path.basename(source.rstrip("/")) or from_guest
        if os.path.lexists(place):
            raise StateError(f"`{place}` is there already", hint="name another target")
        count = transfer.pull(from_guest, source, place)
    else:
        count = transfer.push(to_guest, Path(source), target)
    console.note(f"{count} file{'' if count == 1 else 's'} copied")


def _split(text: str) -> tuple[str, str]:
    """Guest and path; "" for a path here, which may have a colon after a slash."""
    guest, colon, path = text.partition(":")
    if colon and "/" not in guest and path.startswith("/"):
        store.load(guest)
        return guest, path
    return "", text


def flatten(arguments: argparse.Namespace) -> None:
    """Make an image of a guest's disk."""
    image = manage.flatten(arguments.name, arguments.image)
    console.text(f"{image.name}: {console.size(image.size)}, sha256 {image.sha256}")
    console.next_command(f"`stockade guest create NAME --image {image.name}`")


def remove(arguments: argparse.Namespace) -> None:
    """Remove guests."""
    found: list[Guest] = [store.load(name) for name in arguments.name]
    for guest in found:
        console.confirm(f"remove guest `{guest.name}` with its disk and snapshots", force=arguments.force)
        if arguments.force:
            machines.discard(guest.name)
        else:
            store.remove(guest.name)
        console.note(f"{guest.name}: removed")


def prepare(arguments: argparse.Namespace) -> None:
    """Build the jail around UML."""
    with console.Progress() as progress:
        machines.prepare(("jail",), arguments.kernel, progress.doing)
    console.note("the jail around guests' kernels stands")
