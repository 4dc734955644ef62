"""What start, stop and ps do: the life of jails that run in the background."""

from __future__ import annotations

import argparse

from stockade import contain, lifecycle
from stockade.cli import console, jails, machinelife, names
from stockade.cli.parser import Parser
from stockade.errors import UsageError
from stockade.records.report import PsReport

__all__ = ["add_ps_options", "add_start_options", "add_stop_options", "ps", "start", "stop"]


def add_start_options(parser: Parser) -> None:
    """Options of `stockade start`."""
    parser.add_argument("name", metavar="NAME", help="name of the jail")
    parser.add_argument("--no-wait", action="store_true", help="return at once, not when the service is ready")
    parser.add_argument("--ephemeral", action="store_true", help="what is written to volumes vanishes")
    parser.add_argument(
        "--verify", action="store_true", help="refuse to start where a file is not as it was built"
    )  # fmt: skip
    parser.add_argument(
        "--listen", metavar="[ADDRESS:]PORT", action="append", default=[],
        help="open this socket and give it to the service (LISTEN_FDS, NGINX); may be given more than once",
    )  # fmt: skip


def start(arguments: argparse.Namespace) -> None:
    """Start in the background and wait until the service is ready."""
    name = arguments.name
    generation = names.built(name)
    walls = machinelife.walls_of(name)
    if "vm" in walls:
        machinelife.start(arguments, walls)
        return
    jail = lifecycle.start(
        name, wait=not arguments.no_wait, ephemeral=arguments.ephemeral, intact=arguments.verify,
        listen=arguments.listen, sockets=lifecycle.activation(),
    )  # fmt: skip
    console.text(f"{name}: running, pid {jail.init_pid}")
    for missing in contain.not_limited(generation.lock, contain.for_jail(name), asked=True):
        console.note(f"not limited: {missing.limit}: {missing.reason}; {missing.remedy}")
    console.next_command(f"`stockade logs {name}`, `stockade ps`, `stockade stop {name}`")


def add_stop_options(parser: Parser) -> None:
    """Options of `stockade stop`."""
    parser.add_argument("name", metavar="NAME", nargs="+", help=names.RUNNING)
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, help="kill what still runs then (default: the spec's)"
    )


def stop(arguments: argparse.Namespace) -> None:
    """End jails, each by its signal and then by force."""
    if arguments.timeout is not None and arguments.timeout < 0:
        raise UsageError("`--timeout` cannot be negative", hint="0 kills at once")
    for name in arguments.name:
        jail = names.jail_of(name)
        names.existing(jail)
        if name == jail and machinelife.is_running(jail):
            status = machinelife.stop(name, arguments.timeout)
        else:
            status = contain.stop(name, timeout_s=arguments.timeout)
        console.note(f"{name}: stopped{'' if status is None else f', status {status}'}")


def add_ps_options(parser: Parser) -> None:
    """Options of `stockade ps`."""
    parser.add_argument("--all", "-a", action="store_true", help="also jails that were started and ended by themselves")


def ps(arguments: argparse.Namespace) -> None:
    """List what runs, and with `--all` what ran."""
    machines = (machinelife.process(name) for name in names.known())
    found = (*(jails.process(jail) for jail in contain.running()), *(machine for machine in machines if machine))
    ended = tuple(jails.ended(jail) for jail in contain.ended()) if arguments.all else ()
    if arguments.json:
        console.json_report(PsReport(jails=found, ended=ended))
        return
    lines = [
        (
            jail.instance, str(jail.pid or "-"), str(jail.generation or "-"), jails.state(jail),
            str(jail.processes), console.size(jail.memory) if jail.memory is not None else "-",
            "-" if jail.cpu_s is None else f"{jail.cpu_s:.1f} s", str(jail.restarts), console.duration(jail.uptime_s),
            ", ".join(jail.ports),
        )
        for jail in found
    ]  # fmt: skip
    lines += [
        (
            jail.instance, "-", str(jail.generation or "-"),
            "failed" if jail.failed else "ended" if jail.status is None else f"ended, status {jail.status}",
            "-", "-", "-", str(jail.restarts), "-", "",
        )
        for jail in ended
    ]  # fmt: skip
    console.rows(
        lines,
        heading=("NAME", "PID", "GENERATION", "STATE", "PROCESSES", "MEMORY", "CPU", "RESTARTS", "UP", "PORTS"),
    )
