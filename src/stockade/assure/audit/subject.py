"""What is audited: a jail that Stockade built, with all that is known of it, or somebody else's directory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from stockade.errors import StateError
from stockade.kernel import loop
from stockade.records.generation import Generation
from stockade.records.lock import Lock, LockEntry
from stockade.records.spec import Spec
from stockade.records.text import unescape
from stockade.records.trace import Trace

__all__ = ["Subject", "of_directory", "of_generation"]


@dataclass(frozen=True)
class Subject:
    """A tree at `root` and, of a jail, its lock, the spec that it was built from and the trace of what was observed.

    `user` is the id that the service has in a directory, None where nobody said. `unlimited` is why the jail's volumes
    cannot be limited here. `host` is where the host's own files are found, for comparison.
    """

    name: str
    root: Path
    generation: int | None = None
    lock: Lock | None = None
    spec: Spec | None = None
    trace: Trace | None = None
    user: int | None = None
    unlimited: str = ""
    host: Path = field(default=Path("/"))

    @functools.cached_property
    def entries(self) -> Mapping[str, LockEntry]:
        """The lock's entries by path; empty without a lock."""
        return {unescape(entry.path): entry for entry in self.lock.entries} if self.lock is not None else {}

    @functools.cached_property
    def launched(self) -> tuple[str, ...]:
        """Directories that a launch mounts over: what the tree has there is hidden, or a volume's first content."""
        return tuple(unescape(found.path) for found in self.lock.directories) if self.lock is not None else ()

    @functools.cached_property
    def only_id(self) -> int | None:
        """The id that owns every file of a jail whose user has no other, so that ownership says nothing."""
        owners = {entry.uid for entry in self.entries.values()}
        return owners.pop() if len(owners) == 1 and 0 not in owners else None

    @property
    def reasons(self) -> Mapping[str, str]:
        """The spec's `files.reasons`."""
        return self.spec.files.reasons if self.spec is not None else {}

    def covered(self, path: str) -> bool:
        """Whether `path` is, or lies in, a directory that a launch mounts over."""
        return any(path == place or path.startswith(f"{place}/") for place in self.launched)


def of_directory(path: Path, *, user: int | None = None) -> Subject:
    """The directory at `path`; its service runs as the id `user`."""
    return Subject(name=str(path), root=path, user=user)


def of_generation(name: str, generation: Generation) -> Subject:
    """The jail `name` as it stands in `generation`. StateError when its spec or trace cannot be read."""
    try:
        spec = msgspec.json.decode((generation.path / "spec.json").read_bytes(), type=Spec)
        trace = _trace(generation.path / "trace.json")
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise StateError(
            f"what was kept of jail `{name}` in `{generation.path}` is damaged: {error}",
            hint=f"`stockade build {name}` makes a new generation",
        ) from error
    return Subject(
        name=name, root=generation.rootfs, generation=generation.number, lock=generation.lock, spec=spec, trace=trace,
        unlimited=loop.lacking(),
    )  # fmt: skip


def _trace(path: Path) -> Trace | None:
    """The observed run; None for a jail that was built from a lock or without observation."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Trace)
    except FileNotFoundError:
        return None
