"""RUN/INSTANCE/state: who runs, by pid and start time, under a lock that the supervisor holds as long as it lives.

An instance is a jail's name, or NAME@NUMBER for one of several commands run beside it. The file is lines of a
word and its value: the header written here, then what the warden reports.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from stockade import places
from stockade.errors import NotFoundError, StateError, UsageError
from stockade.kernel.pidfd import has_ended as descriptor_has_ended
from stockade.kernel.pidfd import pidfd_open

__all__ = [
    "State", "alive", "claim", "clean", "directory", "has_ended", "is_alive", "parse", "pidfd", "read", "require_name",
    "start_time", "take",
]  # fmt: skip

_INSTANCE = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(@[0-9]{1,16})?\Z")
_ATTEMPTS = 20


class State:
    """What a state file says. Process ids come with their start time: (pid, ticks since boot)."""

    def __init__(self) -> None:
        self.generation = ""
        self.started = 0.0
        self.supervisor: tuple[int, int] | None = None
        self.init: tuple[int, int] | None = None
        self.service: tuple[int, int] | None = None
        self.executed = False
        self.status: int | None = None      # 128 + n for a signal
        self.failed = ""
        self.remove: list[str] = []
        self.instance = ""                  # what `{instance}` stands for in the plan's paths
        self.restarts: int | None = None    # None for a jail that has one life
        self.last = ""                      # how the life before ended: "exit 1", "signal 9", "failed …"
        self.waiting_ms: int | None = None  # between two lives: how long
        self.memory_kills = 0               # how many of its processes the kernel killed for want of memory
        self.helper_lost = False            # a network helper has ended before its jail

    @property
    def alive(self) -> bool:
        """Whether the jail runs, or is between two lives."""
        return is_alive(self.init) or (self.restarts is not None and is_alive(self.supervisor))


def require_name(instance: str) -> None:
    """UsageError for what is no name of an instance (`/`, `..`)."""
    if not _INSTANCE.match(instance):
        raise UsageError(
            f"`{instance}` is no name for a jail",
            hint="a name has a-z, 0-9, `.`, `_` and `-`, begins with a letter or digit, and is 63 characters at most",
        )


def directory(instance: str) -> Path:
    """The runtime directory of an instance; errors as `require_name`."""
    require_name(instance)
    return places.runtime(instance)


def parse(text: str) -> State:
    """The state in `text`; a line that was cut short is skipped."""
    state = State()
    for line in text.splitlines():
        take(state, line)
    return state


def take(state: State, line: str) -> None:
    """Add what one line says to `state`."""
    word, _, value = line.partition(" ")
    match word:
        case "generation":
            state.generation = value
        case "started":
            state.started = float(value or 0)
        case "supervisor" | "init" | "service":
            pid, _, ticks = value.partition(" ")
            if pid.isdecimal() and ticks.isdecimal():
                setattr(state, word, (int(pid), int(ticks)))
            if word == "init":
                state.waiting_ms, state.helper_lost = None, False
        case "restarts" | "waiting" if value.isdecimal():
            setattr(state, "waiting_ms" if word == "waiting" else word, int(value))
        case "instance" | "last":
            setattr(state, word, value)
        case "memory" if value.isdecimal():
            state.memory_kills += int(value)
        case "helper":
            state.helper_lost = True
        case "exec":
            state.executed = True
        case "exit" | "signal" if value.isdecimal():
            state.status = int(value) + (128 if word == "signal" else 0)
        case "failed":
            state.failed = value
        case "remove":
            state.remove.append(value)
        case _:
            pass


def read(instance: str) -> State | None:
    """The state of an instance, None when there is none."""
    try:
        data = (directory(instance) / "state").read_bytes()
    except FileNotFoundError:
        return None
    return parse(os.fsdecode(data))


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot (proc(5), field 22 of stat); None when it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_alive(process: tuple[int, int] | None) -> bool:
    """Whether that very process lives: a recycled pid has another start time."""
    return process is not None and start_time(process[0]) == process[1]


@contextlib.contextmanager
def pidfd(process: tuple[int, int] | None) -> Iterator[int | None]:
    """A descriptor of that very process, None when it is gone."""
    try:
        descriptor = pidfd_open(process[0]) if process is not None else None
    except ProcessLookupError:
        descriptor = None
    try:
        yield descriptor if is_alive(process) else None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def has_ended(process: tuple[int, int] | None, timeout_s: float) -> bool:
    """Whether that very process is gone within so many seconds."""
    with pidfd(process) as descriptor:
        return descriptor is None or descriptor_has_ended(descriptor, timeout_s)


def private(path: Path) -> None:
    """Make the directory `path` for the caller alone, or see that it is: /tmp is everybody's."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StateError(
            f"`{path}` is not a directory that only the caller can write to", hint="remove it, or set `STOCKADE_HOME`"
        )


def claim(instance: str) -> int:
    """A descriptor of the instance's locked, empty state file. The lock goes on in the process that inherits it.

    StateError when the instance runs, or is being started.
    """
    place = directory(instance)
    base = place.parent
    if str(base.parent).startswith("/tmp/"):
        private(base.parent)
    private(base)
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
        try:
            descriptor = os.open(f"{place}/state", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # an instance that ended took its directory away
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _already_running(instance) from None
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            continue
        text = os.pread(descriptor, 1 << 20, 0)
        if text:
            left = parse(os.fsdecode(text))
            if left.alive:
                os.close(descriptor)
                raise _already_running(instance)
            sweep(left)
            os.ftruncate(descriptor, 0)
        return descriptor
    raise StateError(f"`{place}` comes and goes", hint="something else starts and stops this jail: try again")


def sweep(state: State) -> None:
    """Remove the control groups of an ended jail whose supervisor was killed and could not."""
    own = f"{places.run()}/"
    for path in reversed(state.remove):
        if not path.startswith(own):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _already_running(instance: str) -> StateError:
    return StateError(
        f"jail `{instance}` is already running",
        hint=f"`stockade exec {instance} -- COMMAND` runs a command in it, `stockade stop {instance}` ends it",
    )


def release(instance: str) -> None:
    """Remove the runtime directory of an instance that has ended; a new owner's is left alone."""
    place = directory(instance)
    try:
        descriptor = os.open(place / "state", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink and not parse(os.fsdecode(os.pread(descriptor, 1 << 20, 0))).alive:
            (place / "state").unlink()
            place.rmdir()
    except (BlockingIOError, FileNotFoundError):
        return
    finally:
        os.close(descriptor)


def instances() -> list[str]:
    """Names of all instances that have a runtime directory, sorted."""
    try:
        names = os.listdir(places.run())
    except FileNotFoundError:
        return []
    return sorted(name for name in names if _INSTANCE.match(name))


def clean(instance: str, state: State) -> None:
    """Remove what a supervisor that was killed could not, then the runtime directory."""
    sweep(state)
    release(instance)


def alive() -> list[tuple[str, State]]:
    """Each instance that runs, with its state, sorted. What ended without a trace left is swept."""
    found = []
    for instance in instances():
        state = read(instance)
        if state is None:
            with contextlib.suppress(OSError):
                directory(instance).rmdir()
        elif state.alive:
            found.append((instance, state))
        elif state.status is None and "@" in instance:
            clean(instance, state)
    return found


def not_running(name: str) -> NotFoundError:
    return NotFoundError(f"jail `{name}` is not running", hint=f"`stockade start {name}` starts it")
