"""`stockade run --walls …,vm,…`: a jail's service as a guest in the foreground."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import msgspec

from stockade import machines
from stockade.cli import console
from stockade.cli.guests import published
from stockade.cli.images import byte_count
from stockade.cli.parser import Parser
from stockade.contain.starting import current
from stockade.errors import NotFoundError, UsageError
from stockade.records.spec import Spec
from stockade.vm import control, manage
from stockade.vm.start import Started

__all__ = ["add_options", "run", "walls_of"]

_READ = 65536


def add_options(parser: Parser) -> None:
    """What `run` takes for walls with a machine among them."""
    parser.add_argument("--walls", metavar="WALLS", help="jail, vm, jail,vm or jail,vm,jail (default: the spec's)")
    parser.add_argument(
        "--publish", metavar="[ADDRESS:]PORT:PORT[/PROTOCOL]", action="append", default=[], type=published,
        help="with vm: a port here that leads to one of the service (default: the spec's); may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="SIZE", type=byte_count, default=128 << 20, help="with vm: its memory (default: 128M)"
    )


def walls_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The walls that are asked for; those of the spec as it was built where none are."""
    if arguments.walls:
        return tuple(arguments.walls.split(","))
    try:
        spec = msgspec.json.decode((current(arguments.name) / "spec.json").read_bytes(), type=Spec)
    except (FileNotFoundError, NotFoundError):
        return ("jail",)
    return spec.walls


def run(arguments: argparse.Namespace, walls: Sequence[str]) -> int:
    """Run the service as a guest that is gone once it has ended, its console on standard output; returns its status."""
    manage.check_walls(walls)
    if arguments.command:
        raise UsageError(
            "a machine runs the jail's service, no other command",
            hint=f"`stockade guest create NAME --jail {arguments.name}`, then `stockade guest exec NAME -- COMMAND`",
        )
    with console.Progress() as progress:
        started = machines.start_jail(
            arguments.name, walls, memory=arguments.memory, publish=arguments.publish or None, progress=progress.doing
        )
    before = {
        number: signal.signal(number, lambda number, _: _pass_on(started)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with control.connect(started.name) as connection:
            control.ask(connection, "console")
            connection.settimeout(None)
            while data := connection.recv(_READ):
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
        status = started.wait()
        return 125 if status is None else status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        machines.discard(started.name)


def _pass_on(started: Started) -> None:
    """The keeper has the guest's PID 1 told to end it, as `guest stop` does."""
    os.kill(started.keeper_pid, signal.SIGTERM)
