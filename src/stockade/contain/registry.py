"""Jails that run now, whoever started them: list, find, stop, logs."""

from __future__ import annotations

import contextlib
import os
import select
import signal as signals
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stockade import places
from stockade.errors import NotFoundError, StateError
from stockade.records.spec import Spec

from . import runfiles
from .jail import FORWARDED
from .starting import log_path

__all__ = ["RunningJail", "find", "last_status", "logs", "running", "stop"]

_KILL_SECONDS = 10.0


class RunningJail(msgspec.Struct, frozen=True, kw_only=True):
    """A running jail. `started` is seconds since the epoch; `supervisor_pid` is 0 when the supervisor was killed."""

    name: str
    instance: str
    generation: str
    pid: int
    init_pid: int
    supervisor_pid: int
    started: float

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return max(0.0, time.time() - self.started)

    def processes(self) -> tuple[int, ...]:
        """Pids of the jail's processes as the caller sees them, PID 1 first: those in its pid namespace."""
        return tuple(_processes(self.init_pid))


def running() -> tuple[RunningJail, ...]:
    """All running jails of the caller, by instance. What ended without a trace left is swept."""
    found = []
    for instance in runfiles.instances():
        state = runfiles.read(instance)
        if state is None:
            continue
        if runfiles.is_alive(state.init):
            found.append(_jail(instance, state))
        elif state.status is None and "@" in instance:
            _clean(instance, state)
    return tuple(found)


def find(name: str) -> RunningJail:
    """The running jail `name`: the service's own instance, else the only other one. NotFoundError when none runs."""
    state = runfiles.read(name)
    if state is not None and runfiles.is_alive(state.init):
        return _jail(name, state)
    others = [jail for jail in running() if jail.name == name]
    if len(others) == 1:
        return others[0]
    if others:
        raise StateError(
            f"{len(others)} commands run in jail `{name}`",
            hint="name one of them: " + ", ".join(f"`{jail.instance}`" for jail in others),
        )
    raise runfiles.not_running(name)


def stop(name: str, *, signal: int | None = None, timeout_s: float | None = None) -> int | None:
    """End the running jail `name` and remove what it leaves; the service's exit status where it is known.

    `signal` and `timeout_s` (default: the spec's) give the service its time; then PID 1 is killed and everything in
    the jail with it. NotFoundError when it does not run; what an ended one left is removed first.
    """
    try:
        jail = find(name)
    except NotFoundError:
        left = runfiles.read(name)
        if left is not None:
            _clean(name, left)
        raise
    state = runfiles.read(jail.instance)
    if state is None or state.init is None:
        raise runfiles.not_running(name)
    default_signal, default_timeout = _stopping(jail.generation)
    with contextlib.suppress(ProcessLookupError):
        init = os.pidfd_open(jail.init_pid)
        try:
            if runfiles.is_alive(state.init):
                number = default_signal if signal is None else signal
                _end(init, state, number, default_timeout if timeout_s is None else timeout_s)
        finally:
            os.close(init)
    _wait_for_supervisor(state)
    ended = runfiles.read(jail.instance)
    _clean(jail.instance, ended or state)
    return ended.status if ended is not None else None


def logs(name: str, *, older: bool = False) -> Iterator[bytes]:
    """The jail's log in pieces; with `older` the rotated ones first. NotFoundError when it never logged."""
    runfiles.directory(name)
    newest = log_path(name)
    rotated = sorted(newest.parent.glob("log.[0-9]*"), key=lambda path: -int(path.suffix[1:])) if older else []
    if not newest.exists() and not rotated:
        raise NotFoundError(
            f"jail `{name}` has no log", hint=f"a jail that `stockade start {name}` started writes one"
        )
    for path in (*rotated, newest):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            while piece := file.read(1 << 16):
                yield piece


def last_status(name: str) -> int | None:
    """Exit status of a detached jail that ended by itself and was not started since; None when there is none."""
    state = runfiles.read(name)
    return None if state is None or runfiles.is_alive(state.init) else state.status


def _jail(instance: str, state: runfiles.State) -> RunningJail:
    return RunningJail(
        name=instance.partition("@")[0], instance=instance, generation=state.generation, started=state.started,
        pid=state.service[0] if runfiles.is_alive(state.service) and state.service else 0,
        init_pid=state.init[0] if state.init else 0,
        supervisor_pid=state.supervisor[0] if runfiles.is_alive(state.supervisor) and state.supervisor else 0,
    )  # fmt: skip


def _stopping(generation: str) -> tuple[int, float]:
    """Signal and seconds as the spec of the running generation has them."""
    try:
        spec = msgspec.json.decode(Path(generation, "spec.json").read_bytes(), type=Spec)
    except (FileNotFoundError, msgspec.DecodeError):
        return signals.SIGTERM, 10.0
    return signals.Signals[spec.service.stop_signal], spec.service.stop_timeout_s


def _end(init: int, state: runfiles.State, number: int, timeout_s: float) -> None:
    if number in FORWARDED:
        signals.pidfd_send_signal(init, number)
    elif state.service is not None and runfiles.is_alive(state.service):
        os.kill(state.service[0], number)
    if not select.select([init], [], [], timeout_s)[0]:
        signals.pidfd_send_signal(init, signals.SIGKILL)
        if not select.select([init], [], [], _KILL_SECONDS)[0]:
            raise StateError(
                "the jail's PID 1 cannot be killed", hint="a process in it waits for the kernel: see `ps` for state D"
            )


def _wait_for_supervisor(state: runfiles.State) -> None:
    """It writes the last of the log and removes what the launch made."""
    if not runfiles.is_alive(state.supervisor) or state.supervisor is None:
        return
    with contextlib.suppress(ProcessLookupError):
        supervisor = os.pidfd_open(state.supervisor[0])
        try:
            if runfiles.is_alive(state.supervisor):
                select.select([supervisor], [], [], _KILL_SECONDS)
        finally:
            os.close(supervisor)


def _clean(instance: str, state: runfiles.State) -> None:
    """What a supervisor that was killed could not remove, then the runtime directory."""
    own = str(places.run())
    for path in reversed(state.remove):
        if path.startswith(f"{own}/"):
            continue
        with contextlib.suppress(OSError):
            os.rmdir(path)
    runfiles.release(instance)


def _processes(init: int) -> Iterator[int]:
    yield init
    for entry in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        if entry != init and _descends(entry, init):
            yield entry


def _descends(pid: int, init: int) -> bool:
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return False
        if pid == init:
            return True
    return False
