"""Named volumes: made at the first launch, with what the rootfs has at their place. What is there stays."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from stockade.kernel import userns
from stockade.kernel.beneath import Root, syncfs
from stockade.kernel.removal import remove_tree
from stockade.records.launch import IdRange
from stockade.records.lock import Lock, LockDirectory
from stockade.records.text import unescape
from stockade.spread import spread

from .limiting import lacking

__all__ = ["FRESH", "alone", "missing", "prepare"]

#: How the names of what is being made, or is to be removed, begin.
FRESH = ".new-"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 1 << 24


def missing(lock: Lock, volumes: Path) -> tuple[LockDirectory, ...]:
    """The volumes of `lock` that are not below `volumes`."""
    return tuple(found for found in lock.directories if found.volume and not os.path.lexists(volumes / found.volume))


def prepare(
    lock: Lock, *, rootfs: Path, volumes: Path, ids: IdRange, uid: int = 0, gid: int = 0, lasting: bool = False
) -> None:
    """Make each volume of `lock` that is missing below `volumes`, and remove what a kill left half made there.

    A volume belongs to the jail's host ids: what the rootfs holds at its mount point is copied, with its
    owners moved into the range. It is a directory, or where it has a size, and the caller can mount one, a file
    system in a file. `uid` and `gid` are the service's, for a single id. `lasting`: a power cut leaves each
    whole or missing. OSError as it comes, else errors as `filesystem.make` has them.
    """
    if not any(found.volume for found in lock.directories):
        return
    volumes.mkdir(mode=0o700, parents=True, exist_ok=True)
    match ids.kind:
        case "root-range":
            _make(lock, rootfs, volumes, ids.first, ids.first_gid, lasting, sized=not lacking(ids))
        case "subid":
            mapped = userns.Range(first_uid=ids.first, first_gid=ids.first_gid, count=ids.count)
            userns.call(_make, lock, rootfs, volumes, 0, 0, lasting, ids=mapped)
        case "single":
            userns.call(_make, lock, rootfs, volumes, None, None, lasting, ids=userns.Single(uid=uid, gid=gid))


def _make(
    lock: Lock, rootfs: Path, volumes: Path, first_uid: int | None, first_gid: int | None, lasting: bool, *,
    sized: bool = False,
) -> None:  # fmt: skip
    """One rename makes each volume appear whole. Without first ids everything stays the caller's."""
    owners = None if first_uid is None or first_gid is None else (first_uid, first_gid)

    def worker(share: Iterator[LockDirectory]) -> None:
        for found in share:
            fresh = volumes / f"{FRESH}{os.urandom(8).hex()}"
            fresh.mkdir(mode=0o700)
            _fill(found, rootfs, fresh, owners)
            if sized and found.size:
                from . import filesystem

                image = fresh.with_name(f"{fresh.name}.image")
                filesystem.make(fresh, image, size=found.size, inodes=found.inodes)
                fresh = image  # which is on disk
            elif lasting:
                with _opened(os.fspath(fresh), _DIRECTORY, None) as made:
                    syncfs(made)
            os.rename(fresh, volumes / found.volume)

    with alone(volumes):
        # Another launch may have made them while this one waited. The programs that make file systems take their time.
        spread(missing(lock, volumes), worker)


@contextmanager
def alone(volumes: Path) -> Iterator[None]:
    """The right to make and replace volumes below `volumes`. What is left half made, now or by a kill, is removed."""
    descriptor = os.open(volumes, _DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _sweep(volumes)
        try:
            yield
        finally:
            _sweep(volumes)
    finally:
        os.close(descriptor)


def _sweep(volumes: Path) -> None:
    for entry in list(os.scandir(volumes)):
        if entry.name.startswith(FRESH):
            remove_tree(Path(entry.path))


def _fill(found: LockDirectory, rootfs: Path, fresh: Path, owners: tuple[int, int] | None) -> None:
    with ExitStack() as stack:
        target = os.open(fresh, _DIRECTORY)
        stack.callback(os.close, target)
        root = stack.enter_context(Root.open(rootfs))
        with suppress(FileNotFoundError):  # its place is made at launch, on a tmpfs
            source = root.openat(unescape(found.path), _DIRECTORY, follow=True)
            stack.callback(os.close, source)
            _copy_entries(source, target, owners)
        _give(target, found.uid, found.gid, found.mode, owners)


def _copy_entries(source: int, target: int, owners: tuple[int, int] | None) -> None:
    with os.scandir(source) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            if owners is not None:
                uid, gid = owners[0] + status.st_uid, owners[1] + status.st_gid
                os.chown(name, uid, gid, dir_fd=target, follow_symlinks=False)
        elif stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            with _opened(name, _DIRECTORY, source) as inner, _opened(name, _DIRECTORY, target) as made:
                _copy_entries(inner, made, owners)
                _give(made, status.st_uid, status.st_gid, status.st_mode, owners)
        elif stat.S_ISREG(status.st_mode):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with _opened(name, os.O_RDONLY | os.O_NOFOLLOW, source) as inner, _opened(name, flags, target) as made:
                while os.sendfile(made, inner, None, _CHUNK):
                    pass
                _give(made, status.st_uid, status.st_gid, status.st_mode, owners)
                os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextmanager
def _opened(name: str, flags: int, directory: int | None) -> Iterator[int]:
    descriptor = os.open(name, flags | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _give(descriptor: int, uid: int, gid: int, mode: int, owners: tuple[int, int] | None) -> None:
    """Owner, then mode: chown(2) clears setuid and setgid."""
    if owners is not None:
        os.fchown(descriptor, owners[0] + uid, owners[1] + gid)
    os.fchmod(descriptor, stat.S_IMODE(mode))
