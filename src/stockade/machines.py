"""Guests together with what they are made of: the jail around UML, jails as images, a jail run as a guest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from . import workflow
from .contain import warden_path
from .contain.starting import current
from .errors import NotFoundError, SpecError, StateError
from .records.guest import Guest, NetworkMode
from .records.image import Image
from .records.publish import Published, parse
from .records.spec import Spec
from .vm import control, images, jails, kernels, store, walls
from .vm.start import Started, start

__all__ = ["discard", "guest_of_jail", "image_of_jail", "prepare", "start_guest", "start_jail"]

Progress = Callable[[str], None]
_END_S = 15.0
_STEP_S = 0.02


def prepare(around: Sequence[str], kernel: str = "", progress: Progress = lambda _: None) -> None:
    """Build the jail around UML where `around` asks for one and it is missing or made for another kernel."""
    if tuple(around[:1]) != ("jail",):
        return
    found = kernels.find(kernel)
    if not walls.is_built(found):
        workflow.build(walls.specification(found), observe=False, verify=False, progress=progress)
        walls.mark_built(found)


def start_guest(name: str, *, leash: bool = False, wait: bool = False, progress: Progress = lambda _: None) -> Started:
    """Start the guest `name`, its walls built first where they are missing. Errors as `vm.start.start` has them."""
    guest = store.load(name)
    prepare(guest.walls, guest.kernel, progress)
    return start(guest, image_for(guest), leash=leash, wait=wait)


def image_for(guest: Guest) -> Image:
    """The image that the guest was made of; NotFoundError when the store has another one of that name."""
    image = images.load(guest.image)
    if image.sha256 != guest.image_sha256:
        raise NotFoundError(
            f"image `{guest.image}` is not the one that guest `{guest.name}` was made of",
            hint=f"import the image with SHA-256 {guest.image_sha256}, or make the guest again",
        )
    return image


def image_of_jail(jail: str, name: str = "", *, size: int | None = None, progress: Progress = lambda _: None) -> Image:
    """The image of the jail's current generation: the one that is there, or made now.

    Without a `name` it gets one of the jail and the contents of its lock.
    """
    generation = current(jail)
    wanted = name or f"{jail[:40]}-{_stamp(generation)}"
    if not name and wanted in images.names():
        return images.load(wanted)
    progress(f"making an image of `{jail}`")
    return jails.image_of_jail(jail, wanted, size=size)


def _stamp(generation: Path) -> str:
    """What an image of this generation depends on, in short."""
    parts = [(generation / file).read_bytes() for file in ("lock.json", "spec.json")]
    status = os.stat(warden_path())
    parts.append(f"{generation.name} {status.st_mtime_ns} {status.st_size}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def guest_of_jail(
    jail: str, around: Sequence[str], *, name: str = "", memory: int = 128 << 20,
    publish: Sequence[Published] | None = None, network: NetworkMode | None = None, record: bool = False,
    progress: Progress = lambda _: None,
) -> Guest:  # fmt: skip
    """Make a guest of a jail's image, by default with the ports that the jail's spec publishes.

    `record`, or the spec's: what is executed and typed is kept. SpecError when `around` has no "vm".
    """
    if "vm" not in around:
        raise SpecError("walls without `vm` make no guest", hint="`vm`, `jail,vm` or `jail,vm,jail`")
    spec = msgspec.json.decode((current(jail) / "spec.json").read_bytes(), type=Spec)
    image = image_of_jail(jail, progress=progress)
    ports = tuple(publish) if publish is not None else tuple(parse(text) for text in spec.network.publish)
    mode: NetworkMode = network or ("nat" if spec.network.egress else "publish" if ports else "none")
    return store.create(
        name or jail, image, memory=memory, walls=tuple(around), network=mode, publish=ports,
        record=record or spec.record,
    )  # fmt: skip


def start_jail(
    jail: str, around: Sequence[str], *, memory: int = 128 << 20, publish: Sequence[Published] | None = None,
    leash: bool = True, wait: bool = False, progress: Progress = lambda _: None,
) -> Started:  # fmt: skip
    """Run a jail behind `around` as a new guest `JAIL-PID-…`, which the caller removes once it has ended."""
    prepare(around, progress=progress)
    name = f"{jail[:40]}-{os.getpid()}-{time.monotonic_ns() % 1000000}"
    guest = guest_of_jail(jail, around, name=name, memory=memory, publish=publish, progress=progress)
    try:
        return start(guest, image_for(guest), leash=leash, wait=wait)
    except BaseException:
        store.remove(name)
        raise


def discard(name: str) -> None:
    """End the guest `name`, if it runs, and remove it."""
    with contextlib.suppress(StateError):
        control.request(name, "kill")
    end = time.monotonic() + _END_S
    while True:
        try:
            store.remove(name)
            return
        except StateError:
            if time.monotonic() > end:
                raise
            time.sleep(_STEP_S)
