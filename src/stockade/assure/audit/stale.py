"""Compare a tree with its lock and with the files and packages that the host has now."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from stockade.kernel.beneath import Root
from stockade.records.finding import Unchecked
from stockade.records.lock import LockEntry
from stockade.records.text import unescape
from stockade.resolve.packages import PackageIndex

from . import dpkg
from .seen import Seen
from .subject import Subject
from .tree import Node, read_inside

__all__ = ["Copies", "Lock", "digest", "packages", "status"]

_CHUNK = 1 << 20
_STATUS = "/var/lib/dpkg/status"
# Where files of packages are that nobody edits.
_PROGRAMS = ("/usr/", "/bin/", "/sbin/", "/lib")


def digest(descriptor: int) -> str:
    """SHA-256 in hexadecimal of what an open file holds."""
    result = hashlib.sha256()
    offset = 0
    while block := os.pread(descriptor, _CHUNK, offset):
        result.update(block)
        offset += len(block)
    return result.hexdigest()


class Lock:
    """A jail's tree against its lock, and the locked files against the host's present ones."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._left = set(subject.entries)

    def see(self, node: Node) -> Iterator[Seen]:
        """Compare what lstat(2) says of one entry."""
        entry = self._subject.entries.get(node.path)
        if entry is None:
            yield Seen("CHANGED", node.path, "is not in the lock")
            return
        self._left.discard(node.path)
        mode, owner = stat.S_IMODE(node.status.st_mode), (node.status.st_uid, node.status.st_gid)
        kind = "file" if node.is_file else "directory" if node.is_directory else "symlink" if node.is_link else "other"
        if kind != entry.type:
            yield Seen("CHANGED", node.path, f"was a {entry.type}")
        elif owner != (entry.uid, entry.gid):
            yield Seen("CHANGED", node.path, f"belonged to {entry.uid}:{entry.gid}, now to {owner[0]}:{owner[1]}")
        elif kind == "symlink":
            yield from self._target(node, entry)
        elif mode != entry.mode:
            yield Seen("CHANGED", node.path, f"had mode {entry.mode:04o}, now {mode:04o}")

    @staticmethod
    def _target(node: Node, entry: LockEntry) -> Iterator[Seen]:
        try:
            target = os.readlink(node.name, dir_fd=node.directory)
        except OSError as error:
            yield Seen("VANISHED", node.path, (error.strerror or "").lower())
            return
        if target != unescape(entry.target):
            yield Seen("CHANGED", node.path, f"led to `{unescape(entry.target)}`, now to `{target}`")

    def content(self, node: Node, descriptor: int) -> Iterator[Seen]:
        """Compare the content of one file. What has another size is not read."""
        entry = self._subject.entries.get(node.path)
        if entry is None or entry.secret or entry.type != "file":
            return
        if node.status.st_size != entry.size or digest(descriptor) != entry.sha256:
            yield Seen("CHANGED", node.path, "has other content")

    def missing(self) -> Iterator[Seen]:
        """Entries of the lock that were not seen."""
        for path in sorted(self._left):
            yield Seen("CHANGED", path, "is missing")

    def stale(self) -> Iterator[Seen]:
        """Copied files that the host has in another version now, or no longer."""
        versions = dpkg.of_host(self._subject.host)
        for path, entry in self._subject.entries.items():
            if entry.type != "file" or not entry.sha256 or any(found.kind == "generated" for found in entry.evidence):
                continue
            difference = _differs(self._subject.host, unescape(entry.source) or path, entry.size, entry.sha256)
            if difference:
                yield Seen("STALE", path, f"{_origin(entry, versions)}: {difference}")


def _origin(entry: LockEntry, versions: dict[str, str]) -> str:
    if not entry.package:
        return "from no package"
    now = versions.get(entry.package)
    if now is None:
        return f"from {entry.package} {entry.package_version}, which the host no longer has"
    if now == entry.package_version:
        return f"from {entry.package} {now}, which the host still has"
    return f"from {entry.package} {entry.package_version}, and the host has {now} now"


def _differs(host: Path, path: str, size: int, sha256: str) -> str:
    """How the host's file differs; "" when it does not."""
    try:
        descriptor = os.open(f"{host}/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return "the host's file is gone"
    except OSError as error:
        return f"the host's file cannot be compared: {(error.strerror or '').lower()}"
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "the host has no file there any more"
        if status.st_size != size or digest(descriptor) != sha256:
            return "the host's file is another one"
        return ""
    finally:
        os.close(descriptor)


class Copies:
    """A tree without packages of its own against the host's: programs and libraries that were copied from there."""

    def __init__(self, subject: Subject) -> None:
        self._host = subject.host
        self._index: PackageIndex | None = None

    def content(self, node: Node, descriptor: int, *, is_elf: bool) -> Iterator[Seen]:
        """Compare the content of one program or library with the host's file of the same path."""
        if not node.path.startswith(_PROGRAMS) or not (is_elf or node.status.st_mode & 0o111):
            return
        if self._index is None:
            self._index = PackageIndex.load(str(self._host))
        package = self._index.owner(node.path)
        if package is None:
            return
        size = _size(f"{self._host}/{node.path}")
        if size is None:
            return
        if size != node.status.st_size or _differs(self._host, node.path, size, digest(descriptor)):
            yield Seen("STALE", node.path, f"another file than that of the host's {' '.join(package)}")


def _size(path: str) -> int | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def status(root: Root) -> bytes | None:
    """The tree's own dpkg database, None where it has none."""
    return read_inside(root, _STATUS, limit=64 << 20)


def packages(root: Root, database: bytes, subject: Subject) -> Iterator[Seen | Unchecked]:
    """Packages of a tree that has a dpkg database of its own, older than the host's."""
    ours = dpkg.of_host(subject.host)
    release = dpkg.release(read_inside(root, "/etc/os-release") or b"")
    host_release = dpkg.release((subject.host / "etc/os-release").read_bytes()) if ours else ""
    if not ours or release != host_release:
        yield Unchecked(
            code="STALE-PACKAGE",
            reason=f"the tree is {release or 'of an unknown release'}, the host {host_release or 'without packages'}: "
            "their versions cannot be compared",
        )
        return
    for name, version in sorted(dpkg.versions(database).items()):
        newer = ours.get(name)
        if newer is not None and dpkg.compare(version, newer) < 0:
            yield Seen("STALE-PACKAGE", _STATUS, f"{name} {version}, and the host has {newer}")
