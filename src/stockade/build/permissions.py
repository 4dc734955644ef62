"""Which mode and owner a copied path gets: root's and not writable, as far as it then still works."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ID_COUNT", "Ownership", "reduced_directory", "reduced_file", "state"]

#: Ids that a jail has: 0 to 65535.
ID_COUNT = 65536


class Ownership(NamedTuple):
    """Mode and owner of a path in a rootfs."""

    mode: int
    uid: int
    gid: int


def _owners(mode: int, uid: int, gid: int) -> tuple[int, int]:
    """Root, except where that would give or take a right.

    A group whose rights are those of everybody else loses nothing when the file becomes root's; one with more (0640
    root:shadow) or fewer keeps it. So does an owner (0600, read by the service's user), who without rights of his own
    would have the group's.
    """
    owner, group, other = (mode >> 6) & 0o5, (mode >> 3) & 0o5, mode & 0o5
    uid = 0 if owner == group == other or uid >= ID_COUNT else uid
    gid = 0 if group == other or gid >= ID_COUNT else gid
    return uid, gid


def reduced_file(mode: int, uid: int, gid: int, *, setuid: bool = False) -> Ownership:
    """A file's mode without any write bit, owned by root where that is possible.

    With `setuid` it keeps setuid, setgid and its owner.
    """
    if setuid:
        return Ownership(mode & 0o6555, uid, gid)
    return Ownership(mode & 0o555, *_owners(mode, uid, gid))


def reduced_directory(mode: int, uid: int, gid: int) -> Ownership:
    """A directory's mode, writable by root alone, which has every right in its own."""
    uid, gid = _owners(mode, uid, gid)
    return Ownership(mode & 0o555 | (0o700 if uid == 0 else 0), uid, gid)


def state(mode: int, uid: int, gid: int, *, directory: bool) -> Ownership:
    """Mode and owner of what a volume starts with: the host's, as the service goes on to write it.

    Others may write only to a directory with the sticky bit.
    """
    kept = mode & (0o1777 if directory and mode & 0o1000 else 0o775)
    return Ownership(kept, uid if uid < ID_COUNT else 0, gid if gid < ID_COUNT else 0)
