"""Which Debian package a path belongs to, from dpkg's own files. Never runs dpkg."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Protocol

from .hashedtable import HashedTable

__all__ = ["PackageIndex"]

_MERGED = ("/bin/", "/sbin/", "/lib/", "/lib32/", "/lib64/", "/libx32/", "/libo32/")
_COMPILED = re.compile(r"(?s)(.*/)([^/]+?)(?:\.cpython-\d+)?(?:\.opt-[12])?\.py[co]\Z")
_STANZA = re.compile(r"^Package: (\S+)$(?:\n(?!\n).*)*?\nVersion: (\S+)$", re.MULTILINE)


class _Known(Protocol):
    def get(self, key: str) -> str | None:
        """The package that has the path `key`; the version of the package `key`. No name of a package has a slash."""


class PackageIndex:
    """Owners of all paths that dpkg knows below one root."""

    def __init__(self, known: _Known, diversions: dict[str, tuple[str, str]]) -> None:
        self._known, self._diversions = known, diversions
        self._versions: dict[str, str] = {}

    @classmethod
    def load(cls, root: str = "/", *, cache: Path | None = None) -> PackageIndex:
        """Read every `.list` file, and the versions, once. A root without dpkg gives an index that knows nothing.

        `cache` is a file of the caller's that keeps what was read, and is read instead as long as dpkg changes nothing.
        """
        database = Path(root) / "var/lib/dpkg"
        known: _Known | None = None
        if cache is not None:
            known = HashedTable.open(cache, _state(database))
        if known is None:
            known = read = _read(database / "info") | _versions(database / "status")
            if cache is not None:
                # The next build reads the lists again, that is all.
                with contextlib.suppress(OSError):
                    HashedTable.write(cache, _state(database), read)
        return cls(known, _diversions(database / "diversions"))

    def owner(self, path: str) -> tuple[str, str] | None:
        """Package and version of the absolute `path`, or None when no package has it.

        /lib and /usr/lib are one (merged /usr), and a compiled Python file belongs to its source's package.
        """
        package = self._package(path)
        if package is None:
            compiled = _COMPILED.match(path)
            package = self._package(f"{compiled[1].removesuffix('__pycache__/')}{compiled[2]}.py") if compiled else None
        if package is None:
            return None
        if package not in self._versions:
            self._versions[package] = self._known.get(package) or ""
        return package, self._versions[package]

    def _package(self, path: str) -> str | None:
        for name in _aliases(path):
            moved = self._diversions.get(name)
            if moved is not None:
                original, package = moved
                return package or self._known.get(original)
            package_found = self._known.get(name)
            if package_found is not None:
                return package_found
        return None


def _read(info: Path) -> dict[str, str]:
    """The owner of each path in the `.list` files in `info`."""
    owners: dict[str, str] = {}
    try:
        names = sorted(os.listdir(info), reverse=True)
    except OSError:
        names = []
    # Read in reverse, so that of several owners of a directory the first in the alphabet stays.
    for name in names:
        if name.endswith(".list"):
            with open(info / name, "rb") as file:
                paths = os.fsdecode(file.read()).split("\n")
            owners.update(dict.fromkeys(paths, name[:-5].partition(":")[0]))
    owners.pop("", None)
    return owners


def _state(database: Path) -> str:
    """What changes whenever dpkg does something: it replaces these by renaming."""
    parts = []
    for name in ("status", "info", "diversions"):
        try:
            status = (database / name).stat()
        except OSError:
            continue
        parts.append(f"{name} {status.st_ino} {status.st_size} {status.st_mtime_ns}")
    return f"paths and versions of {database} {'; '.join(parts)}"


def _aliases(path: str) -> tuple[str, ...]:
    """The names that dpkg may know a path by on a host with merged /usr."""
    if path.startswith("/usr/") and path[4:].startswith(_MERGED):
        return (path, path[4:])
    if path.startswith(_MERGED):
        return (path, f"/usr{path}")
    return (path,)


def _versions(status: Path) -> dict[str, str]:
    try:
        text = status.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return dict(_STANZA.findall(text))


def _diversions(path: Path) -> dict[str, tuple[str, str]]:
    """dpkg-divert(1)'s records: the diverted name belongs to who diverted it, the new name to the old one's owner.

    Each path gives the name under which `.list` files know it and its package, "" when they do.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return {}
    result: dict[str, tuple[str, str]] = {}
    for original, moved, package in zip(lines[::3], lines[1::3], lines[2::3], strict=False):
        if package != ":":
            result[original] = (original, package.partition(":")[0])
        result[moved] = (original, "")
    return result
