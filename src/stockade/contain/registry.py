"""Jails that run now, whoever started them: list, find, stop."""

from __future__ import annotations

import contextlib
import signal as signals
import time
from pathlib import Path
from typing import Literal

import msgspec

from stockade.errors import NotFoundError, StateError
from stockade.records.policy import Usage
from stockade.records.spec import Spec

from . import measure, network, runfiles
from .jail import FORWARDED

__all__ = ["EndedJail", "RunningJail", "ended", "find", "last_status", "running", "stop"]

_KILL_SECONDS = 10.0
_TURN_SECONDS = 0.5


class RunningJail(msgspec.Struct, frozen=True, kw_only=True):
    """A running jail. `supervisor_pid` is 0 when the supervisor was killed.

    `started` is when this life began, in seconds since the epoch; between two lives (`state` is "restarting") when the
    first did, and `pid` and `init_pid` are 0. `helper_lost`: a network helper has ended, and what it carried is cut off
    until a restart. `cgroups` are its control groups' directories. `number` tells its instance from others.
    """

    name: str
    instance: str
    generation: str
    pid: int
    init_pid: int
    supervisor_pid: int
    started: float
    state: Literal["running", "restarting"] = "running"
    restarts: int = 0
    helper_lost: bool = False
    cgroups: tuple[str, ...] = ()
    number: str = ""

    @property
    def uptime_s(self) -> float:
        """Seconds since the start of this life."""
        return max(0.0, time.time() - self.started)

    def processes(self) -> tuple[int, ...]:
        """Pids of the jail's processes as the caller sees them, PID 1 first: those in its pid namespace."""
        return measure.members(self.init_pid) if self.init_pid else ()

    def usage(self) -> Usage:
        """Memory, CPU time and processes, now."""
        return measure.usage(self.cgroups, self.processes())

    def ports(self) -> tuple[str, ...]:
        """What its spec opens outside: published ports, and sockets that it is given."""
        return network.openings(Path(self.generation)) if "@" not in self.instance else ()


class EndedJail(msgspec.Struct, frozen=True, kw_only=True):
    """A started jail that ended by itself: its exit status (None when its supervisor was killed), when, and why."""

    name: str
    instance: str
    generation: str
    status: int | None
    failed: str
    restarts: int
    ended: float


def running() -> tuple[RunningJail, ...]:
    """All running jails of the caller, by instance. What ended without a trace left is swept."""
    return tuple(_jail(instance, state) for instance, state in runfiles.alive())


def ended() -> tuple[EndedJail, ...]:
    """Jails that were started and have ended by themselves, by name; each is kept until it is started or stopped."""
    found = []
    for instance in runfiles.instances():
        state = runfiles.read(instance)
        if state is None or state.alive or "@" in instance or not state.generation:
            continue
        with contextlib.suppress(FileNotFoundError):
            found.append(
                EndedJail(
                    name=instance, instance=instance, generation=state.generation, status=state.status,
                    failed=state.failed, restarts=state.restarts or 0,
                    ended=(runfiles.directory(instance) / "state").stat().st_mtime,
                )  # fmt: skip
            )
    return tuple(found)


def find(name: str) -> RunningJail:
    """The running jail `name`: the service's own instance, else the only other one. NotFoundError when none runs."""
    state = runfiles.read(name)
    if state is not None and state.alive:
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
            runfiles.clean(name, left)
        raise
    default_signal, default_timeout = _stopping(jail.generation)
    number = default_signal if signal is None else signal
    state = _end_lives(jail.instance, number, default_timeout if timeout_s is None else timeout_s)
    if state is None:
        return None
    runfiles.clean(jail.instance, state)
    return state.status


def last_status(name: str) -> int | None:
    """Exit status of a detached jail that ended by itself and was not started since; None when there is none."""
    state = runfiles.read(name)
    return None if state is None or state.alive else state.status


def _jail(instance: str, state: runfiles.State) -> RunningJail:
    init = state.init if runfiles.is_alive(state.init) else None
    started = state.started
    if init is not None:
        started = measure.started_at(init[1], time.time(), time.clock_gettime(time.CLOCK_BOOTTIME))
    return RunningJail(
        name=instance.partition("@")[0], instance=instance, generation=state.generation, started=started,
        pid=state.service[0] if init and runfiles.is_alive(state.service) and state.service else 0,
        init_pid=init[0] if init else 0,
        supervisor_pid=state.supervisor[0] if runfiles.is_alive(state.supervisor) and state.supervisor else 0,
        state="running" if init else "restarting",
        restarts=state.restarts or 0,
        helper_lost=state.helper_lost,
        cgroups=tuple(path for path in state.remove if path.startswith("/sys/fs/cgroup/")),
        number=state.instance,
    )  # fmt: skip


def _stopping(generation: str) -> tuple[int, float]:
    """Signal and seconds as the spec of the running generation has them."""
    try:
        spec = msgspec.json.decode(Path(generation, "spec.json").read_bytes(), type=Spec)
    except (FileNotFoundError, msgspec.DecodeError):
        return signals.SIGTERM, 10.0
    return signals.Signals[spec.service.stop_signal], spec.service.stop_timeout_s


def _end_lives(instance: str, number: int, timeout_s: float) -> runfiles.State | None:
    """End the jail and whatever life its supervisor begins meanwhile; its last state, None when none is left."""
    deadline = time.monotonic() + timeout_s + _KILL_SECONDS
    while True:
        state = runfiles.read(instance)
        if state is None:
            return None
        if state.restarts is not None:
            _signal(state.supervisor, signals.SIGPWR)  # the warden's sign for: no further life
        if runfiles.is_alive(state.init):
            _end_life(state, number, timeout_s)
        if runfiles.has_ended(state.supervisor, _TURN_SECONDS if state.restarts is not None else _KILL_SECONDS):
            return runfiles.read(instance) or state
        if time.monotonic() > deadline:
            _signal(state.supervisor, signals.SIGKILL)


def _end_life(state: runfiles.State, number: int, timeout_s: float) -> None:
    """Signal, time, kill. StateError where even that does not end PID 1."""
    _signal(state.init if number in FORWARDED else state.service, number)
    if runfiles.has_ended(state.init, timeout_s):
        return
    _signal(state.init, signals.SIGKILL)
    if not runfiles.has_ended(state.init, _KILL_SECONDS):
        raise StateError(
            "the jail's PID 1 cannot be killed", hint="a process in it waits for the kernel: see `ps` for state D"
        )


def _signal(process: tuple[int, int] | None, number: int) -> None:
    with runfiles.pidfd(process) as descriptor, contextlib.suppress(ProcessLookupError):
        if descriptor is not None:
            signals.pidfd_send_signal(descriptor, number)
