"""What start, stop, ps, logs, exec and rm do for a jail with a machine among its walls: a guest of the jail's name."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from stockade import lifecycle, machines, places
from stockade.cli import console
from stockade.contain.starting import current
from stockade.errors import NotFoundError, StateError, UsageError
from stockade.records.guest import Guest
from stockade.records.publish import written
from stockade.records.report import Process
from stockade.records.spec import Spec
from stockade.vm import control, manage, store
from stockade.vm.start import stop as stop_guest

__all__ = [
    "execute", "followed", "guest_of", "is_running", "logs", "process", "refuse_running", "remove", "start", "stop",
    "walls_of",
]  # fmt: skip

_FOLLOW_S = 0.2


def walls_of(jail: str) -> tuple[str, ...]:
    """The walls of the jail as it was built; ("jail",) for one that was not."""
    try:
        spec = msgspec.json.decode((current(jail) / "spec.json").read_bytes(), type=Spec)
    except (FileNotFoundError, NotFoundError):
        return ("jail",)
    return spec.walls


def guest_of(jail: str) -> Guest | None:
    """The guest that stands for the jail: of its name, and made of it."""
    try:
        guest = store.load(jail)
    except NotFoundError:
        return None
    return guest if guest.jail == jail else None


def is_running(jail: str) -> bool:
    """Whether the jail's guest runs."""
    return guest_of(jail) is not None and control.is_running(jail)


def start(arguments: argparse.Namespace, walls: tuple[str, ...]) -> None:
    """Start the jail's guest, made where there is none, and wait until its service answers."""
    name = arguments.name
    manage.check_walls(walls)
    for option, given, instead in (
        ("--listen", arguments.listen, "`publish` in `[network]` of its spec opens a port of this host"),
        ("--ephemeral", arguments.ephemeral, f"`stockade run {name}` is a machine that is gone once it has ended"),
    ):
        if given:
            raise UsageError(f"`{option}` is not for a jail with a machine among its walls", hint=instead)
    if arguments.verify:
        lifecycle.refuse_tampered(current(name))
    guest = guest_of(name)
    if is_running(name):
        raise StateError(f"jail `{name}` is running", hint=f"`stockade stop {name}` ends it, `stockade ps` shows it")
    with console.Progress() as progress:
        if guest is None:
            guest = machines.guest_of_jail(name, walls, progress=progress.doing)
        elif (guest.generation, guest.walls) != (machines.generation_number(name), walls):
            raise StateError(
                f"the machine of `{name}` was made of generation {guest.generation}, with the walls "
                f"{','.join(guest.walls)}",
                hint=f"`stockade guest rm {name}` removes it with its disk, and the next start makes another; "
                f"`stockade guest start {name}` starts it as it is",
            )
        progress.doing(f"starting `{name}`")
        started = machines.start_guest(name, await_service=not arguments.no_wait, progress=progress.doing)
        pid = started.pid
        started.close()
    ports = ", ".join(f"{port.address}:{port.port}" for port in guest.publish)
    console.text(f"{name}: running behind {','.join(walls)}, pid {pid}{f', on {ports}' if ports else ''}")
    record = f"`stockade guest record {name}`, " if guest.record else ""
    console.next_command(f"{record}`stockade logs {name}`, `stockade ps`, `stockade stop {name}`")


def stop(name: str, timeout_s: float | None) -> int | None:
    """End the jail's guest, whose disk stays; its service's status. StateError when it does not run."""
    status: int | None = stop_guest(name, timeout_s=timeout_s).get("status")
    return status


def process(jail: str) -> Process | None:
    """The report of the jail's guest; None when it does not run."""
    guest = guest_of(jail)
    if guest is None:
        return None
    try:
        known = control.request(jail, "status")
    except StateError:
        return None
    return Process(
        name=jail, instance=jail, pid=known["pid"], service_pid=None, generation=guest.generation,
        uptime_s=round(known["since"], 3), processes=len(known["processes"]),
        state="frozen" if known["frozen"] else "running", memory=manage.held_memory(known["processes"]),
        ports=tuple(map(written, guest.publish)), walls=guest.walls,
    )  # fmt: skip


def logs(jail: str, *, older: bool) -> Iterator[bytes]:
    """What the console of the jail's guest has said, in pieces. NotFoundError when it was never started."""
    with _log(jail) as file:
        yield from _older(file) if older else ()
        yield from _rest(file)


def followed(jail: str, *, older: bool) -> Iterator[bytes]:
    """As `logs`, and what is added until the guest has ended. A note says where something was not read in time."""
    file = _log(jail)
    try:
        yield from _older(file) if older else ()
        going_on = True
        while going_on:
            going_on = control.is_running(jail)
            yield from _rest(file)
            if (fresh := _newer(file)) is not None:
                yield from _rest(file)  # what came before it was put aside
                if not _is(file, f"{file.name}.1"):
                    console.note_missed()
                    yield from _older(fresh)
                file.close()
                file = fresh
                yield from _rest(file)
            if going_on:
                time.sleep(_FOLLOW_S)
    finally:
        file.close()


def _log(jail: str) -> BinaryIO:
    with contextlib.suppress(FileNotFoundError):
        if guest_of(jail) is not None:
            return open(places.guest(jail) / "console.log", "rb")
    raise NotFoundError(f"jail `{jail}` has no log: it was never started", hint=f"`stockade start {jail}`")


def _rest(file: BinaryIO) -> Iterator[bytes]:
    """What was not read yet; no piece where there is nothing, as an empty one stands for the end."""
    if data := file.read():
        yield data


def _older(file: BinaryIO) -> Iterator[bytes]:
    """What was put aside before the log in `file`."""
    with contextlib.suppress(FileNotFoundError), open(f"{file.name}.1", "rb") as before:
        if not os.path.sameopenfile(before.fileno(), file.fileno()):
            yield from _rest(before)


def _newer(file: BinaryIO) -> BinaryIO | None:
    """The log that was begun when the one in `file` was put aside; None where it was not, or there is none yet."""
    try:
        return None if _is(file, file.name) else open(file.name, "rb")
    except FileNotFoundError:
        return None


def _is(file: BinaryIO, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def execute(name: str, walls: tuple[str, ...]) -> None:
    """Refuse: nothing outside can enter the service's jail in a machine, and the machine's root is not behind it."""
    if not is_running(name):
        raise StateError(f"jail `{name}` is not running", hint=f"`stockade start {name}` starts it")
    raise UsageError(
        f"`{name}` runs in a machine behind {','.join(walls)}: only the machine's root can be given a command there",
        hint=f"`stockade guest exec {name} -- COMMAND`",
    )


def refuse_running(jail: str) -> None:
    """StateError where the jail's guest runs."""
    if is_running(jail):
        raise StateError(f"jail `{jail}` is running", hint=f"`stockade stop {jail}` first")


def remove(jail: str) -> None:
    """Remove the jail's guest, if there is one, with disk and snapshots."""
    if guest_of(jail) is not None:
        store.remove(jail)
