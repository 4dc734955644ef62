"""The verb that needs no jail: contain."""

from __future__ import annotations

import argparse

from stockade import contained
from stockade.cli import running
from stockade.cli.parser import Subparsers, add_verb
from stockade.errors import UsageError
from stockade.records.policy import size_bytes
from stockade.records.spec import Limits, Policy, Syscalls

__all__ = ["register"]


def register(subparsers: Subparsers) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        subparsers, "contain", contain, command="-- COMMAND ...",
        help="run a command now behind the walls, without a jail",
        description="Run COMMAND behind a jail's walls over the host's own /usr, read-only. It sees a small /etc, a "
        "home, /tmp and /run of its own that vanish, and the paths that are named; it reaches no network unless told. "
        "It starts in the caller's working directory where that, or a named path below it, can be seen, else in its "
        "home. Run by root it becomes the owner of the first path that it may write, else nobody. The status is as "
        "with `stockade run`.",
    )  # fmt: skip
    parser.add_argument("--read", metavar="PATH", action="append", default=[], help="let it read PATH")
    parser.add_argument("--write", metavar="PATH", action="append", default=[], help="let it read and write PATH")
    parser.add_argument(
        "--network", choices=("none", "egress", "host"), default="none",
        help="egress: out, but not to the host itself (default: none)",
    )  # fmt: skip
    parser.add_argument("--memory", metavar="SIZE", help="limit of its memory, as in 256M")
    parser.add_argument("--processes", metavar="COUNT", type=int, help="limit of its processes and threads")
    parser.add_argument("--cpus", metavar="NUMBER", type=float, help="limit of its CPU time, in CPUs")
    parser.add_argument("--tmpfs", metavar="SIZE", help="size of each place that vanishes (default: 256M)")
    parser.add_argument(
        "--syscalls", choices=("strict", "default", "shell"), default="default",
        help="preset of system calls (default: default)",
    )  # fmt: skip
    running.add_run_options(parser)


def contain(arguments: argparse.Namespace) -> int:
    """Run the command and pass its status on."""
    if not arguments.command:
        raise UsageError("`stockade contain` needs a command", hint="put it after `--`: `stockade contain -- ls /`")
    environment = running.environment(arguments.env)
    for option in ("memory", "tmpfs"):
        value = getattr(arguments, option)
        try:
            sound = value is None or size_bytes(value) > 0
        except ValueError:
            sound = False
        if not sound:
            raise UsageError(f"`--{option} {value}` is no size", hint="write a number with K, M or G, such as `256M`")
    for option in ("processes", "cpus"):
        value = getattr(arguments, option)
        if value is not None and value <= 0:
            raise UsageError(f"`--{option} {value}` leaves nothing", hint="give a number above 0")
    options = contained.Options(
        read=tuple(arguments.read),
        write=tuple(arguments.write),
        network=arguments.network,
        limits=Limits(
            memory=arguments.memory, processes=arguments.processes, cpus=arguments.cpus, tmpfs=arguments.tmpfs
        ),
        policy=Policy(capabilities=(), syscalls=Syscalls(preset=arguments.syscalls)),
    )
    with running.own_failure():
        return running.wait(
            contained.start(
                arguments.command,
                options,
                environment=environment,
                directory=arguments.directory,
                terminal=running.terminal(arguments),
            )
        )
