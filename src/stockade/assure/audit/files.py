"""Checks of single entries by what lstat(2) says: modes, owners, special files, symbolic and hard links."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping

from stockade.kernel.beneath import Root

from .catalogue import lists
from .seen import Mend, Seen
from .subject import Subject
from .tree import Node

__all__ = ["HardLinks", "mounted", "owners_and_modes", "special", "symlink"]

_EXECUTABLE = 0o111
_SHADOW = frozenset({"/etc/shadow", "/etc/gshadow", "/etc/shadow-", "/etc/gshadow-"})


def owners_and_modes(node: Node, subject: Subject) -> Iterator[Seen]:
    """Who may change `node`, and with whose rights it runs."""
    mode, uid, gid = node.status.st_mode, node.status.st_uid, node.status.st_gid
    if not (node.is_file or node.is_directory):
        return
    shown = f"mode {stat.S_IMODE(mode):04o}, owner {uid}:{gid}"
    if node.is_file and mode & stat.S_ISUID:
        yield Seen("SETUID", node.path, shown, _without(node, stat.S_ISUID))
    # Without the group's execute bit, setgid means mandatory locking and gives no right (inode(7)).
    if node.is_file and mode & stat.S_ISGID and mode & stat.S_IXGRP:
        yield Seen("SETGID", node.path, shown, _without(node, stat.S_ISGID))
    if subject.covered(node.path):
        return
    if node.path in _SHADOW and mode & (stat.S_IROTH | stat.S_IWOTH):
        yield Seen("SHADOW-READABLE", node.path, shown, _without(node, stat.S_IRWXO))
    who = _writer(mode, 0 if uid == subject.only_id else uid, gid, subject.user)
    if who:
        yield Seen(_writable(node), node.path, f"{shown}: {who} may write", _unwritable(node))
    if uid not in (0, subject.only_id):
        yield Seen("NOT-ROOT", node.path, shown)


def _writer(mode: int, uid: int, gid: int, user: int | None) -> str:
    """Who but root may write: "" for nobody. With `user`, an owner that is not that id does not count."""
    if mode & stat.S_IWOTH:
        return "everybody"
    if mode & stat.S_IWGRP and gid != 0:
        return f"group {gid}"
    if mode & stat.S_IWUSR and uid != 0 and user in (None, uid):
        return f"user {uid}"
    return ""


def _without(node: Node, bits: int) -> Mend:
    return Mend("mode", bits & node.status.st_mode, identity=(node.status.st_dev, node.status.st_ino))


def _unwritable(node: Node) -> Mend | None:
    """Group and others lose the right to write. What an owner may do only another owner changes: that is not mended."""
    shared = node.is_directory and node.status.st_mode & stat.S_ISVTX
    bits = node.status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return _without(node, bits) if bits and not shared else None


def _writable(node: Node) -> str:
    if node.is_directory:
        return "SHARED-DIRECTORY" if node.status.st_mode & stat.S_ISVTX else "WRITABLE-DIRECTORY"
    if node.status.st_mode & _EXECUTABLE or ".so" in node.name:
        return "WRITABLE-PROGRAM"
    return "WRITABLE-FILE"


def special(node: Node) -> Iterator[Seen]:
    """Devices beyond the harmless ones, sockets and FIFOs; content of /proc and /sys."""
    mode = node.status.st_mode
    if stat.S_ISSOCK(mode):
        yield Seen("SOCKET", node.path, f"mode {stat.S_IMODE(mode):04o}")
    elif stat.S_ISFIFO(mode):
        yield Seen("FIFO", node.path, f"mode {stat.S_IMODE(mode):04o}")
    elif stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        yield from _device(node)
    if node.path.count("/") == 2 and node.path.startswith(("/proc/", "/sys/")):
        yield Seen("PROC-CONTENT", node.path, "there without a mount")


def _device(node: Node) -> Iterator[Seen]:
    major, minor = os.major(node.status.st_rdev), os.minor(node.status.st_rdev)
    block = stat.S_ISBLK(node.status.st_mode)
    known, number = lists()["devices"], f"{major}:{minor}"
    if not block and (number in known["harmless"] or major in known["harmless_majors"]):
        return
    raw = block or number in known["raw"] or major in known["raw_majors"]
    kind, mode = "block" if block else "character", stat.S_IMODE(node.status.st_mode)
    yield Seen("DEVICE-RAW" if raw else "DEVICE", node.path, f"{kind} device {number}, mode {mode:04o}")


def symlink(node: Node, root: Root, subject: Subject) -> Iterator[Seen]:
    """Where a symbolic link leads: inside as the kernel resolves it, and for a program that follows it outside."""
    try:
        target = os.readlink(node.name, dir_fd=node.directory)
    except OSError as error:
        yield Seen("VANISHED", node.path, (error.strerror or "").lower())
        return
    if not target.startswith("/") and _climbs(node.path, target):
        yield Seen("LINK-OUTSIDE", node.path, f"leads to `{target}`")
    try:
        os.close(root.openat(node.path, os.O_PATH, follow=True))
    except OSError as error:
        if _made_at_launch(node.path, target, subject):
            return
        if error.errno == errno.ELOOP:
            yield Seen("LINK-LOOP", node.path, f"leads to `{target}`")
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            outside = target.startswith("/") and os.path.lexists(target)
            hint = ", which is there on the host and not inside" if outside else ""
            yield Seen("LINK-DANGLING", node.path, f"leads to `{target}`{hint}")


def _climbs(path: str, target: str) -> bool:
    depth = path.count("/") - 1
    for part in target.split("/"):
        depth += -1 if part == ".." else 1 if part not in ("", ".") else 0
        if depth < 0:
            return True
    return False


def _made_at_launch(path: str, target: str, subject: Subject) -> bool:
    """Whether a link leads to what is there once the service, or a system in this tree, runs."""
    place = os.path.normpath(os.path.join(os.path.dirname(path), target))
    place = "/" + place.lstrip("/")
    known = (*lists()["links"]["made_at_launch"], *subject.launched)
    return any(place == prefix or place.startswith(f"{prefix}/") for prefix in known)


class HardLinks:
    """Counts the names that files with several have inside. Memory for those files alone."""

    def __init__(self) -> None:
        self._left: dict[tuple[int, int], tuple[int, str]] = {}

    def see(self, node: Node) -> None:
        """Take one name in."""
        links = node.status.st_nlink
        if links < 2 or not node.is_file:
            return
        key = (node.status.st_dev, node.status.st_ino)
        left, first = self._left.get(key, (links, node.path))
        if left == 1:
            del self._left[key]
        else:
            self._left[key] = (left - 1, first)

    def shared(self) -> set[tuple[int, int]]:
        """Device and inode numbers of files with a name outside."""
        return set(self._left)

    def outside(self) -> Iterator[Seen]:
        """Files of which not every name was seen."""
        for left, path in self._left.values():
            yield Seen("HARD-LINK", path, f"has {left} more {'name' if left == 1 else 'names'} outside of the tree")


def mounted(found: Mapping[str, str]) -> Iterator[Seen]:
    """What is mounted inside, by path and type of file system."""
    for path, kind in sorted(found.items()):
        codes = [code for code, kinds in lists()["mounts"].items() if kind in kinds]
        yield Seen(codes[0] if codes else "MOUNTED", path, f"file system of type {kind}")
