"""Start jails from their compiled plans. Reads the plan's generation; chooses nothing that the plan has chosen."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from struct import pack

from stockade import places
from stockade.errors import NotFoundError, StateError

from . import marker, runfiles, wire
from .filesystem import marked
from .identity import account
from .jail import Running
from .network import connection
from .spawn import spawn

__all__ = ["Streams", "alone", "current", "launch", "launch_generation"]

_LOG_BYTES = 8 << 20
_LOG_KEPT = 3
_EPHEMERAL_BYTES = 256 << 20


def current(name: str) -> Path:
    """Directory of the jail's current generation; NotFoundError where nothing was built."""
    runfiles.require_name(name)
    jail = os.fspath(places.jail(name))
    try:
        path = f"{jail}/{os.readlink(f'{jail}/current')}"
    except FileNotFoundError:
        path = jail
    if not os.path.isfile(f"{path}/plan"):
        raise NotFoundError(f"jail `{name}` has not been built", hint=f"`stockade build {name}` builds it")
    return Path(path)


def alone(name: str) -> Path:
    """As `current`; StateError where the spec has a machine among its walls, since a jail alone is less than that."""
    generation = current(name)
    if places.machine(generation).exists():
        raise StateError(
            f"`{name}` has a machine among its walls",
            hint=f"`stockade start {name}` starts it, `stockade run {name} -- COMMAND` runs a command in one",
        )
    return generation


def launch(
    name: str,
    *,
    argv: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
    terminal: bool = False,
    detach: bool = False,
    gate: bool = False,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    directory: str | None = None,
    ephemeral: bool = False,
    sockets: Sequence[int] = (),
    records: Sequence[bytes] = (),
) -> Running:
    """Start the jail `name` from its current generation, and return once its command is executed.

    `argv` (default: the service) with a given one the jail is another instance, NAME@NUMBER, beside the service's.
    `environment` is added to the plan's; `user` is a name in the jail; `directory` the working directory.
    `terminal`: a pty of the jail's own, relayed to this process's standard streams. `detach`: in the background,
    output to the jail's log, until `stop`; else the jail ends with this process. `gate`: stop right before the exec
    until `Running.release`. `stdin`, `stdout`, `stderr`: descriptors, `subprocess.PIPE` or `subprocess.DEVNULL`;
    default this process's own. `ephemeral`: what is written to volumes vanishes. `sockets`: listening descriptors,
    passed on as 3, 4, … with LISTEN_FDS (sd_listen_fds(3)) and NGINX, in place of those that the spec names.
    `records`: further records of the warden's plan.

    NotFoundError when nothing was built, StateError when it already runs and for a jail with a machine among its walls,
    WallError when a launch step failed.
    """
    return launch_generation(
        alone(name), name=name, argv=argv, environment=environment, user=user, terminal=terminal, detach=detach,
        gate=gate, stdin=stdin, stdout=stdout, stderr=stderr, directory=directory, ephemeral=ephemeral, sockets=sockets,
        records=records,
    )  # fmt: skip


def launch_generation(
    generation: Path,
    *,
    name: str | None = None,
    argv: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
    terminal: bool = False,
    detach: bool = False,
    gate: bool = False,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    directory: str | None = None,
    ephemeral: bool = False,
    sockets: Sequence[int] = (),
    records: Sequence[bytes] = (),
    plan: bytes | None = None,
    at_gate: int = 0,
) -> Running:
    """`launch` for any generation, current, committed or neither. `name` is the instance (default: the jail's).

    `plan` replaces the generation's own compiled plan. `at_gate`: how many sockets `Running.release` brings, in place
    of `sockets`.
    """
    jail = name or generation.parent.parent.name
    number = _serial()
    instance = jail if argv is None or "@" in jail or detach else f"{jail}@{number}"
    fragment = [
        wire.text(wire.BASE, os.fspath(generation)),
        wire.text(wire.INSTANCE, number),
        *command_records(generation, argv, environment, user, directory),
        *records,
    ]
    if ephemeral:
        fragment.append(wire.record(wire.EPHEMERAL, _EPHEMERAL_BYTES))
    if terminal:
        fragment.append(terminal_record())
    open_standard()
    if plan is None and (os.path.exists(places.due(generation)) or marked(generation.parent.parent / "volumes")):
        from .resizing import catch_up

        catch_up(generation, jail)
    with contextlib.ExitStack() as stack:
        held = _hold(generation, jail)
        stack.callback(os.close, held)
        if plan is None and not os.path.isfile(f"{generation}/plan"):
            raise NotFoundError(f"`{generation}` holds no launch plan", hint=f"`stockade build {jail}` makes it")
        fragment.append(wire.record(wire.KEEP, held))
        state = runfiles.claim(instance)
        stack.push(lambda kind, error, trace: _unclaim(instance, state, interrupted=kind is not None))
        outside = stack.enter_context(connection(generation, publish=argv is None, listen=argv is None and not sockets))
        given = tuple(sockets) or tuple(outside.listening)
        marker.refuse_too_many(given=len(given), published=outside.published)
        fragment += [*outside.records, *_sockets(given, at_gate)]
        os.write(state, os.fsencode(f"generation {generation}\nstarted {time.time():.3f}\n"))
        fragment.append(wire.record(wire.STATE, state))
        if detach:
            fragment += [wire.record(wire.DETACH), log_record(jail)]
            stdin = subprocess.DEVNULL if stdin is None else stdin
        else:
            place = os.fspath(runfiles.directory(instance))
            fragment += [wire.text(wire.REMOVE, path) for path in (place, f"{place}/state")]
            fragment.append(wire.record(wire.LIFELINE))
        wrapper = _wrapper(generation, number)
        return start(
            instance, plan if plan is not None else os.fspath(generation / "plan"), fragment,
            streams=Streams(stdin, stdout, stderr), inherit=(held, state, *given, *outside.inherit), gate=gate,
            gate_brings=at_gate > 0, detach=detach, wrapper=wrapper,
        )  # fmt: skip


def open_standard() -> None:
    """Give a caller without standard streams /dev/null, or a descriptor of the launch would be taken for one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class Streams:
    """Standard streams as subprocess takes them, opened for one launch."""

    def __init__(self, *wanted: int | None) -> None:
        self.given: list[int] = []
        self.ours: list[FileIO | None] = []
        self._opened: list[int] = []
        try:
            for number, value in enumerate(wanted):
                self._add(number, value)
        except OSError:
            self.close(ours=True)
            raise

    def _add(self, number: int, value: int | None) -> None:
        mine = None
        if value is None:
            given = number
        elif value == subprocess.DEVNULL:
            given = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            self._opened.append(given)
        elif value == subprocess.STDOUT:
            given = self.given[1]
        elif value == subprocess.PIPE:
            reader, writer = os.pipe()
            given, kept = (reader, writer) if number == 0 else (writer, reader)
            mine = FileIO(kept, "w" if number == 0 else "r")
            self._opened.append(given)
        else:
            given = value
        self.given.append(given)
        self.ours.append(mine)

    def close(self, *, ours: bool = False) -> None:
        """Close what the warden has now; with `ours` the other ends as well."""
        for descriptor in self._opened:
            os.close(descriptor)
        self._opened = []
        for file in self.ours if ours else ():
            if file is not None:
                file.close()


def start(
    instance: str, plan: str | bytes, fragment: list[bytes], *, streams: Streams, inherit: tuple[int, ...], gate: bool,
    detach: bool, gate_brings: bool = False, wrapper: Sequence[str] = (),
) -> Running:  # fmt: skip
    """Start the warden and wait for its first word: executed, gated, or a WallError.

    `gate_brings`: the gate is one that descriptors come through.
    """
    theirs: list[int] = []
    mine: list[int] = []

    def pipe(op: int, *, reader_is_theirs: bool) -> int:
        reader, writer = os.pipe()
        their, my = (reader, writer) if reader_is_theirs else (writer, reader)
        theirs.append(their)
        mine.append(my)
        fragment.append(wire.record(op, their))
        return my

    def channel() -> int:
        import socket

        my, their = (end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        theirs.append(their)
        mine.append(my)
        fragment.append(wire.record(wire.GATE, their, 1))
        return my

    try:
        status = pipe(wire.STATUS, reader_is_theirs=False)
        leash = None if detach else pipe(wire.LEASH, reader_is_theirs=True)
        opener = None
        if gate and gate_brings:
            opener = channel()
        elif gate:
            opener = pipe(wire.GATE, reader_is_theirs=True)
        given = (streams.given[0], streams.given[1], streams.given[2])
        warden = spawn(plan, fragment, streams=given, inherit=(*inherit, *theirs), wrapper=wrapper)
    except BaseException:
        streams.close(ours=True)
        for descriptor in mine:
            os.close(descriptor)
        raise
    finally:
        streams.close()
        for descriptor in theirs:
            os.close(descriptor)
    jail = Running(
        instance, warden, status=status, leash=leash, gate=opener, detached=detach,
        pipes=(streams.ours[0], streams.ours[1], streams.ours[2]),
    )  # fmt: skip
    jail.started()
    return jail


def _hold(generation: Path, jail: str) -> int:
    """A descriptor that keeps the generation from being removed as long as any copy of it is open (flock(2)).

    Of a file, since PID 1 of a detached jail has a copy, and no directory of the host may be in reach of a jail.
    """
    try:
        descriptor = os.open(places.use(generation), os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise NotFoundError(f"`{generation}` is not there", hint=f"`stockade build {jail}` makes it") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        hint = f"`stockade status {jail}` shows what there is"
        raise StateError(f"`{generation}` is being removed, or a volume gets another size", hint=hint) from None
    return descriptor


def _unclaim(instance: str, state: int, *, interrupted: bool) -> None:
    """Let go of the state file, which the supervisor has now; where there is none, nobody else would remove it."""
    os.close(state)
    if interrupted:
        runfiles.release(instance)


def _wrapper(generation: Path, instance: str) -> tuple[str, ...]:
    """The command under which this generation has to be launched, () for most."""
    try:
        words = (generation / "wrapper").read_bytes()
    except FileNotFoundError:
        return ()
    return tuple(os.fsdecode(word).replace("{instance}", instance) for word in words.split(b"\0"))


def command_records(
    generation: Path, argv: Sequence[str] | None, environment: Mapping[str, str] | None, user: str | None,
    directory: str | None,
) -> list[bytes]:  # fmt: skip
    """Records for what differs from the service: see `launch`."""
    records: list[bytes] = []
    if argv is not None:
        if not argv:
            raise StateError("no command was given", hint="name one after `--`")
        records.append(wire.text(wire.ARGV, *argv))
    if user is not None:
        who = account(generation / "rootfs", user)
        records.append(wire.record(wire.IDS, who.uid, who.gid))
        records.append(wire.record(wire.GROUPS, payload=pack(f"={len(who.groups)}I", *who.groups)))
        records += [wire.text(wire.ENV, f"{key}={value}") for key, value in who.variables().items()]
    records += [wire.text(wire.ENV, f"{key}={value}") for key, value in (environment or {}).items()]
    if directory is not None:
        records.append(wire.text(wire.DIRECTORY, directory))
    return records


def _sockets(sockets: Sequence[int], at_gate: int) -> list[bytes]:
    """Records that give the service these sockets, or tell it of those that come through its gate.

    It is told as sd_listen_fds(3) and as nginx read it.
    """
    if not (sockets or at_gate):
        return []
    from stockade.records.publish import FIRST_GIVEN, variables

    passed = [wire.record(wire.PASS, given, FIRST_GIVEN + number) for number, given in enumerate(sockets)]
    protocol = variables(len(sockets) + at_gate).items()
    told = [wire.text(wire.ENV, f"{key}={value}") for key, value in protocol]
    return [*passed, *told, wire.text(wire.ENV, "LISTEN_PID=", numbers=(1,))]  # the warden adds the pid


def terminal_record() -> bytes:
    """A pty of the size of this process's terminal, 24 by 80 without one."""
    try:
        columns, rows = os.get_terminal_size(0)
    except OSError:
        columns, rows = 80, 24
    return wire.record(wire.TERMINAL, rows, columns)


def log_path(name: str) -> Path:
    """The log of the jail `name`; older ones have `.1`, `.2`… behind."""
    return places.jail(name) / "log"


def log_record(name: str) -> bytes:
    """The service's output goes to the jail's log, rotated by size."""
    return wire.text(wire.LOG, os.fspath(log_path(name.partition("@")[0])), numbers=(_LOG_BYTES, _LOG_KEPT))


_launches = itertools.count(1)  # one next() is whole: threads share it


def _serial() -> str:
    """A number for a further instance: no other process has the pid, no other launch of this one the nine digits."""
    return f"{os.getpid()}{next(_launches) % 10**9:09}"
