"""Jails from Python: build, start, run with input, output, limits and time; also from asyncio. Prints nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from . import contain as walls
from . import contained
from .contain.communicate import PIPES, communicate
from .errors import NotFoundError, ProgramError, ProgramTimeoutError, UsageError
from .records.spec import Limits, Spec

if TYPE_CHECKING:
    from .records.buildreport import BuildReport

__all__ = ["Completed", "Jail", "Pool", "run", "run_async"]

Result = TypeVar("Result")

_MOST_OUTPUT = 64 << 20
_TAIL = 400


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
    with start() as running:
        if started is not None:
            started(running)
        output = communicate(running, data, timeout_s=timeout_s, most_bytes=_MOST_OUTPUT)
    if output.status is None:
        raise ProgramTimeoutError(
            f"`{arguments[0]}` did not end within {timeout_s:g} s and was ended", hint="give it more time (`timeout_s`)"
        )
    return Completed(
        arguments=tuple(arguments), status=output.status, stdout=output.stdout, stderr=output.stderr,
        seconds=time.monotonic() - before, cut=output.cut, memory_kills=running.memory_kills,
    )  # fmt: skip


async def _in_thread(work: Callable[[Callable[[walls.Running], None]], Result]) -> Result:
    """Run `work` in a thread; when the task is cancelled the jail that it has started is ended."""
    running: list[walls.Running] = []
    task = asyncio.ensure_future(asyncio.to_thread(work, running.append))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            for jail in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(jail.init_pid, 9)
            await asyncio.wait([task], timeout=0.05)
        with contextlib.suppress(Exception):
            task.result()
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

        `data` is its standard input. WallError is a fault of the walls, ProgramTimeoutError one of the program; a
        status other than 0 is in the result (`check` raises it).
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
        """Run `command` in the running jail, behind the walls of its service. NotFoundError when it does not run."""
        start = partial(walls.enter, self.name, command, environment=environment, user=user, **PIPES)
        return _complete(start, command, data, timeout_s)

    def logs(self) -> bytes:
        """What the service has written since the log was last put aside."""
        return b"".join(walls.logs(self.name))


class Pool:
    """Jails prepared up to the execution of one command: each is used once, and another is made in its place.

    A context manager; at its end nothing is left. Not for use from several threads at once.
    """

    def __init__(self, jail: str, command: Sequence[str], *, size: int = 2) -> None:
        if size < 1:
            raise UsageError(f"a pool of {size} jails is of no use", hint="give a size of 1 or more")
        self._jail, self._command, self._size = jail, tuple(command), size
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
        while len(self._ready) < self._size:
            self._ready.append(walls.launch(self._jail, argv=self._command, gate=True, **PIPES))

    def close(self) -> None:
        """End every jail that was prepared and not used."""
        while self._ready:
            self._ready.popleft().close()

    def run(self, *, data: bytes = b"", timeout_s: float | None = None) -> Completed:
        """Let one prepared jail execute the command; one is prepared first only when none is left."""
        if not self._ready:
            self.fill()

        def start() -> walls.Running:
            running = self._ready.popleft()
            running.release()
            return running

        return _complete(start, self._command, data, timeout_s)


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
    `write` vanishes. Errors as `Jail.run`'s; UsageError for a path that cannot be opened up.
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
    return contained.Options(
        read=tuple(os.fspath(path) for path in read),
        write=tuple(os.fspath(path) for path in write),
        network=network,
        limits=Limits(memory=memory, processes=processes, cpus=cpus),
    )
