"""The observed service as the flows see it: alive or ended, stopped and swept. Two kinds, one face."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ServiceError
from ..records.spec import Service, Spec, must_stay
from .process import Process
from .tracer import Tracer
from .view import View

__all__ = ["LAST_WORDS_S", "JailedService", "ViewedService", "check", "signal_number", "until"]

_POLL_S = 0.02
#: In the words of a service that was started without the sockets that it is to be given (sd_listen_fds(3)).
_SOCKETLESS = re.compile(r"LISTEN_(FDS|PID)|sd_listen_fds|socket.activat|sockets? passed", re.IGNORECASE)
#: How long the end of a process that was told to end, or was killed, may take to show.
LAST_WORDS_S = 0.5


def signal_number(name: str) -> signal.Signals:
    """The signal `name` ("SIGTERM"); ServiceError for one that there is not."""
    try:
        return signal.Signals[name]
    except KeyError:
        raise ServiceError(
            f"there is no signal `{name}`", hint="set `stop_signal` in `[service]` to a name such as `SIGTERM`"
        ) from None


@dataclass
class ViewedService:
    """A service that runs in a view under strace."""

    view: View
    process: Process
    service: Service

    @property
    def status(self) -> int | None:
        """Status of the command, None while it runs."""
        return self.process.wait(0)

    @property
    def failure(self) -> str | None:
        """Why the command could not be executed."""
        return self.process.failure

    def _others(self) -> list[int]:
        """Processes other than the command itself, strace and the view's first, as the view numbers them."""
        return [
            found["pid"]
            for found in self.view.processes()
            if found["pid"] not in (1, self.process.inner) and found["state"] != "Z" and not _is_tracer(found)
        ]

    def alive(self) -> bool:
        """Whether any of its processes is left."""
        return self.status is None or bool(self._others())

    def ticks(self) -> int:
        """CPU time used by all of its processes, in clock ticks."""
        return sum(found["ticks"] for found in self.view.processes() if found["pid"] != 1 and not _is_tracer(found))

    def stop(self) -> bool:
        """Stop it as the spec says, then end whatever is left; strace has ended afterwards. Whether it ended so."""
        number = signal_number(self.service.stop_signal)
        if self.status is None:
            self.process.kill(number)
        else:
            for found in self.view.processes():
                if found["parent"] == 1 and not _is_tracer(found):
                    self.view.kill(found["pid"], number)
        in_time = until(
            lambda: not self.alive() or (self.status is not None and not self.service.forks),
            self.service.stop_timeout_s,
        )
        until(lambda: not self.alive(), LAST_WORDS_S)
        for pid in self._others():
            self.view.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(5.0)
        until(lambda: not any(map(_is_tracer, self.view.processes())), 5.0)
        return in_time


def _is_tracer(found: dict[str, object]) -> bool:
    # The launcher detaches, so that the view's first process adopts it.
    return found["command"] == "strace" and found["parent"] == 1


@dataclass
class JailedService:
    """A service that its jail's warden started; `tracer` tells which processes it has."""

    pid: int
    init_pid: int
    tracer: Tracer
    service: Service
    traced: Callable[[], list[int]]
    still_alive: Callable[[], bool]

    failure: str | None = None
    status: int | None = None

    def alive(self) -> bool:
        """Whether any of its processes is left."""
        return self.tracer.running and self.still_alive()

    def ticks(self) -> int:
        """CPU time used by all of its processes, in clock ticks."""
        return sum(int(fields[11]) + int(fields[12]) for pid in self.traced() if (fields := _stat(pid)))

    def stop(self) -> None:
        """Stop it as the spec says, then end whatever is left; strace has ended afterwards."""
        number = signal_number(self.service.stop_signal)
        for pid in self.traced():
            fields = _stat(pid)
            if pid == self.pid or (fields and int(fields[1]) == self.init_pid and not _is_thread(pid)):
                _signal(pid, number)
        self.tracer.wait(self.service.stop_timeout_s)
        if self.tracer.running:
            for pid in self.traced():
                _signal(pid, signal.SIGKILL)
            self.tracer.wait(5.0)


def _stat(pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from the third on (proc(5)); none if the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].split()
    except OSError:
        return []


def _is_thread(pid: int) -> bool:
    """Whether it is a thread beside its process's first: one that takes a signal leaves that one in its poll(2)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return b"\nTgid:\t%d\n" % pid not in file.read()
    except OSError:
        return False


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until `condition` holds, `timeout_s` seconds at most; whether it does."""
    deadline = time.monotonic() + timeout_s
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return holds


def check(spec: Spec, service: ViewedService | JailedService, log: Callable[[], str]) -> None:
    """ServiceError if the service has ended and should not have, or could not be executed."""
    name = spec.service.command[0]
    if service.failure is not None:
        raise ServiceError(
            f"cannot run `{name}`: {service.failure}", hint="see that it can be run by hand, as the spec's user",
            log=log(),
        )  # fmt: skip
    status = service.status
    if isinstance(service, JailedService):
        if not must_stay(spec) or service.alive():
            return
        raise ServiceError(f"`{name}` ended early", hint="its log says why", log=log())
    if status is None or (status == 0 and not must_stay(spec)):
        return
    if status < 0:
        raise ServiceError(
            f"`{name}` was ended by {signal.Signals(-status).name}",
            hint="its log says why" if log() else "it wrote nothing; see whether it ends so by hand too", log=log(),
        )  # fmt: skip
    if status in (126, 127) and not must_stay(spec):
        raise ServiceError(f"`{name}` could not be executed (status {status})", hint="its log says why", log=log())
    if not must_stay(spec):
        return
    until(lambda: not service.alive(), LAST_WORDS_S)
    if status == 0 and service.alive():
        if spec.service.forks:
            return
        raise ServiceError(
            f"`{name}` went into the background",
            hint="set `forks = true` in `[service]`, or give it the option that keeps it in the foreground",
            log=log(),
        )
    hint = _ended_hint(spec, status, log())
    raise ServiceError(f"`{name}` ended early, with status {status}", hint=hint, log=log())


def _ended_hint(spec: Spec, status: int, log: str) -> str:
    """What to do about a service that ended: success means that it was never meant to stay."""
    if not spec.network.listen and _SOCKETLESS.search(log):
        return "name the sockets that it is to be given: `listen` in `[network]`"
    if status == 0:
        return (
            "exercises by clients need a service that stays: give it the option that keeps it in the foreground, or, "
            "for a command that ends by itself, give its exercises `where = \"inside\"` and leave `ready` out"
        )
    return "its log says why" if log else "it wrote nothing; try it by hand"

