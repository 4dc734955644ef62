"""Look at paths below a root directory, following symlinks inside that root. Never writes and never leaves it."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

__all__ = ["Host", "Walk"]

_MAX_LINKS = 40  # path_resolution(7): more symlinks than this give ELOOP


class Walk(NamedTuple):
    """Where a path leads.

    `path` is the canonical path (no symlink, no `.` or `..`) of what was reached, or of what is
    missing. `links` are the symlinks that were followed, each with its canonical path and its
    target. `status` is the lstat of what was reached, None when `error` (an errno name) says why not.
    """

    path: str
    links: tuple[tuple[str, str], ...]
    status: os.stat_result | None
    error: str

    @property
    def is_file(self) -> bool:
        """A regular file was reached."""
        return self.status is not None and stat.S_ISREG(self.status.st_mode)

    @property
    def is_directory(self) -> bool:
        """A directory was reached."""
        return self.status is not None and stat.S_ISDIR(self.status.st_mode)

    @property
    def is_link(self) -> bool:
        """A symlink was reached, and not followed."""
        return self.status is not None and stat.S_ISLNK(self.status.st_mode)


class Host:
    """The tree below `root`, seen as `/`. What was looked at is remembered, so make one for each run."""

    def __init__(self, root: str = "/") -> None:
        self.root = os.path.abspath(root)
        self._prefix = "" if self.root == "/" else self.root
        self._status: dict[str, tuple[os.stat_result | None, str]] = {}
        self._targets: dict[str, str] = {}
        self._walks: dict[tuple[str, bool], Walk] = {}
        self._directories: dict[str, tuple[str, tuple[tuple[str, str], ...]] | None] = {}

    def outer(self, path: str) -> str:
        """The path on the real host of the canonical `path`."""
        return self._prefix + path

    def status(self, path: str) -> tuple[os.stat_result | None, str]:
        """lstat of the canonical `path`, or None and the errno name."""
        known = self._status.get(path)
        if known is None:
            known = self._status[path] = self._lstat(path)
        return known

    def _lstat(self, path: str) -> tuple[os.stat_result | None, str]:
        try:
            return os.lstat(self._prefix + path), ""
        except OSError as error:
            return None, errno.errorcode.get(error.errno or 0, "EIO")
        except ValueError:  # a NUL byte or a lone surrogate: no such name can exist
            return None, "ENOENT"

    def walk(self, path: str, *, follow: bool = True) -> Walk:
        """Resolve `path` from the root, component by component; `follow` says whether the last symlink is followed.

        See path_resolution(7). Never raises: a loop gives the error ELOOP.
        """
        known = self._walks.get((path, follow))
        if known is None:
            known = self._walks[(path, follow)] = self._walk(path, follow)
        return known

    def _walk(self, path: str, follow: bool) -> Walk:
        above, _, name = path.rpartition("/")
        start = self._directories.get(above)
        if start is None and above:
            found = self._resolve(above.split("/"), True, "", ())
            start = self._directories[above] = (found.path.rstrip("/"), found.links) if found.is_directory else None
        if start is not None and name:  # begin where many paths have been before
            return self._resolve([name], follow, *start)
        return self._resolve(path.split("/"), follow, "", ())

    def _resolve(self, pending: list[str], follow: bool, current: str, before: tuple[tuple[str, str], ...]) -> Walk:
        """Follow the names `pending` from the canonical directory `current`, reached by the links `before`."""
        pending.reverse()
        status, error = self.status(current or "/")
        links = list(before)
        while pending:
            name = pending.pop()
            if status is not None and not stat.S_ISDIR(status.st_mode):  # a trailing `/` or `/.` asks for one too
                return Walk(_joined(current, name, pending), tuple(links), None, "ENOTDIR")
            if not name or name == ".":
                continue
            if name == "..":
                current = current.rpartition("/")[0]
                status, error = self.status(current or "/")
                continue
            here = f"{current}/{name}"
            status, error = self.status(here)
            if status is None:
                return Walk(_joined(current, name, pending), tuple(links), None, error)
            if stat.S_ISLNK(status.st_mode) and (follow or pending):
                if len(links) == _MAX_LINKS:
                    return Walk(here, tuple(links), None, "ELOOP")
                target = self.target(here)
                links.append((here, target))
                if target.startswith("/"):
                    current = ""
                status, error = self.status(current or "/")
                pending.extend(reversed(target.split("/")))
                continue
            current = here
        return Walk(current or "/", tuple(links), status, error)

    def target(self, path: str) -> str:
        """What the symlink at the canonical `path` holds; "" when it vanished."""
        known = self._targets.get(path)
        if known is None:
            try:
                known = os.readlink(self._prefix + path)
            except OSError:
                known = ""
            self._targets[path] = known
        return known

    def names(self, path: str) -> tuple[str, ...]:
        """Sorted names in the directory that `path` leads to; empty when there is none to read."""
        found = self.walk(path)
        if not found.is_directory:
            return ()
        try:
            return tuple(sorted(os.listdir(self.outer(found.path))))
        except OSError:
            return ()

    def text(self, path: str, *, limit: int = 1 << 20) -> str | None:
        """Text of the regular file that `path` leads to, at most `limit` bytes; None when it can't be read."""
        data = self.data(path, limit=limit)
        return None if data is None else os.fsdecode(data)

    def data(self, path: str, *, limit: int) -> bytes | None:
        """The first `limit` bytes of the regular file that `path` leads to; None when it can't be read."""
        found = self.walk(path)
        if not found.is_file:
            return None
        try:
            with open(self.outer(found.path), "rb", buffering=0) as file:
                return file.read(limit)
        except OSError:
            return None


def _joined(current: str, name: str, pending: list[str]) -> str:
    """The path of what is missing: what was resolved so far, then the rest as it stands."""
    rest = [part for part in (name, *reversed(pending)) if part and part != "."]
    return "/".join([current, *rest])
