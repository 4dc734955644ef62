"""What a build leaves to the next launch: volumes that are missing, or have another size than the spec gives them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from stockade import places
from stockade.errors import StateError
from stockade.kernel.libc import check, function, path_argument
from stockade.kernel.removal import remove_tree
from stockade.records.launch import IdRange
from stockade.records.lock import Lock, LockDirectory

from . import filesystem
from .ids import for_jail
from .limiting import lacking
from .volumes import FRESH, alone, prepare

__all__ = ["catch_up", "resize"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_renameat2 = function(
    "renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)  # fmt: skip


def resize(lock: Lock, *, jail: Path, ids: IdRange, larger: bool = False) -> bool:
    """Give the volumes in `jail`, a jail's directory, the sizes that `lock` has for them.

    What a volume holds is copied into a file system of that size, and at each moment the volume is the old or the
    new one. False where something of the jail runs: then nothing was done. StateError for a size below the one that
    it has, unless it may be `larger`, for what does not fit, and for a mount point.
    """
    volumes = jail / "volumes"
    wanted = [] if lacking(ids) else [found for found in lock.directories if found.volume and found.size]
    due = [found for found in wanted if _is_due(volumes / found.volume, found, larger=larger)]
    if not due:
        return True
    with _at_rest(jail) as rests:
        if rests:
            with alone(volumes):
                for found in due:
                    _change(volumes / found.volume, found)
        return rests


def catch_up(generation: Path, name: str) -> None:
    """Make the volumes that are missing, give those their size that could not have it because the jail ran.

    Volumes that the kernel marked as damaged are checked. What another generation made larger stays. StateError when
    a size is due and the jail still runs, for damage that e2fsck(8) leaves to a person, and as `prepare` has it.
    """
    directory, jail = generation.parent.parent, name.partition("@")[0]
    _mend(directory)
    try:
        service = places.due(generation).read_text().split()
    except FileNotFoundError:
        return
    lock = msgspec.json.decode((generation / "lock.json").read_bytes(), type=Lock)
    ids = for_jail(jail)
    uid, gid = map(int, service or (0, 0))  # empty where nothing has to be made
    prepare(
        lock, rootfs=generation / "rootfs", volumes=directory / "volumes", ids=ids, uid=uid, gid=gid, lasting=True
    )
    # A build refuses what would have to shrink; a later one may have made it larger, before a rollback to this one.
    if not resize(lock, jail=directory, ids=ids, larger=True):
        raise StateError(
            f"the volumes of jail `{jail}` get another size once nothing of it runs, and it runs",
            hint=f"`stockade stop {jail}`, then start it again",
        )
    places.due(generation).unlink(missing_ok=True)


def _mend(jail: Path) -> None:
    volumes = jail / "volumes"
    if not filesystem.marked(volumes):
        return
    with _at_rest(jail) as rests:
        if rests:
            with alone(volumes):
                for volume in filesystem.marked(volumes):
                    filesystem.mend(volume)


def _is_due(volume: Path, found: LockDirectory, *, larger: bool) -> bool:
    try:
        status = os.lstat(volume)
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(status.st_mode):
        return True
    if not stat.S_ISREG(status.st_mode):
        raise StateError(
            f"`{volume}` is neither a directory nor a file", hint="somebody replaced it: look at it, and put it back"
        )
    facts = filesystem.measure(volume)
    if found.size < facts.size:
        if larger:
            return False
        raise StateError(
            f"the volume `{found.volume}` has {facts.size >> 20} MB, and the spec gives it {found.size >> 20} MB",
            hint=f"a volume is not made smaller: give it {facts.size >> 20}M or more, or move what it holds away and "
            f"remove `{volume}`",
        )
    return not facts.holds(found.size, found.inodes)


def _change(volume: Path, found: LockDirectory) -> None:
    """Make a file system of what is there, aside, and put it in its place by one rename."""
    directory = Path(tempfile.mkdtemp(prefix=FRESH, dir=volume.parent))
    fresh = directory / "image"
    if stat.S_ISREG(os.lstat(volume).st_mode):
        filesystem.remake(volume, fresh, size=found.size, inodes=found.inodes)
    else:
        filesystem.make(volume, fresh, size=found.size, inodes=found.inodes)
    _exchange(fresh, volume, found)
    descriptor = os.open(volume.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    remove_tree(directory)


def _exchange(fresh: Path, volume: Path, found: LockDirectory) -> None:
    done = _renameat2(_AT_FDCWD, path_argument(fresh), _AT_FDCWD, path_argument(volume), _RENAME_EXCHANGE)
    try:
        check(done, "renameat2", volume)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise StateError(
            f"`{volume}` is a mount point, and the spec gives the volume `{found.volume}` a size",
            hint="leave `size` and `inodes` out: the file system that is mounted there has its own",
        ) from error


@contextmanager
def _at_rest(jail: Path) -> Iterator[bool]:
    """Whether nothing of the jail runs; if so, nothing is started until the end of the block."""
    with contextlib.ExitStack() as stack:
        for generation in sorted((jail / "generations").glob("[0-9]*")):
            try:
                descriptor = os.open(
                    places.use(generation), os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
                )
            except FileNotFoundError:
                continue  # it was just removed
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
        yield True
