"""What is made at each launch instead of being in the rootfs: tmpfs directories and volumes. Pure data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import msgspec

from stockade.errors import SpecError
from stockade.records.closure import Closure, WorkDirectory
from stockade.records.lock import LockDirectory
from stockade.records.policy import size_bytes
from stockade.records.spec import Directory, Spec
from stockade.records.text import escape

from .accounts import AccountFiles, owner
from .links import Links
from .permissions import state

__all__ = ["Layout", "layout", "volume_name"]

#: Always there, unless the spec says otherwise or a file of the jail lies in one.
_DEFAULT = (("/run", 0o755), ("/tmp", 0o1777))
_UNNAMED = re.compile(r"[^a-z0-9._-]+")


def volume_name(path: str) -> str:
    """The name of the volume for `path` where the spec gives none: `/var/lib/x` is `var-lib-x`.

    A path that such a name does not give back gets a digest behind it, so that no two paths share a name.
    """
    name = _UNNAMED.sub("-", path.lower().strip("/")).strip("-._")
    if "/" + name.replace("-", "/") == path and len(name) <= 63:
        return name
    return f"{name[:54] or 'volume'}-{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:8]}"


class Layout:
    """Directories made at launch, by canonical path, and those of the rootfs that the spec or the state asks for."""

    def __init__(self) -> None:
        self.launched: dict[str, LockDirectory] = {}
        self.fixed: dict[str, WorkDirectory] = {}

    def above(self, path: str, *, itself: bool = False) -> LockDirectory | None:
        """The innermost launched directory that `path` lies in (or, with `itself`, is)."""
        if itself and path in self.launched:
            return self.launched[path]
        while path != "/":
            path = path.rpartition("/")[0] or "/"
            if path in self.launched:
                return self.launched[path]
        return None

    def hidden(self, path: str) -> bool:
        """Whether what the rootfs has at `path` is hidden by a tmpfs."""
        found = self.above(path)
        return found is not None and not found.volume

    def in_volume(self, path: str) -> bool:
        """Whether `path` is a volume's mount point or lies in one."""
        found = self.above(path, itself=True)
        return found is not None and bool(found.volume)

    def locked(self) -> tuple[LockDirectory, ...]:
        """The launched directories as a lock holds them."""
        return tuple(
            msgspec.structs.replace(found, path=escape(path)) for path, found in sorted(self.launched.items())
        )


def layout(closure: Closure, spec: Spec, links: Links, accounts: AccountFiles, files: Iterable[str]) -> Layout:
    """Where tmpfs and volumes stand.

    The spec's directories win over the observed ones. Observed state within a volume, and an observed volume within
    a tmpfs, are plain directories of what is around them. `files` are canonical paths of files in the rootfs: the
    default tmpfs on /run or /tmp is left out rather than hiding one.
    """
    made = Layout()
    for path, directory in spec.directories.items():
        place = links.resolve(path)
        if place == "/":
            raise SpecError("`directories.\"/\"` cannot be: the root itself is read-only", hint="name what is below it")
        uid, gid = owner(accounts, directory.owner)
        mode = int(directory.mode, 8) & 0o1777
        if directory.kind == "fixed":
            made.fixed[place] = WorkDirectory(path=place, mode=mode, uid=uid, gid=gid)
            continue
        volume = (directory.volume or volume_name(place)) if directory.kind == "volume" else ""
        size, inodes = _limits(directory) if volume else (0, 0)
        made.launched[place] = LockDirectory(
            path=place, mode=mode, uid=uid, gid=gid, volume=volume, size=size, inodes=inodes
        )

    observed = sorted((links.resolve(found.path), found) for found in closure.tmpfs)
    for place, found in observed:
        _add(made, place, found, volume="")
    files = list(files)
    for place, mode in _DEFAULT:
        covered = any(path.startswith(f"{place}/") for path in files)
        if place not in made.launched and place not in made.fixed and not covered:
            made.launched[place] = LockDirectory(path=place, mode=mode)
    for place, found in sorted((links.resolve(found.path), found) for found in closure.state):
        around = made.above(place)
        if around is not None and around.volume:
            made.fixed.setdefault(place, found)
        else:
            _add(made, place, found, volume="" if around is not None else volume_name(place))
    return made


def _limits(directory: Directory) -> tuple[int, int]:
    return size_bytes(directory.size) if directory.size else 0, directory.inodes or 0


def _add(made: Layout, place: str, found: WorkDirectory, *, volume: str) -> None:
    if place in made.launched or place in made.fixed or place == "/":
        return
    mode, uid, gid = state(found.mode, found.uid, found.gid, directory=True)
    made.launched[place] = LockDirectory(path=place, mode=mode, uid=uid, gid=gid, volume=volume)
