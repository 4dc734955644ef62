"""`stockade run --walls …,vm,…`: a jail's service as a guest in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

from stockade import machines
from stockade.cli import console, machinelife
from stockade.cli.guests import published, relay
from stockade.cli.images import byte_count
from stockade.cli.parser import Parser
from stockade.errors import StateError, UsageError
from stockade.vm import control, manage
from stockade.vm.start import Started, stop

__all__ = ["add_options", "run", "walls_of"]

_READ = 65536
_END_S = 5.0


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
    """The walls that are asked for; those of the spec as it was built where none are.

    UsageError where the jail cannot have them: words that are no walls are not taken for the jail alone.
    """
    own = machinelife.walls_of(arguments.name)
    walls = tuple(arguments.walls.split(",")) if arguments.walls else own
    if "vm" in walls or walls == own or (walls == ("jail",) and own != ("chroot",)):
        return walls
    if own == ("chroot",):
        hint = "it was built for `chroot`: for others change `walls` in the spec, and build again"
    else:
        hint = "`jail`, `vm`, `jail,vm` or `jail,vm,jail`"
    raise UsageError(f"`{arguments.walls}` are no walls that can be tried", hint=hint)


def run(arguments: argparse.Namespace, walls: Sequence[str], environment: Mapping[str, str], *, terminal: bool) -> int:
    """Run the service, or a command in its place, as a guest that is gone once that has ended; returns its status.

    The service's output is the console's. What was recorded of the guest stays, and it is told where.
    """
    manage.check_walls(walls)
    if arguments.user:
        raise UsageError(
            "`--user` is not for walls with a machine among them: the command runs as the service does",
            hint=f"`stockade guest create NAME --jail {arguments.name} --start`, then `stockade guest exec NAME --user "
            "UID -- COMMAND`",
        )
    # Beside the service a command has no ports, as with a jail alone.
    publish = arguments.publish or (() if arguments.command else None)
    with console.Progress() as progress:
        started = machines.start_jail(
            arguments.name, walls, memory=arguments.memory, publish=publish,
            wait=bool(arguments.command), progress=progress.doing,
        )  # fmt: skip
    try:
        if not arguments.command:
            return _watch(started)
        with machines.command(
            started.name, arguments.command, environment=environment, directory=arguments.directory,
            terminal=os.get_terminal_size(0) if terminal else None,
        ) as session:  # fmt: skip
            return relay(session, terminal=terminal)
    finally:
        with contextlib.suppress(StateError):
            stop(started.name, timeout_s=_END_S)
        kept = machines.keep_record(started.name)
        machines.discard(started.name)
        if kept is not None:
            console.note(f"what was executed and typed is kept in `{kept}`; `ausearch -if` reads it")
            console.next_command(
                f"`stockade guest record {kept}`; `stockade start {arguments.name}` is a machine that stays"
            )


def _watch(started: Started) -> int:
    """Pass the console on until the guest has ended."""
    before = {
        number: signal.signal(number, lambda number, _: _pass_on(started)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        _show(started.name)
        status = started.wait()
        return 125 if status is None else status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(name: str) -> None:
    """Write what the guest's console says until its keeper ends, which lets go of whoever reads too slowly."""
    again = False
    while True:
        try:
            connection = control.connect(name)
        except StateError:
            return
        with connection:
            try:
                control.ask(connection, "console")
            except (StateError, ConnectionError):
                return
            if again:
                console.note("note: the service's output came faster than it was read: a part of it is left out here")
            connection.settimeout(None)
            while data := connection.recv(_READ):
                console.write(data)
        again = True


def _pass_on(started: Started) -> None:
    """The keeper has the guest's PID 1 told to end it, as `guest stop` does."""
    os.kill(started.keeper_pid, signal.SIGTERM)
