"""Guests on disk: one directory each, changed whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from stockade import places
from stockade.errors import NotFoundError, StateError, UsageError
from stockade.records.guest import Guest
from stockade.records.image import Image

from . import cow, ids, images, whole

__all__ = [
    "create", "disk", "empty_disk", "load", "locked", "machine", "names", "new_disk", "remove", "renew_base", "save",
    "sweep",
]  # fmt: skip

Record = TypeVar("Record", bound=msgspec.Struct)
_FRESH_DISK, _FRESH_BASE = ".disk.new", ".base.new"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")


def check_name(name: str, what: str = "guest") -> None:
    """UsageError for what cannot be a name."""
    if not _NAME.match(name):
        raise UsageError(
            f"`{name}` is no name for a {what}",
            hint="names are lower case letters, digits, `.`, `_` and `-`, and start with a letter or digit",
        )


def machine(name: str) -> Path:
    """UML's working directory: its disk, its base, its management console."""
    return places.guest(name) / "machine"


def disk(name: str) -> Path:
    """The guest's copy-on-write file."""
    return machine(name) / "disk.cow"


def names() -> list[str]:
    """Names of all guests, sorted."""
    return whole.named(places.guests(), "guest.json")


def load(name: str) -> Guest:
    """The guest `name`; NotFoundError where there is none."""
    check_name(name)
    return read_record(
        places.guest(name) / "guest.json", Guest, f"guest `{name}`",
        lambda: whole.absent(f"there is no guest `{name}`", name, names(), listed_by="guest list"),
    )  # fmt: skip


def read_record(path: Path, kind: type[Record], what: str, absent: Callable[[], NotFoundError]) -> Record:
    """The record in `path`; the error `absent` where there is none, StateError for a damaged one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise absent() from None
    except msgspec.MsgspecError as error:
        raise StateError(f"`{path}` is damaged: {error}", hint=f"remove {what} and make it again") from error


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Write `record` to `path`, whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with open(fresh, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def save(guest: Guest) -> None:
    """Keep what is known of the guest."""
    write_record(places.guest(guest.name) / "guest.json", guest)


@contextlib.contextmanager
def locked(name: str, *, running: str = "") -> Iterator[int]:
    """The guest's lock, which its keeper holds as long as it lives; StateError when somebody has it.

    `running` is the hint then. Yields the descriptor.
    """
    directory = places.guest(name)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"guest `{name}` is running, and its disk has one writer",
                hint=running or f"`stockade guest stop {name}` ends it; `stockade guest clone {name}` makes another",
            ) from None
        # What a killed `replace_disk` had not finished: with the lock, nobody is at it.
        for name in (_FRESH_DISK, _FRESH_BASE):
            (directory / "machine" / name).unlink(missing_ok=True)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nobody else makes or removes guests meanwhile."""
    places.guests().mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(places.guests() / ".lock", "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def new_disk(image: Image, directory: Path, uid: int, gid: int) -> None:
    """Fill a machine's directory: the image as `base`, an empty copy-on-write file, a directory for sockets."""
    directory.mkdir(mode=0o700)
    images.link(image, directory / "base")
    cow.create(directory / "disk.cow", backing="base", base=directory / "base")
    (directory / "run").mkdir(mode=0o700)
    if os.geteuid() == 0:
        for path in (directory, directory / "disk.cow", directory / "run"):
            os.chown(path, uid, gid)


def create(name: str, image: Image, *, disk_from: Path | None = None, parent: str = "", **settings: object) -> Guest:
    """Make a guest of `image`, with a disk as new or as a copy of `disk_from`; `settings` are fields of its record.

    StateError when there is one of that name. It appears whole or not at all.
    """
    check_name(name)
    with alone():
        sweep()
        place = places.guest(name)
        if os.path.lexists(place):
            raise StateError(f"there is a guest `{name}` already", hint=f"`stockade guest rm {name}` removes it")
        uid, gid = ids.choose(load(other).uid for other in names())
        known = {
            "name": name, "image": image.name, "image_sha256": image.sha256, "uid": uid, "gid": gid,
            "created": time.time(), "parent": parent,
        }  # fmt: skip
        guest = msgspec.convert({**known, **settings}, Guest)
        fresh = places.guests() / f".new-{name}-{os.getpid()}"
        fresh.mkdir(mode=0o700)
        try:
            new_disk(image, fresh / "machine", uid, gid)
            if disk_from is not None:
                replace_disk(fresh / "machine", disk_from, uid, gid)
            (fresh / "snapshots").mkdir(mode=0o700)
            write_record(fresh / "guest.json", guest)
            os.rename(fresh, place)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    return guest


def replace_disk(directory: Path, source: Path, uid: int, gid: int) -> None:
    """Make a machine's disk a copy of the copy-on-write file `source`; the old one stays until the new one is whole."""
    cow.check(source, directory / "base")
    fresh = directory / _FRESH_DISK
    copy_disk(source, fresh, uid, gid)
    fresh.replace(directory / "disk.cow")


def renew_base(guest: Guest) -> None:
    """Make the machine's base its image's file again: whoever took UML over may have put another one in its place.

    It stays as it is when the image is no longer in the store.
    """
    base = machine(guest.name) / "base"
    try:
        image = images.load(guest.image)
    except NotFoundError:
        return
    kept = images.file(image.name).stat()
    found = base.lstat() if os.path.lexists(base) else None
    if image.sha256 != guest.image_sha256 or (found and os.path.samestat(found, kept)):
        return
    fresh = base.with_name(_FRESH_BASE)
    fresh.unlink(missing_ok=True)
    images.link(image, fresh)
    fresh.replace(base)


def empty_disk(directory: Path, uid: int, gid: int) -> None:
    """Make a machine's disk an empty copy-on-write file; the old one stays until the new one is whole."""
    fresh = directory / _FRESH_DISK
    fresh.unlink(missing_ok=True)
    cow.create(fresh, backing="base", base=directory / "base")
    if os.geteuid() == 0:
        os.chown(fresh, uid, gid)
    fresh.replace(directory / "disk.cow")


def copy_disk(source: Path, target: Path, uid: int, gid: int) -> None:
    """Copy a copy-on-write file; an unfinished copy does not stay."""
    from . import sparse

    target.unlink(missing_ok=True)
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with cow.opened(source) as file:
            sparse.copy(file.fileno(), descriptor)
        if os.geteuid() == 0:
            os.fchown(descriptor, uid, gid)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def remove(name: str) -> None:
    """Remove a guest with its disk and snapshots. StateError while it runs."""
    load(name)
    with alone(), locked(name):
        gone = places.guests() / f".gone-{name}-{os.getpid()}"
        os.rename(places.guest(name), gone)
        shutil.rmtree(gone)
        shutil.rmtree(places.guest_runtime(name), ignore_errors=True)


def sweep() -> None:
    """Take away what a killed `create` or `remove` left; only with `alone`."""
    for pattern in (".new-*", ".gone-*"):
        for path in places.guests().glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
