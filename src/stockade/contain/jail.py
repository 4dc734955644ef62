"""A jail that this process started: wait for it, let it through its gate, end it."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal as signals
import time
import weakref
from collections.abc import Sequence
from io import FileIO
from types import TracebackType

from stockade.errors import StateError, WallError

from . import descent, runfiles, wire
from .failures import wall_error

__all__ = ["LONGEST_POLL", "Running"]

_LAUNCH_SECONDS = 60.0
_END_SECONDS = 10.0
_GRACE_SECONDS = 10.0
_TURN_SECONDS = 0.5
#: Seconds of one turn: poll(2) takes no more than 24 days, and a caller may give any number.
LONGEST_POLL = 3600.0

#: What PID 1 passes on to the service; other signals go to the service itself.
FORWARDED = frozenset({
    signals.SIGHUP, signals.SIGINT, signals.SIGQUIT, signals.SIGTERM, signals.SIGUSR1, signals.SIGUSR2, signals.SIGALRM,
    signals.SIGCONT, signals.SIGWINCH,
})  # fmt: skip


class Running:
    """A launched jail, or a command that entered one.

    `pid` is the service's process, `init_pid` the jail's PID 1, `supervisor_pid` the warden outside, all as this
    process sees them. `stdin`, `stdout`, `stderr` are this end of what was given as `subprocess.PIPE`, else None. As a
    context manager it leaves nothing behind: the jail has ended when the block does. So does that of one that nobody
    refers to any more.
    """

    _gate: int | None = None
    _leash: int | None = None
    _status = -1

    def __init__(
        self, instance: str, warden: int, *, status: int, leash: int | None, gate: int | None, detached: bool,
        pipes: tuple[FileIO | None, FileIO | None, FileIO | None],
    ) -> None:  # fmt: skip
        self.instance = instance
        self.name = instance.partition("@")[0]
        self.stdin, self.stdout, self.stderr = pipes
        self._state = runfiles.State()
        self._warden: int | None = warden
        self._status = status
        self._leash = leash
        self._gate = gate
        self._detached = detached
        self._text = b""
        self._ended = False
        self._exit_code = 0  # of the process that was started; it is no detached jail's supervisor
        if not detached:
            _ours.add(self)

    def __del__(self) -> None:
        """An interrupt between launch and `with` loses one: without its leash the warden ends the jail."""
        self._close_own()

    def __repr__(self) -> str:
        return f"Running({self.instance!r}, pid={self.pid})"

    @property
    def pid(self) -> int:
        """The service's process; 0 before it exists."""
        return self._state.service[0] if self._state.service else 0

    @property
    def init_pid(self) -> int:
        """The jail's PID 1; 0 before it exists."""
        return self._state.init[0] if self._state.init else 0

    @property
    def supervisor_pid(self) -> int:
        """The warden outside of the jail."""
        return self._state.supervisor[0] if self._state.supervisor else 0

    @property
    def alive(self) -> bool:
        """Whether the jail's PID 1 is there; False in a child of fork(2), whose jail it is not."""
        return runfiles.is_alive(self._state.init)

    @property
    def memory_kills(self) -> int:
        """How many of its processes the kernel killed for want of memory; known once it has ended."""
        return self._state.memory_kills

    def started(self) -> None:
        """Wait until the service is executed, or waits at its gate. WallError when a launch step failed."""
        deadline = time.monotonic() + _LAUNCH_SECONDS
        try:
            while True:
                line = self._line(deadline)
                if line is None:
                    raise self._ended_early()
                if line == "gated" or line == "exec ok":
                    break
        except BaseException:
            # A detached one too: half started, nobody would know of it.
            self.kill()
            self.close()
            raise
        if self._detached:
            self._reap()  # the warden's first process leaves at once

    def _ended_early(self) -> WallError:
        # A supervisor that was killed has told the file more than it has told here. For a command that entered a jail
        # the file is the jail's.
        left = runfiles.read(self.instance)
        if left is not None and (self._detached or (left.supervisor and left.supervisor[0] == self._warden)):
            for word in ("supervisor", "init", "service", "restarts"):
                setattr(self._state, word, getattr(self._state, word) or getattr(left, word))
        self._reap()
        if self._exit_code > 0:
            return WallError("the warden ended before the service was started", hint="see its standard error")
        by = f"ended by {signals.Signals(-self._exit_code).name}" if self._exit_code else "killed"
        return WallError(
            f"the warden was {by} before the service was started",
            hint="that befalls a process for which no memory is left: `dmesg` says so; free some, or raise the limit "
            "of the caller: `ulimit -v`, the memory limit of its control group",
        )

    def release(self, sockets: Sequence[int] = ()) -> None:
        """Open the gate: the service is executed. StateError without a gate. WallError when the exec fails.

        `sockets` are descriptors that it gets as 3, 4, …, as many as the launch was told to wait for.
        """
        if self._gate is None:
            raise StateError(f"jail `{self.instance}` has no closed gate", hint="launch it with `gate=True`")
        with contextlib.suppress(BrokenPipeError):  # it was ended while it waited, as `started` will tell
            if sockets:
                _bring(self._gate, sockets)
            else:
                os.write(self._gate, b"\n")
        os.close(self._gate)
        self._gate = None
        self.started()

    def wait(self, timeout_s: float | None = None) -> int:
        """The service's exit status, 128 + n when signal n ended it. TimeoutError after `timeout_s` seconds.

        WallError when the jail's supervisor was killed, so that nobody knows the status.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ended:
            if self._line(deadline) is None:
                self._ended = True
                self._reap()
        self._reap()
        if self._state.status is None:
            raise WallError(
                f"the supervisor of jail `{self.instance}` was killed: the exit status is lost",
                hint="`stockade ps` shows whether the jail still runs",
            )
        return self._state.status

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended; `wait` returns at once then."""
        return self._ended

    def fileno(self) -> int:
        """The descriptor on which the supervisor reports, to wait on; `look` takes what came."""
        return self._status

    def look(self) -> None:
        """Take what the supervisor has reported, and wait for nothing."""
        with contextlib.suppress(TimeoutError):
            while not self._ended:
                self._ended = self._line(0.0) is None

    def stop(self, *, signal: int = signals.SIGTERM, timeout_s: float = _GRACE_SECONDS) -> int | None:
        """Send `signal` to the service; what still runs after `timeout_s` seconds is killed. The status, if known."""
        if not self._ended:
            self._begin_no_more()
            self._send(signal)
            try:
                self.wait(timeout_s)
            except TimeoutError:
                self.kill()
            except WallError:
                self.kill()
        return self._state.status

    def kill(self) -> None:
        """End the jail at once: with PID 1 the kernel ends every process in it. For an entered command as `interrupt`.
        """
        if self._state.init is None:
            self.interrupt()  # first: the supervisor of an entered command kills no more than it started itself
        self._let_go()
        self._begin_no_more()
        # A supervisor that was just starting a further life reports it meanwhile.
        for seconds in (_TURN_SECONDS, _END_SECONDS) if self._detached else (_END_SECONDS,):
            self.interrupt()
            if self._has_ended(seconds):
                break
        else:
            # A supervisor that does not answer: without it PID 1 ends, and it is a child that nobody else reaps.
            supervisor = self._warden or (self.supervisor_pid if runfiles.is_alive(self._state.supervisor) else None)
            if supervisor:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(supervisor, signals.SIGKILL)
            self._has_ended(_END_SECONDS)
        runfiles.has_ended(self._state.init, _END_SECONDS)  # of a supervisor that was killed it is not told

    def interrupt(self) -> None:
        """Kill the jail's processes and wait for nothing: what another thread than the one that waits may do.

        Of a command that entered a jail its own process and all descendants; what it detached belongs to the jail.
        """
        init, service = self._state.init, self._state.service
        if init is not None and runfiles.is_alive(init):
            with contextlib.suppress(ProcessLookupError):
                os.kill(init[0], signals.SIGKILL)
        elif init is None and service is not None:
            descent.end(service)

    def abandon(self) -> None:
        """Close every descriptor and forget the jail: in a child of fork(2) it is the parent's, which sees its end."""
        self._state = runfiles.State()
        self._warden, self._ended = None, True
        self.close()

    def _begin_no_more(self) -> None:
        """Tell a supervisor that starts its jail anew that this life is the last."""
        supervisor = self._state.supervisor
        if self._state.restarts is not None and supervisor is not None and runfiles.is_alive(supervisor):
            with contextlib.suppress(ProcessLookupError):
                os.kill(supervisor[0], signals.SIGPWR)

    def _let_go(self) -> None:
        """Close the gate and the leash: the supervisor ends a jail whose leash is gone."""
        for descriptor in (self._gate, self._leash):
            if descriptor is not None:
                os.close(descriptor)
        self._gate = self._leash = None

    def _has_ended(self, seconds: float) -> bool:
        try:
            self.wait(seconds)
        except TimeoutError:
            return False
        except WallError:
            pass
        return True

    def close(self) -> None:
        """End what still runs, unless it was detached, and close every descriptor."""
        if not self._detached and not self._ended:
            self.kill()
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                file.close()
        self._close_own()
        self._ended = True
        self._reap()

    def _close_own(self) -> None:
        self._let_go()
        status, self._status = self._status, -1
        if status >= 0:
            os.close(status)

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._detached and not self._ended:
            self.stop()
        self.close()

    def _send(self, number: int) -> None:
        init = self._state.init
        target = init if number in FORWARDED and init is not None else self._state.service
        if target is not None and runfiles.is_alive(target):
            with contextlib.suppress(ProcessLookupError):
                os.kill(target[0], number)

    def _line(self, deadline: float | None) -> str | None:
        """The next report line, taken into the state; None when the warden has closed its end."""
        while b"\n" not in self._text:
            if self._status < 0:
                return None
            left = math.inf if deadline is None else max(0.0, deadline - time.monotonic())
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            if not poll.poll(min(left, LONGEST_POLL) * 1000):
                if left > LONGEST_POLL:
                    continue
                raise TimeoutError(f"jail `{self.instance}` still runs")
            data = os.read(self._status, 65536)
            if not data:
                return None
            self._text += data
        first, _, self._text = self._text.partition(b"\n")
        line = os.fsdecode(first)
        self._take(line)
        return line

    def _take(self, line: str) -> None:
        runfiles.take(self._state, line)
        if line.startswith("failed "):
            self._ended = True
            raise wall_error(self._state.failed)

    def _reap(self) -> None:
        if self._warden is not None:
            with contextlib.suppress(ChildProcessError):
                self._exit_code = os.waitstatus_to_exitcode(os.waitpid(self._warden, 0)[1])
            self._warden = None


def _bring(gate: int, sockets: Sequence[int]) -> None:
    import socket

    with socket.socket(fileno=os.dup(gate)) as channel:
        socket.send_fds(channel, [wire.GO], sockets)


_ours: weakref.WeakSet[Running] = weakref.WeakSet()


def _abandon_ours() -> None:
    """In a child of fork(2): its copies of pipes would keep a command's input open, and its parent's jails alive."""
    for jail in list(_ours):
        jail.abandon()


os.register_at_fork(after_in_child=_abandon_ours)
