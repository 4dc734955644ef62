"""After a break-in: freeze the guest where it is, keep evidence, put back a clean state, hand out copies."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stockade import places
from stockade.errors import StateError
from stockade.records.guest import Change, EvidenceFile, EvidenceManifest, Guest
from stockade.records.text import escape

from . import archive, changes, control, cow, images, snapshots, sparse, store, whole
from .start import stop

__all__ = ["changes_of", "clones", "evidence", "freeze", "restore", "thaw"]

_RECORDS = ("guest.json", "console.log", "console.log.1", "uml.log", "keeper.log", "last.json", "record.log")
_MAPS_MOST = 64 << 20
#: The kernel begins to sync at once and does not say when it is done.
_SYNC_S = 0.2


def freeze(guest: str, *, sync: bool = True) -> None:
    """Stop every processor of the running guest where it is. StateError when it does not run.

    `sync`: its kernel first writes what it holds of the disk, without any program of the guest's having a say.
    """
    if sync and not control.request(guest, "status")["frozen"]:
        control.request(guest, "mconsole", command="sysrq s")
        time.sleep(_SYNC_S)
    control.request(guest, "freeze")


def thaw(guest: str) -> None:
    """Let a frozen guest go on."""
    control.request(guest, "thaw")


def evidence(guest: str, target: Path, *, memory: bool = True) -> EvidenceManifest:
    """Write all that there is of a guest to the new archive `target`.

    The disk as its copy-on-write file, the memory of a running guest and its kernel's own, the console, Stockade's
    records, and what differs from the clean image. A running guest stands still while it is copied, and a frozen one
    stays frozen. FileExistsError when there is such an archive; nothing half made stays.
    """
    record = store.load(guest)
    image = images.load(record.image)
    with whole.scratch(places.guest(guest), "evidence") as scratch:
        with snapshots.held(record, sync=False) as (state, file):
            frozen = time.time()
            store.copy_disk(store.disk(guest), scratch / "disk.cow", os.geteuid(), os.getegid())
            if state == "running" and memory:
                _copy_memory(file, scratch / "memory")
                _copy_kernel(file, scratch)
        for name in _RECORDS:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(places.guest(guest) / name, scratch / name)
        shutil.copyfile(places.images() / image.name / "image.json", scratch / "image.json")
        found: list[Change] = []
        new: tuple[str, ...] = ()
        compared = True
        try:
            found, new = _compare(scratch / "disk.cow", images.file(image.name), scratch)
        except StateError as error:
            # A file system that was made unreadable is evidence too.
            compared = False
            (scratch / "not-compared").write_text(f"{error.message}\n", encoding="utf-8")
        files = tuple(
            EvidenceFile(name=path.name, bytes=path.stat().st_size, sha256=sparse.file_sha256(path))
            for path in sorted(scratch.iterdir())
        )
        manifest = EvidenceManifest(
            guest=guest, image=image.name, image_sha256=image.sha256, frozen=frozen, written=time.time(),
            host=socket.gethostname(), files=files, changes=tuple(found), accounts=new, compared=compared,
        )  # fmt: skip
        store.write_record(scratch / "manifest.json", manifest)
        archive.pack(scratch, ["manifest.json", *(file.name for file in files)], target)
    return manifest


def _compare(disk: Path, base: Path, scratch: Path) -> tuple[list[Change], tuple[str, ...]]:
    header = cow.check(disk, base)
    with changes.merged(disk, base, scratch) as whole:
        found = changes.compare(base, whole, list(cow.written_sectors(disk, header)))
        found = [msgspec.structs.replace(change, path=escape(change.path)) for change in found]
        return found, changes.new_accounts(base, whole)


def changes_of(guest: str) -> list[Change]:
    """What differs from the clean image on the guest's disk as it is now; a running guest is synced first."""
    record = store.load(guest)
    with whole.scratch(places.guest(guest), "compare") as scratch:
        copy = scratch / "disk.cow"
        with snapshots.held(record):
            store.copy_disk(store.disk(guest), copy, os.geteuid(), os.getegid())
        return _compare(copy, images.file(record.image), scratch)[0]


def _copy_memory(path: str, target: Path) -> None:
    """The guest's physical memory: the file without a name that UML maps."""
    if not path:
        raise StateError("the guest's memory cannot be found", hint="`--no-memory` leaves it out")
    with open(path, "rb", buffering=0) as source, open(target, "xb", buffering=0) as copy:
        sparse.copy(source.fileno(), copy.fileno())


def _copy_kernel(memory: str, scratch: Path) -> None:
    """What the kernel's own process has beside that: its data and stacks, with a list of where they lay.

    It is the process that holds the memory; behind a jail's walls the warden is the first.
    """
    pid = memory.split("/")[2]
    lines = []
    written = 0
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps, \
            open(f"/proc/{pid}/mem", "rb", buffering=0) as source, open(scratch / "kernel", "xb") as copy:  # fmt: skip
        for line in maps:
            addresses, rights, *rest = line.split(maxsplit=5)
            start, end = (int(text, 16) for text in addresses.split("-"))
            if not rights.startswith("rw") or rights[3] == "s" or written + end - start > _MAPS_MOST:
                continue
            with contextlib.suppress(OSError):
                data = os.pread(source.fileno(), end - start, start)
                copy.write(data)
                written += len(data)
                lines.append(f"{addresses} {rights} {len(data)} {rest[-1].strip() if len(rest) == 4 else ''}".rstrip())
    (scratch / "kernel.maps").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


def clones(guest: str, count: int, *, snapshot: str = "", prefix: str = "") -> Iterator[Guest]:
    """Make `count` guests from one state, without a network, each with a disk of its own: one for each analyst."""
    record = store.load(guest)
    known = set(store.names())
    number = 0
    with whole.scratch(places.guest(guest), "clones") as scratch:
        source = scratch / "disk.cow"
        if snapshot:
            source = snapshots.checked(guest, snapshots.load(guest, snapshot))
        else:
            with snapshots.held(record):
                store.copy_disk(store.disk(guest), source, os.geteuid(), os.getegid())
        image = images.load(record.image)
        for _ in range(count):
            number += 1
            while (name := f"{prefix or guest}-{number}") in known:
                number += 1
            yield store.create(
                name, image, disk_from=source, parent=guest, memory=record.memory, walls=record.walls,
                kernel=record.kernel, booted=record.booted,
            )  # fmt: skip


def restore(guest: str, snapshot: str = "") -> None:
    """End the guest without asking anything in it and put its disk back: to a snapshot, or as new."""
    record = store.load(guest)
    if snapshot:
        snapshots.checked(guest, snapshots.load(guest, snapshot))
    if control.is_running(guest):
        stop(guest, kill=True)
    if snapshot:
        snapshots.restore(guest, snapshot)
        return
    with store.locked(guest):
        store.renew_base(record)
        store.empty_disk(store.machine(guest), record.uid, record.gid)
