"""Generations of a jail on disk: made aside, current by one rename, swept after a kill. Builds nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from stockade import places
from stockade.errors import BuildError, NotFoundError, StateError, UsageError
from stockade.kernel import userns
from stockade.kernel.attributes import spread_apart
from stockade.kernel.beneath import syncfs
from stockade.kernel.removal import remove_tree
from stockade.records.generation import Generation
from stockade.spread import Aside

from .lock import read_lock

__all__ = [
    "REMOVING", "Building", "Ids", "Store", "caller_ids", "failures_explained", "fresh_suffix", "ids_of",
    "locked", "on_files", "remove_tree",
]  # fmt: skip

Ids = userns.Range | userns.Single | None
Result = TypeVar("Result")

KEEP = 3

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
_NUMBER = re.compile(r"[0-9]{4,9}\Z")
_BUILDING = ".building-"
REMOVING = ".removing-"
"""How the names of what is being removed begin."""


def ids_of(store: Store, uid: int, gid: int) -> Ids:
    """The ids of `store`, the only one of them, where there is only one, seen as `uid` and `gid`."""
    return userns.Single(uid=uid, gid=gid) if isinstance(store.ids, userns.Single) else store.ids


def on_files(ids: Ids, function: Callable[..., Result], *args: object) -> Result:
    """`function(*args)` with the rights over files of `ids`: at once as root, else in a user namespace."""
    return function(*args) if ids is None else userns.call(function, *args, ids=ids)


def caller_ids() -> Ids:
    """The ids that own the caller's jails: None for root, else the subordinate range, else only the own id."""
    if os.geteuid() == 0:
        return None
    return userns.subordinate() or userns.Single(uid=0, gid=0)


class Building:
    """A generation being made, in a hidden directory. `commit` makes it the current one.

    `path` is where it is now, `descriptor` that directory, `final` where it will be.
    """

    def __init__(self, store: Store, number: int, path: Path) -> None:
        self.number = number
        self.path = path
        self.final = store.directory / "generations" / f"{number:04}"
        self._store = store
        self.committed = False
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._writing: Aside | None = None
        self._failed: OSError | None = None

    def begin_writing(self) -> None:
        """Have the disk write out what is there by now, while the rest is made; `commit` waits for it."""
        thread = Aside(self._write)
        with contextlib.suppress(RuntimeError):  # a limit on processes: then `commit` does it all
            thread.start()
            self._writing = thread

    def _write(self) -> None:
        try:
            syncfs(self.descriptor)
        except OSError as error:  # the kernel tells it once for each descriptor
            self._failed = error

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def commit(self) -> None:
        """Write everything out, then give the generation its name and make it current.

        A power cut leaves either the old current generation or the whole new one.
        """
        self._wait()
        if self._failed is not None:
            raise self._failed
        syncfs(self.descriptor)
        os.rename(self.path, self.final)
        self.committed = True
        _sync_directory(self.final.parent)
        self._store._switch(self.number)

    def __enter__(self) -> Building:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait()
        os.close(self.descriptor)


class Store:
    """What is kept of one jail: generations, secrets, volumes.

    `ids` are those that own its files, `keep` is how many generations stay. UsageError for a name that is none.
    """

    def __init__(self, name: str, *, keep: int = KEEP) -> None:
        if not _NAME.match(name):
            raise UsageError(
                f"`{name}` is no name for a jail",
                hint="a name has a-z, 0-9, `.`, `_` and `-`, begins with a letter or digit, and is 63 characters at "
                "most",
            )
        self.name = name
        self.directory = places.jail(name)
        self.secrets = self.directory / "secrets"
        self.volumes = self.directory / "volumes"
        self.keep = keep
        self.ids = caller_ids()

    @property
    def _generations(self) -> Path:
        return self.directory / "generations"

    def exists(self) -> bool:
        """Whether anything is kept of the jail."""
        return self.directory.is_dir()

    def generations(self) -> tuple[int, ...]:
        """Numbers of the generations that are there, in order."""
        try:
            names = os.listdir(self._generations)
        except FileNotFoundError:
            return ()
        return tuple(sorted(int(name) for name in names if _NUMBER.match(name)))

    def current_number(self) -> int | None:
        """Number of the current generation, None when there is none."""
        try:
            target = os.readlink(self.directory / "current")
        except FileNotFoundError:
            return None
        name = target.rpartition("/")[2]
        return int(name) if _NUMBER.match(name) else None

    def current(self) -> Generation | None:
        """The current generation, None when none was built."""
        number = self.current_number()
        return None if number is None else self.generation(number)

    def generation(self, number: int) -> Generation:
        """Generation `number`; NotFoundError when it is not there."""
        path = self.place(number)
        return Generation(number=number, path=path, lock=read_lock(path / "lock.json"))

    def place(self, number: int) -> Path:
        """Directory of generation `number`; NotFoundError when it is not there."""
        path = self._generations / f"{number:04}"
        if not path.is_dir():
            known = ", ".join(map(str, self.generations())) or "none"
            raise NotFoundError(f"jail `{self.name}` has no generation {number}", hint=f"there are: {known}")
        return path

    @contextlib.contextmanager
    def new(self) -> Iterator[Building]:
        """A new generation, for one builder at a time; without a `commit` it is gone at the end.

        StateError while another process builds or removes the same jail.
        """
        with self._exclusive():
            self._sweep()
            spread_apart(self._generations)
            try:
                number = max(self.generations(), default=0) + 1
                path = self._generations / f"{_BUILDING}{os.getpid()}-{fresh_suffix()}"
                os.mkdir(path, 0o700)
                places.use(path).touch(0o600)  # a launch from a full disk finds it
                with Building(self, number, path) as building:
                    yield building
                if building.committed:
                    self._prune(self.keep)
            finally:
                # Whatever was not committed, and a removal that an interrupt stopped half-way.
                self._sweep()

    def sweep(self) -> int:
        """Remove what a killed build or removal left; the number of directories removed.

        Nothing while a builder is alive.
        """
        if not self._generations.is_dir():
            return 0
        try:
            with self._exclusive():
                return self._sweep()
        except StateError:
            return 0

    def prune(self, keep: int = KEEP) -> tuple[int, ...]:
        """Remove all but the last `keep` generations, the current one and those in use; what was removed."""
        with self._exclusive():
            return self._prune(keep)

    def _prune(self, keep: int) -> tuple[int, ...]:
        kept = {*self.generations()[-keep:], self.current_number()}
        return tuple(number for number in self.generations() if number not in kept and self._discard(number))

    def rollback(self, number: int | None = None) -> Generation:
        """Make `number`, or the last generation before the current one, current."""
        with self._exclusive():
            current = self.current_number()
            if number is None:
                earlier = [known for known in self.generations() if current is None or known < current]
                if not earlier:
                    raise NotFoundError(
                        f"jail `{self.name}` has no generation before the current one",
                        hint=f"`stockade build {self.name}` makes a new one",
                    )
                number = earlier[-1]
            generation = self.generation(number)
            self._switch(number)
            return generation

    def remove(self) -> None:
        """Remove the jail with everything that is kept of it, secrets and volumes included."""
        if not self.exists():
            raise NotFoundError(f"there is no jail `{self.name}`", hint="`stockade list` shows those that there are")
        with self._exclusive():
            os.close(locked(self.directory, fcntl.LOCK_EX, busy=self._busy()))
            self._sweep()
            for number in self.generations():
                with self.hold(number, exclusive=True):
                    pass
            aside = self.directory.with_name(f"{REMOVING}{self.name}-{fresh_suffix()}")
            os.rename(self.directory, aside)
        try:
            on_files(self.ids, remove_tree, aside)
        except KeyboardInterrupt:
            on_files(self.ids, remove_tree, aside)
            raise

    @contextlib.contextmanager
    def hold(self, number: int, *, exclusive: bool = False) -> Iterator[int]:
        """Keep generation `number` from being removed while a jail runs from it; yields the descriptor that does.

        The lock lasts as long as any copy of the descriptor. StateError when the generation is being removed, or with
        `exclusive` when it is in use.
        """
        descriptor = locked(
            places.use(self.place(number)),
            fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH,
            busy=StateError(
                f"generation {number} of jail `{self.name}` is in use", hint=f"`stockade stop {self.name}` ends that"
            ),
            opening=os.O_CREAT | os.O_NOFOLLOW,
        )
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The jail's build lock. It lives with the process (and its children), so a kill releases it."""
        os.makedirs(self._generations, mode=0o700, exist_ok=True)
        os.chmod(self.directory, 0o700)
        descriptor = locked(self._generations, fcntl.LOCK_EX, busy=self._busy())
        try:
            yield
        finally:
            os.close(descriptor)

    def _busy(self) -> StateError:
        return StateError(
            f"jail `{self.name}` is being built or removed by another process", hint="try again when it is done"
        )

    def _sweep(self) -> int:
        left = [
            entry.name
            for entry in os.scandir(self._generations)
            if entry.name.startswith((_BUILDING, REMOVING))
        ]
        for name in left:
            on_files(self.ids, remove_tree, self._generations / name)
        for entry in os.scandir(self.directory):
            if entry.name.startswith(".current-"):
                os.unlink(entry.path)
        return len(left)

    def _switch(self, number: int) -> None:
        """Point `current` at generation `number` by one rename, on disk when this returns."""
        scratch = self.directory / f".current-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        os.symlink(f"generations/{number:04}", scratch)
        os.rename(scratch, self.directory / "current")
        _sync_directory(self.directory)

    def _discard(self, number: int) -> bool:
        """Remove a generation, unless it is in use."""
        try:
            with self.hold(number, exclusive=True):
                # Renamed first, so that half a generation never stands under its own name.
                aside = self._generations / f"{REMOVING}{fresh_suffix()}"
                os.rename(self.place(number), aside)
                on_files(self.ids, remove_tree, aside)
        except StateError:
            return False
        return True


def locked(path: Path, kind: int, *, busy: StateError, opening: int = os.O_DIRECTORY) -> int:
    """A descriptor of `path`, a directory unless `opening` says otherwise, with a flock(2) on it.

    `busy` when another holds one.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | opening, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise busy from error
    return descriptor


def fresh_suffix() -> str:
    """What makes a name unlike any other."""
    return os.urandom(8).hex()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def failures_explained(path: Path) -> Iterator[None]:
    """Turn an OSError of the disk that holds `path` into a BuildError, with what to do about a full one."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                f"no space is left for the new root below `{path}`",
                hint="free some and build again; the generation before is untouched",
            ) from error
        raise BuildError(
            f"the new root below `{path}` cannot be made: {error}", hint="the generation before is untouched"
        ) from error
