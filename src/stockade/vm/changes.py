"""What a guest's disk has that its clean image has not: files, setuid, accounts, packages. Nothing is mounted."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stockade.errors import HostError, StateError
from stockade.records.guest import Change, PackageChange

from . import cow
from .ext4 import FileSystem, Node

__all__ = ["accounts", "compare", "merged", "new_accounts", "package_changes", "packages"]

_TIMEOUT_S = 600
#: Where a boot writes by itself.
_OWN = ("/lost+found",)


@contextmanager
def merged(disk: Path, base: Path, directory: Path) -> Iterator[Path]:
    """The whole disk of a copy-on-write file, for the length of the block, its journal replayed."""
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=directory) as scratch:
        whole = Path(scratch) / "disk"
        cow.merge(disk, base, whole)
        try:
            done = subprocess.run(
                ["e2fsck", "-E", "journal_only", "-y", str(whole)], stdin=subprocess.DEVNULL, capture_output=True,
                timeout=_TIMEOUT_S, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, check=False,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise HostError("`e2fsck` is not installed", hint="`apt-get install e2fsprogs`") from error
        # e2fsck(8): 1 is "errors corrected".
        if done.returncode & ~3:
            raise StateError(
                f"the journal of `{disk}` cannot be replayed: {done.stderr.decode('utf-8', 'replace').strip()}",
                hint="restore a snapshot",
            )
        yield whole


def compare(clean: Path, now: Path, written: list[tuple[int, int]] | None = None) -> list[Change]:
    """Every path that differs between two images, sorted.

    Contents are read where the inode differs, and where the disk was written below a file that claims to be the same:
    a file's times can be set back. `written` are runs of sectors of 512 bytes; without them all is read.
    """
    found: list[Change] = []
    with FileSystem(clean) as before, FileSystem(now) as after:
        old = dict(before.walk())
        new = dict(after.walk())
        touched = _blocks(written, after.block_size) if written is not None else None
        for path in sorted(old.keys() | new.keys()):
            if path.startswith(_OWN):
                continue
            one, other = old.get(path), new.get(path)
            if one is None and other is not None:
                found.append(Change(path=path, kind="added", type=other.type, notes=_notes(path, None, other)))
            elif other is None and one is not None:
                found.append(Change(path=path, kind="removed", type=one.type))
            elif one is not None and other is not None and _differ(before, one, after, other, touched):
                found.append(Change(path=path, kind="changed", type=other.type, notes=_notes(path, one, other)))
    return found


def _blocks(written: list[tuple[int, int]], block_size: int) -> set[int]:
    per = block_size // cow.SECTOR
    return {block for start, end in written for block in range(start // per, -(-end // per))}


def _differ(before: FileSystem, one: Node, after: FileSystem, other: Node, touched: set[int] | None) -> bool:
    if (one.type, one.mode, one.uid, one.gid, one.target, one.device) != (
        other.type, other.mode, other.uid, other.gid, other.target, other.device,
    ):  # fmt: skip
        return True
    if one.type != "file":
        return False
    if one.size != other.size:
        return True
    same = one.extents == other.extents and (one.mtime, one.ctime) == (other.mtime, other.ctime)
    if same and touched is not None:
        below = (block for _, length, start in other.extents if start for block in range(start, start + length))
        if touched.isdisjoint(below):
            return False
    return hashlib.sha256(before.read(one)).digest() != hashlib.sha256(after.read(other)).digest()


def _notes(path: str, one: Node | None, other: Node) -> tuple[str, ...]:
    notes = []
    special = stat.S_ISUID | stat.S_ISGID
    if other.type == "file" and other.mode & special and (one is None or not one.mode & special):
        notes.append("setuid" if other.mode & stat.S_ISUID else "setgid")
    if other.type == "special" and stat.S_IFMT(other.mode) in (stat.S_IFBLK, stat.S_IFCHR):
        notes.append("device")
    if other.mode & stat.S_IWOTH and other.type == "file":
        notes.append("world-writable")
    if path in ("/etc/passwd", "/etc/shadow", "/etc/group", "/etc/sudoers") or path.startswith("/etc/sudoers.d/"):
        notes.append("accounts")
    if path.endswith("/authorized_keys"):
        notes.append("ssh key")
    if path.startswith(("/etc/cron", "/var/spool/cron", "/etc/systemd/system", "/etc/init.d", "/etc/rc")):
        notes.append("started by itself")
    return tuple(notes)


def accounts(image: Path) -> dict[str, tuple[str, ...]]:
    """The lines of passwd(5), by name."""
    with FileSystem(image) as system:
        lines = [line.split(":") for line in system.text("/etc/passwd").splitlines()]
    return {line[0]: tuple(line) for line in lines if len(line) >= 7}


def new_accounts(clean: Path, now: Path) -> tuple[str, ...]:
    """Accounts that are new or have another uid, home or shell."""
    before, after = accounts(clean), accounts(now)
    return tuple(sorted(name for name, line in after.items() if before.get(name) != line))


def packages(image: Path) -> dict[str, str]:
    """Installed Debian packages and their versions, of dpkg's status file."""
    found: dict[str, str] = {}
    with FileSystem(image) as system:
        text = system.text("/var/lib/dpkg/status")
    for paragraph in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" ")
        )
        if fields.get("Status", "").endswith(" installed"):
            found[fields.get("Package", "")] = fields.get("Version", "")
    return found


def package_changes(clean: Path, now: Path) -> list[PackageChange]:
    """Packages whose version differs, sorted."""
    before, after = packages(clean), packages(now)
    return [
        PackageChange(package=name, before=before.get(name, ""), after=after.get(name, ""))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
