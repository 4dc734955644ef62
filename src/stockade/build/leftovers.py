"""What builds and removals that failed or were killed left on disk: found and removed. Never touches a built jail."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stockade import places
from stockade.errors import StateError, UsageError

from .generations import REMOVING, Ids, Store, caller_ids, fresh_suffix, locked, on_files, remove_tree

__all__ = ["attempt", "sweep", "sweep_removed"]


@contextlib.contextmanager
def attempt(store: Store) -> Iterator[None]:
    """Keep the jail's directory while it is being built; of a first build that failed nothing stays."""
    descriptor = _kept(store.directory)
    try:
        yield
    finally:
        os.close(descriptor)
        _discard_unbuilt(store)


def _kept(directory: Path) -> int:
    """A descriptor of `directory` with a shared flock(2) on it, by which others see that somebody builds there."""
    while True:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # Whoever removed it had the lock until then.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                return descriptor
        os.close(descriptor)


def _discard_unbuilt(store: Store) -> bool:
    """Remove a jail that was never built, unless somebody builds it now or it holds volumes."""
    if not store.exists() or store.generations() or store.volumes.exists():
        return False
    try:
        descriptor = locked(store.directory, fcntl.LOCK_EX, busy=StateError("it is being built"))
    except (StateError, FileNotFoundError):
        return False
    try:
        if store.generations():
            return False
        aside = store.directory.with_name(f"{REMOVING}{store.name}-{fresh_suffix()}")
        os.rename(store.directory, aside)
    finally:
        os.close(descriptor)
    on_files(store.ids, remove_tree, aside)
    return True


def sweep(name: str | None = None) -> None:
    """Remove what was left of the jail `name`, or of all of the caller's jails. What a living process makes stays."""
    for known in [name] if name is not None else _names():
        with contextlib.suppress(UsageError):
            store = Store(known)
            store.sweep()
            _discard_unbuilt(store)
    sweep_removed(caller_ids())


def _names() -> list[str]:
    try:
        return [entry.name for entry in os.scandir(places.jails()) if not entry.name.startswith(".")]
    except FileNotFoundError:
        return []


def sweep_removed(ids: Ids) -> int:
    """Remove what killed removals of whole jails left; the number of directories removed."""
    try:
        left = [entry.path for entry in os.scandir(places.jails()) if entry.name.startswith(REMOVING)]
    except FileNotFoundError:
        return 0
    for path in left:
        on_files(ids, remove_tree, Path(path))
    return len(left)
