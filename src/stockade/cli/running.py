"""The verbs about running jails: run, start, stop, ps, logs, exec, shell."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from stockade import contain, lifecycle
from stockade.cli import behind, console, life, machinelife, names
from stockade.cli.parser import Parser, Subparsers, add_verb
from stockade.errors import NotFoundError, StockadeError, UsageError
from stockade.records.text import unescape

__all__ = ["add_run_options", "environment", "own_failure", "register", "terminal", "wait"]

OWN_FAILURE = 125  # as env(1), timeout(1) and chroot(1) report that they themselves failed
_SHELLS = ("/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_FOLLOW_MS = 200


def register(subparsers: Subparsers) -> None:
    """Add the verbs to the parser."""
    parser = add_verb(
        subparsers, "run", run, command="[-- COMMAND ...]",
        help="run a jail in the foreground",
        description="Run the jail's service, or COMMAND instead, in the foreground. The exit status is the command's, "
        "128 + n after signal n; 125 if the jail could not be started, 126 if the command cannot be executed, 127 if "
        "it is not in the jail.",
    )  # fmt: skip
    _add_command_options(parser, "name of the jail")
    parser.add_argument("--ephemeral", action="store_true", help="what is written to volumes vanishes")
    parser.add_argument("--verify", action="store_true", help="refuse to run where a file is not as it was built")
    behind.add_options(parser)

    life.add_start_options(
        add_verb(
            subparsers, "start", life.start,
            help="start a jail in the background",
            description="Start the jail's service in the background and return once it is ready, as `ready` in "
            "`[service]` says. A service that ends before, or is not ready in time, is stopped, and the end of its log "
            "shown. Sockets that a service manager hands over (LISTEN_FDS) go to the service. With a machine among the "
            "spec's walls it is a guest of the jail's name, whose disk stays from start to start.",
        )
    )  # fmt: skip
    life.add_stop_options(add_verb(subparsers, "stop", life.stop, help="end running jails"))
    life.add_ps_options(add_verb(subparsers, "ps", life.ps, json=True, help="list the jails that run"))

    parser = add_verb(
        subparsers, "logs", logs, help="print what a started jail has written",
        description="Print what a started jail has written, byte for byte; to a terminal control characters are "
        "written out.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the jail")
    parser.add_argument("--follow", "-f", action="store_true", help="go on as more is written, until it ends")
    parser.add_argument("--older", action="store_true", help="begin with the logs that were put aside")

    parser = add_verb(
        subparsers, "exec", execute, command="-- COMMAND ...",
        help="run a command in a running jail, behind the same walls",
        description="Run COMMAND in the running jail, behind the same walls. The status is as with `stockade run`.",
    )  # fmt: skip
    _add_command_options(parser, names.RUNNING)

    parser = add_verb(subparsers, "shell", shell, help="run a shell in a running jail that has one")
    _add_command_options(parser, names.RUNNING)


def _add_command_options(parser: Parser, name: str) -> None:
    parser.add_argument("name", metavar="NAME", help=name)
    parser.add_argument("--user", metavar="USER", help="an account of the jail (default: the service's)")
    add_run_options(parser)


def add_run_options(parser: Parser) -> None:
    """Options of every verb that runs a command in the foreground."""
    parser.add_argument("--directory", metavar="DIRECTORY", help="working directory in the jail")
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="a variable more; may be given more than once"
    )
    parser.add_argument("--no-terminal", action="store_true", help="no terminal of the jail's own, even on a terminal")


def run(arguments: argparse.Namespace) -> int:
    """Run in the foreground and pass the status on."""
    variables = environment(arguments.env)
    with own_failure():
        generation = names.built(arguments.name)
        if arguments.verify:
            lifecycle.refuse_tampered(generation.path)
        walls = behind.walls_of(arguments)
        if "vm" in walls:
            return behind.run(arguments, walls, variables, terminal=terminal(arguments))
        return wait(
            contain.launch_generation(
                generation.path,
                name=arguments.name,
                argv=arguments.command or None,
                environment=variables,
                user=arguments.user,
                terminal=terminal(arguments),
                directory=arguments.directory,
                ephemeral=arguments.ephemeral,
                sockets=() if arguments.command else lifecycle.activation(),
            )
        )


def execute(arguments: argparse.Namespace) -> int:
    """Run a command in a running jail and pass its status on."""
    if not arguments.command:
        raise UsageError(
            "`stockade exec` needs a command", hint=f"put it after `--`: `stockade exec {arguments.name} -- ls /`"
        )
    return _enter(arguments, arguments.command)


def shell(arguments: argparse.Namespace) -> int:
    """Run the first shell that the jail has."""
    entries = names.built(names.jail_of(arguments.name)).lock.entries
    paths = {unescape(entry.path) for entry in entries if entry.type != "directory"}
    found = [path for path in _SHELLS if path in paths]
    if not found:
        raise NotFoundError(
            f"there is no shell in jail `{arguments.name}`",
            hint='`programs = ["sh"]` in `[files]` of its spec takes one in; audit will report it',
        )
    return _enter(arguments, [found[0]])


def _enter(arguments: argparse.Namespace, command: list[str]) -> int:
    variables = environment(arguments.env)
    with own_failure():
        jail = names.jail_of(arguments.name)
        names.existing(jail)
        walls = machinelife.walls_of(jail)
        if "vm" in walls:
            machinelife.execute(jail, walls)
        return wait(
            contain.enter(
                arguments.name,
                command,
                environment=variables,
                user=arguments.user,
                terminal=terminal(arguments),
                directory=arguments.directory,
            )
        )


@contextmanager
def own_failure() -> Iterator[None]:
    """Errors of ours must not look like the command's statuses: they end with 125 (or 126, 127 for the exec)."""
    try:
        yield
    except StockadeError as error:
        if error.exit_code < OWN_FAILURE:
            error.exit_code = OWN_FAILURE
        raise


def environment(given: list[str]) -> dict[str, str]:
    for variable in given:
        if not variable.partition("=")[0] or "=" not in variable:
            raise UsageError(f"`--env {variable}` is no variable", hint="write `--env NAME=VALUE`")
    return dict(variable.split("=", 1) for variable in given)


def terminal(arguments: argparse.Namespace) -> bool:
    return not arguments.no_terminal and sys.stdin.isatty() and sys.stdout.isatty()


def wait(jail: contain.Running) -> int:
    """Pass signals on to the jail until it ends, and return its status."""

    def forward(number: int, _: object) -> None:
        with suppress(ProcessLookupError):  # it has just ended, and its status is still to be told
            os.kill(jail.init_pid or jail.pid, number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        status = jail.wait()
        if jail.memory_kills:
            console.note(
                f"note: the kernel killed {jail.memory_kills} of the jail's processes for want of memory "
                "(its limit, or the host's)"
            )
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        jail.close()


def logs(arguments: argparse.Namespace) -> None:
    """Write the log, byte for byte except to a terminal; with `--follow` what is added until the jail has ended."""
    name = arguments.name
    names.existing(name)
    if "vm" in machinelife.walls_of(name):
        read = machinelife.followed if arguments.follow else machinelife.logs
        console.copy(read(name, older=arguments.older))
        return
    with contain.Follower(name, older=arguments.older, missed=console.note_missed) as follower:
        console.copy(_followed(follower) if arguments.follow else follower.pieces())


def _followed(follower: contain.Follower) -> Iterator[bytes]:
    """What was written and what is added, until the jail has ended. BrokenPipeError once nobody reads it any more."""
    output = select.poll()
    output.register(sys.stdout, 0)  # only what is always told: that the reader is gone
    going_on = True
    while going_on:
        going_on = follower.is_written()
        yield from follower.pieces()
        if going_on and output.poll(_FOLLOW_MS):
            raise BrokenPipeError
