"""Snapshots: kept states of a guest's disk. Made beside the guest, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from stockade import places
from stockade.errors import NotFoundError, StateError
from stockade.records.guest import Guest, Snapshot

from . import archive, control, cow, images, sparse, store, whole

__all__ = [
    "checked",
    "clone",
    "create",
    "export",
    "held",
    "import_",
    "latest_good",
    "load",
    "names",
    "remove",
    "restore",
]

_EXPORTED = ("snapshot.json", "disk.cow")
_SYNC_S = 20.0


def directory(guest: str, name: str = "") -> Path:
    """Directory of the guest's snapshots, or of one of them."""
    return places.guest(guest) / "snapshots" / name


def names(guest: str) -> list[str]:
    """Names of the guest's snapshots, the oldest first."""
    store.load(guest)
    found = [load(guest, name) for name in whole.named(directory(guest), "snapshot.json")]
    return [snapshot.name for snapshot in sorted(found, key=lambda snapshot: (snapshot.created, snapshot.name))]


def load(guest: str, name: str) -> Snapshot:
    """A snapshot's record; NotFoundError where there is none."""
    store.check_name(name, "snapshot")
    return store.read_record(
        directory(guest, name) / "snapshot.json", Snapshot, f"snapshot `{name}` of guest `{guest}`",
        lambda: whole.absent(
            f"guest `{guest}` has no snapshot `{name}`", name, whole.named(directory(guest), "snapshot.json"),
            listed_by=f"snapshot list {guest}",
        ),
    )  # fmt: skip


@contextlib.contextmanager
def held(guest: Guest, *, sync: bool = True) -> Iterator[tuple[Literal["running", "stopped"], str]]:
    """The guest stands still meanwhile, its file systems synced. Yields "running" or "stopped", and its memory's path.

    A stopped one is locked. When this process is killed the keeper lets a running guest go on.
    """
    if not control.is_running(guest.name):
        with store.locked(guest.name):
            yield "stopped", ""
        return
    with control.connect(guest.name) as connection:
        if sync and not control.request(guest.name, "status")["frozen"]:
            _sync(guest)
        answer = control.ask(connection, "hold")
        yield "running", str(answer["memory"])


def _sync(guest: Guest) -> None:
    if images.load(guest.image).start.has_line:
        control.execute(guest.name, ["@sync"], timeout_s=_SYNC_S)
    else:
        # Emergency sync: the kernel begins at once and does not say when it is done.
        control.request(guest.name, "mconsole", command="sysrq s")
        time.sleep(0.2)


def create(guest: str, name: str, *, good: bool = False) -> Snapshot:
    """Keep the guest's disk as it is now under `name`. A running guest stands still while it is copied.

    `good`: it is a state to go back to after a break-in. StateError when there is one of that name, OSError with
    ENOSPC when the disk is full; nothing half made stays.
    """
    record = store.load(guest)
    store.check_name(name, "snapshot")
    place = directory(guest, name)
    if os.path.lexists(place):
        raise StateError(
            f"guest `{guest}` has a snapshot `{name}` already", hint=f"`stockade snapshot rm {guest} {name}` removes it"
        )
    _sweep(guest)
    fresh = directory(guest) / f".new-{os.getpid()}-{name}"
    fresh.mkdir(mode=0o700, parents=True)
    try:
        with held(record) as (state, _):
            created = time.time()
            store.copy_disk(store.disk(guest), fresh / "disk.cow", os.geteuid(), os.getegid())
        snapshot = Snapshot(
            name=name, guest=guest, image=record.image, image_sha256=record.image_sha256, created=created, state=state,
            consistent=True, digest=sparse.digest(fresh / "disk.cow"), bytes=sparse.allocated(fresh / "disk.cow"),
            memory=record.memory, good=good,
        )  # fmt: skip
        store.write_record(fresh / "snapshot.json", snapshot)
        os.rename(fresh, place)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return snapshot


def _sweep(guest: str) -> None:
    """What killed processes left half made."""
    for path in directory(guest).glob(".new-*"):
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)


def checked(guest: str, snapshot: Snapshot) -> Path:
    """The snapshot's disk, if it is still what was kept."""
    disk = directory(guest, snapshot.name) / "disk.cow"
    if sparse.digest(disk) != snapshot.digest:
        raise StateError(
            f"snapshot `{snapshot.name}` of guest `{guest}` is damaged: its contents have another digest",
            hint="take another one: `stockade snapshot list` shows them",
        )
    return disk


def restore(guest: str, name: str) -> Guest:
    """Put the guest's disk back to a snapshot. StateError while it runs, and for a damaged snapshot.

    The old disk stays until the new one is whole.
    """
    record = store.load(guest)
    snapshot = load(guest, name)
    disk = checked(guest, snapshot)
    with store.locked(guest, running=f"`stockade guest stop {guest}` first, or use `--stop`"):
        store.renew_base(record)
        store.replace_disk(store.machine(guest), disk, record.uid, record.gid)
    return record


def clone(guest: str, name: str, *, snapshot: str = "", **settings: object) -> Guest:
    """Make the guest `name` from a snapshot of `guest`, or from its disk as it is now; `settings` replace its own."""
    record = store.load(guest)
    image = images.load(record.image)
    kept = {"memory": record.memory, "walls": record.walls, "kernel": record.kernel, "booted": record.booted}
    if snapshot:
        source = checked(guest, load(guest, snapshot))
        return store.create(name, image, disk_from=source, parent=guest, **{**kept, **settings})
    with held(record):
        return store.create(name, image, disk_from=store.disk(guest), parent=guest, **{**kept, **settings})


def remove(guest: str, name: str) -> None:
    """Remove a snapshot. Guests that were cloned from it have copies."""
    load(guest, name)
    gone = directory(guest) / f".new-0-{name}"
    os.rename(directory(guest, name), gone)
    shutil.rmtree(gone)


def latest_good(guest: str) -> str:
    """Name of the newest snapshot that was marked as good; NotFoundError where there is none."""
    for name in reversed(names(guest)):
        if load(guest, name).good:
            return name
    raise NotFoundError(
        f"guest `{guest}` has no snapshot that is marked as good",
        hint=f"name one with `--snapshot`; `stockade snapshot create {guest} NAME --good` marks the next",
    )


def export(guest: str, name: str, target: Path) -> str:
    """Write a snapshot to the archive `target`, without its image; returns the archive's SHA-256."""
    checked(guest, load(guest, name))
    archive.pack(directory(guest, name), _EXPORTED, target)
    return sparse.file_sha256(target)


def import_(source: Path, guest: str, *, name: str = "") -> Snapshot:
    """Take a snapshot from an archive. The guest is made where there is none; the image must be in the store.

    StateError when archive and image do not fit each other, or the archive is damaged.
    """
    store.check_name(guest)
    places.guests().mkdir(mode=0o700, parents=True, exist_ok=True)
    with whole.scratch(places.guests(), "import") as scratch:
        if set(archive.unpack(source, scratch, _EXPORTED)) != set(_EXPORTED):
            raise StateError(f"`{source}` is no exported snapshot", hint="`stockade snapshot export` writes them")
        snapshot = store.read_record(
            scratch / "snapshot.json", Snapshot, f"snapshot in `{source}`",
            lambda: NotFoundError(f"there is no snapshot in `{source}`", hint="`stockade snapshot export` writes one"),
        )  # fmt: skip
        if sparse.digest(scratch / "disk.cow") != snapshot.digest:
            raise StateError(f"`{source}` is damaged: its disk has another digest", hint="export it again")
        image = images.load(snapshot.image)
        if image.sha256 != snapshot.image_sha256:
            raise StateError(
                f"`{source}` was made with another image `{image.name}`: its SHA-256 is {snapshot.image_sha256}",
                hint="import that image, under that name",
            )
        cow.check(scratch / "disk.cow", images.file(image.name))
        wanted = name or snapshot.name
        store.check_name(wanted, "snapshot")
        if not (places.guest(guest) / "guest.json").exists():
            store.create(guest, image, disk_from=scratch / "disk.cow", memory=snapshot.memory)
        if os.path.lexists(directory(guest, wanted)):
            raise StateError(f"guest `{guest}` has a snapshot `{wanted}` already", hint="give another with `--name`")
        snapshot = msgspec.structs.replace(snapshot, name=wanted, guest=guest)
        store.write_record(scratch / "snapshot.json", snapshot)
        os.rename(scratch, directory(guest, wanted))
    return snapshot
