"""Run a command in a running jail, behind the walls that its service has."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from stockade.errors import StateError
from stockade.kernel import cgroups
from stockade.kernel.pidfd import pidfd_open

from . import runfiles, wire
from .descent import inside
from .jail import Running
from .registry import RunningJail, find
from .starting import Streams, command_records, open_standard, start, terminal_record

__all__ = ["enter"]


def enter(
    name: str,
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
    terminal: bool = False,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    directory: str | None = None,
    gate: bool = False,
    plan: Path | None = None,
) -> Running:
    """Start `argv` in the namespaces of the running jail `name`; arguments and errors as `launch`'s.

    Ids, capabilities, no_new_privs, Landlock, filter and limits are those of the jail's plan, or of the one in `plan`
    that it was launched with. StateError between two lives of the jail.
    """
    jail = find(name)
    if not jail.init_pid:
        raise StateError(
            f"the service of jail `{name}` has ended and waits for its restart",
            hint=f"`stockade logs {name}` says why it ended; `stockade run {name} -- COMMAND` needs no running service",
        )
    open_standard()
    target = _member(jail)
    try:
        fragment = [
            wire.record(wire.ENTER, target),
            *([wire.text(wire.INSTANCE, jail.number)] if jail.number else []),
            *command_records(Path(jail.generation), argv, environment, user, directory),
        ]
        if terminal:
            fragment.append(terminal_record())
        return start(
            jail.instance, os.fspath(plan) if plan is not None else f"{jail.generation}/plan", fragment,
            streams=Streams(stdin, stdout, stderr), inherit=(target,), gate=gate, detach=False,
            wrapper=cgroups.entrance(jail.cgroups[0]) if jail.cgroups else (),
        )  # fmt: skip
    finally:
        os.close(target)


def _member(jail: RunningJail) -> int:
    """A pidfd of a process of the jail whose namespaces the caller may join.

    Root may join PID 1's. An ordinary user has no rights over it: it is not dumpable and its memory belongs to the
    host's user namespace; the service and what it started were executed in the jail's own.
    """
    init = jail.init_pid
    members = (init,) if os.geteuid() == 0 else chain((jail.pid,) if jail.pid else (), _descendants(init))
    for pid in members:
        try:
            descriptor = pidfd_open(pid)
        except ProcessLookupError:
            continue
        if inside(pid, init):
            return descriptor
        os.close(descriptor)
    raise runfiles.not_running(jail.instance)


def _descendants(pid: int) -> Iterator[int]:
    """Children of `pid` and theirs, nearest first. A jail decides how many there are, and how deep."""
    parents = deque([pid])
    while parents:
        parent = parents.popleft()
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in map(int, children):
            yield child
            parents.append(child)
