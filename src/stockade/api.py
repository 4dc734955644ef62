"""Jails from Python: build, start, run with input, output, limits and time; also from asyncio. Prints nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from . import contain as walls
from . import contained
from .contain.communicate import PIPES, communicate
from .errors import HostError, NotFoundError, ProgramError, ProgramTimeoutError, UsageError
from .records.policy import size_bytes
from .records.spec import Limits, Spec

if TYPE_CHECKING:
    from .records.buildreport import BuildReport

__all__ = ["Completed", "Jail", "Pool", "run", "run_async"]

Result = TypeVar("Result")

_MOST_OUTPUT = 64 << 20
_TAIL = 400
_CURES = {
    errno.EMFILE: "close descriptors that are not needed, or raise the limit of open files: `ulimit -n`",
    errno.ENOMEM: "free some memory, or raise the caller's limit: `ulimit -v`, the memory limit of its control group",
    errno.ENOSPC: "free some space on the file system of Stockade's runtime directory",
}


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A command that ended behind the walls. `status` is its exit status, 128 + n after signal n.

    `cut`: it wrote more than is kept of a stream (64 MiB). `seconds` from before the launch to after the end.
    `memory_kills`: so many of its processes the kernel killed for want of memory.
    """

    arguments: tuple[str, ...]
    status: int
    stdout: bytes = b""
    stderr: bytes = b""
    seconds: float = 0.0
    cut: bool = False
    memory_kills: int = 0

    def check(self) -> Completed:
        """Itself; ProgramError unless the status is 0."""
        if self.status != 0:
            said = self.stderr[-_TAIL:].decode("utf-8", "replace").strip()
            hint = f"it said: {said}" if said else None
            if self.memory_kills:
                hint = "the kernel killed it for want of memory: its limit may be too low (`memory`)"
            raise ProgramError(f"`{self.arguments[0]}` ended with status {self.status}", hint=hint, status=self.status)
        return self


def _complete(
    start: Callable[[], walls.Running], arguments: Sequence[str], data: bytes, timeout_s: float | None,
    started: Callable[[walls.Running], None] | None = None,
) -> Completed:  # fmt: skip
    before = time.monotonic()
    words = _words(arguments)
    with _launched(start) as running:
        if started is not None:
            started(running)
        output = communicate(running, data, timeout_s=timeout_s, most_bytes=_MOST_OUTPUT)
    if output.status is None:
        raise ProgramTimeoutError(
            f"`{words[0]}` did not end within {timeout_s:g} s and was ended",
            hint="give it more time (`timeout_s`)", stdout=output.stdout, stderr=output.stderr,
        )  # fmt: skip
    return Completed(
        arguments=words, status=output.status, stdout=output.stdout, stderr=output.stderr,
        seconds=time.monotonic() - before, cut=output.cut, memory_kills=running.memory_kills,
    )  # fmt: skip


def _launched(start: Callable[[], walls.Running]) -> walls.Running:
    """What `start` starts; HostError in place of an OSError: a fault of the host, not of walls or program."""
    try:
        return start()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        named = f": `{os.fsdecode(error.filename)}`" if error.filename is not None else ""
        raise HostError(f"the launch failed: {reason}{named}", hint=_CURES.get(error.errno or 0)) from error


def _words(command: Sequence[str]) -> tuple[str, ...]:
    if isinstance(command, str | bytes):
        raise UsageError(
            f"the command {command!r} is one string, where a list of words is wanted",
            hint='such as `["ls", "-l"]`; with a shell, `["sh", "-c", TEXT]`',
        )
    if not command:
        raise UsageError("no command was given", hint='give a list of words, such as `["ls", "-l"]`')
    return tuple(command)


async def _in_thread(work: Callable[[Callable[[walls.Running], None]], Result]) -> Result:
    """Run `work` in a thread of its own; when the task is cancelled the jail that it starts, or has started, is ended.

    Not in the loop's own threads: they are few, and the loop needs them to look up names.
    """
    running: list[walls.Running] = []
    cancelled = threading.Event()

    def started(jail: walls.Running) -> None:
        running.append(jail)
        if cancelled.is_set():
            jail.interrupt()

    executor = ThreadPoolExecutor(1)
    done = asyncio.get_running_loop().run_in_executor(executor, work, started)
    executor.shutdown(wait=False)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        cancelled.set()
        for jail in running:
            jail.interrupt()
        while not done.done():
            with contextlib.suppress(asyncio.CancelledError):  # one more; the first is raised in the end
                await asyncio.wait([done])
        done.exception()
        raise


class Jail:
    """A jail by its name. Making one does nothing; NotFoundError comes when it is used and was not built."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"Jail({self.name!r})"

    def build(
        self, spec: Spec | None = None, *, verify: bool = True, progress: Callable[[str], None] | None = None
    ) -> BuildReport:
        """Observe, build and verify the jail from `spec`, or from the one that `stockade build NAME` finds.

        `progress` is told what is done now. ServiceError and ExerciseError where the service does not work, SpecError,
        BuildError or HostError where something is wrong with spec or host; the generation before stays as it was.
        """
        from . import specfile, workflow

        wanted = spec if spec is not None else specfile.load(specfile.find(self.name))
        return workflow.build(wanted, verify=verify, progress=progress)

    def run(
        self,
        command: Sequence[str],
        *,
        data: bytes = b"",
        timeout_s: float | None = None,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        directory: str | None = None,
        ephemeral: bool = False,
    ) -> Completed:
        """Run `command` in a jail of its own from the current generation, beside a service that may run.

        `data` is its standard input. WallError is a fault of the walls, HostError one of the host (no descriptors, no
        memory), ProgramTimeoutError one of the program; a status other than 0 is in the result (`check` raises it).
        """
        return _complete(
            self._start(command, environment, user, directory, ephemeral), command, data, timeout_s
        )

    async def run_async(
        self,
        command: Sequence[str],
        *,
        data: bytes = b"",
        timeout_s: float | None = None,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        directory: str | None = None,
        ephemeral: bool = False,
    ) -> Completed:
        """`run` for asyncio. Cancelling the task ends the jail."""
        start = self._start(command, environment, user, directory, ephemeral)
        return await _in_thread(partial(_complete, start, command, data, timeout_s))

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str] | None, user: str | None, directory: str | None,
        ephemeral: bool,
    ) -> Callable[[], walls.Running]:  # fmt: skip
        return partial(
            walls.launch, self.name, argv=command, environment=environment, user=user, directory=directory,
            ephemeral=ephemeral, **PIPES,
        )  # fmt: skip

    @contextlib.contextmanager
    def service(self, *, ephemeral: bool = False) -> Iterator[walls.RunningJail]:
        """The jail's service, started in the background, for the length of a `with` block. Nothing is left after it."""
        jail = self.start(ephemeral=ephemeral)
        try:
            yield jail
        finally:
            with contextlib.suppress(NotFoundError):
                walls.stop(self.name)

    def start(self, *, wait: bool = True, ephemeral: bool = False) -> walls.RunningJail:
        """Start the service in the background, until `stop`; with `wait` return when it is ready, as its spec says.

        ServiceError where it never is (it is stopped then), StateError when it already runs.
        """
        from . import lifecycle

        return lifecycle.start(self.name, wait=wait, ephemeral=ephemeral)

    def stop(self, *, timeout_s: float | None = None) -> int | None:
        """Stop the service as its spec says; its status where it is known. NotFoundError when it does not run."""
        return walls.stop(self.name, timeout_s=timeout_s)

    def execute(
        self, command: Sequence[str], *, data: bytes = b"", timeout_s: float | None = None, user: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Completed:  # fmt: skip
        """Run `command` in the running jail, behind the walls of its service. NotFoundError when it does not run.

        When its time is over it is ended with all of its descendants. What it has detached by then (its parent has
        ended), or leaves running when it ends in time, is the jail's, and ends with that.
        """
        start = partial(walls.enter, self.name, command, environment=environment, user=user, **PIPES)
        return _complete(start, command, data, timeout_s)

    def logs(self) -> bytes:
        """What the service has written since the log was last put aside."""
        return b"".join(walls.logs(self.name))


class Pool:
    """Jails prepared up to the execution of one command: each is used once, and `fill` makes others in their place.

    A context manager; at its end nothing is left. Several threads may use it at once. A child of os.fork() may too, and
    prepares jails of its own.
    """

    def __init__(self, jail: str, command: Sequence[str], *, size: int = 2) -> None:
        if size < 1:
            raise UsageError(f"a pool of {size} jails is of no use", hint="give a size of 1 or more")
        self._jail, self._command, self._size = jail, _words(command), size
        self._ready: deque[walls.Running] = deque()

    def __enter__(self) -> Pool:
        try:
            self.fill()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fill(self) -> None:
        """Prepare jails until the pool has its size; `run` does not wait for that."""
        start = partial(walls.launch, self._jail, argv=self._command, gate=True, **PIPES)
        while len(self._ready) < self._size:
            self._ready.append(_launched(start))

    def close(self) -> None:
        """End every jail that was prepared and not used."""
        with contextlib.suppress(IndexError):
            while True:
                self._ready.popleft().close()

    def run(self, *, data: bytes = b"", timeout_s: float | None = None) -> Completed:
        """Let one prepared jail execute the command; the pool is filled first only when none is left."""

        def start() -> walls.Running:
            running = self._take()
            running.release()
            return running

        return _complete(start, self._command, data, timeout_s)

    def _take(self) -> walls.Running:
        """The next jail that was not ended while it waited."""
        while True:
            try:
                running = self._ready.popleft()
            except IndexError:
                self.fill()
                continue
            if running.alive:
                return running
            running.close()


def run(
    command: Sequence[str],
    *,
    read: Sequence[str | Path] = (),
    write: Sequence[str | Path] = (),
    network: str = "none",
    memory: str | None = None,
    processes: int | None = None,
    cpus: float | None = None,
    data: bytes = b"",
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    directory: str | None = None,
) -> Completed:
    """Run one command now behind the walls, over the host's own /usr, with the named paths visible. No jail needed.

    `network`: "none", "host" or "egress". `memory` as in a spec ("256M"), `cpus` in CPUs. What it writes outside of
    `write` vanishes. `directory` is where it starts (default: the caller's where that can be seen). Errors as
    `Jail.run`'s; UsageError for a path that cannot be opened up, HostError for a limit that this host cannot keep.
    """
    options = _options(read, write, network, memory, processes, cpus)
    start = partial(contained.start, command, options, environment=environment, directory=directory, **PIPES)
    return _complete(start, command, data, timeout_s)


async def run_async(
    command: Sequence[str],
    *,
    read: Sequence[str | Path] = (),
    write: Sequence[str | Path] = (),
    network: str = "none",
    memory: str | None = None,
    processes: int | None = None,
    cpus: float | None = None,
    data: bytes = b"",
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    directory: str | None = None,
) -> Completed:
    """`run` for asyncio. Cancelling the task ends the command and everything that it started."""
    options = _options(read, write, network, memory, processes, cpus)
    start = partial(contained.start, command, options, environment=environment, directory=directory, **PIPES)
    return await _in_thread(partial(_complete, start, command, data, timeout_s))


def _options(
    read: Sequence[str | Path], write: Sequence[str | Path], network: str, memory: str | None, processes: int | None,
    cpus: float | None,
) -> contained.Options:  # fmt: skip
    if network not in contained.NETWORKS:
        known = ", ".join(f'"{name}"' for name in contained.NETWORKS)
        raise UsageError(f"there is no network {network!r}", hint=f"give one of {known}")
    try:
        sound = memory is None or size_bytes(memory) > 0
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise UsageError(f"`memory={memory!r}` is no size", hint='give a number with K, M or G, such as `"256M"`')
    for name, value in (("processes", processes), ("cpus", cpus)):
        if value is not None and value <= 0:
            raise UsageError(f"`{name}={value}` leaves nothing", hint="give a number above 0")
    return contained.Options(
        read=_paths("read", read),
        write=_paths("write", write),
        network=network,
        limits=Limits(memory=memory, processes=processes, cpus=cpus),
    )


def _paths(name: str, paths: Sequence[str | Path]) -> tuple[str, ...]:
    if isinstance(paths, str | bytes | os.PathLike):
        raise UsageError(f"`{name}` is one path, where a list of paths is wanted", hint=f"write `{name}=[{paths!r}]`")
    return tuple(os.fsdecode(path) for path in paths)
