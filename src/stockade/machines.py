"""Guests together with what they are made of: the jail around UML, jails as images, a jail run as a guest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from . import places
from .contain import warden_path, wire
from .contain.runfiles import is_alive, start_time
from .contain.starting import current
from .errors import NotFoundError, ServiceError, SpecError, StateError
from .records.guest import Guest, NetworkMode
from .records.image import Image
from .records.publish import Published, parse
from .records.spec import Spec
from .vm import control, images, jails, kernels, record, staging, store, transfer, walls
from .vm.start import Started, log_tail, start

__all__ = [
    "command", "discard", "end", "generation_number", "guest_of_jail", "image_of_jail", "keep_record",
    "prepare", "start_guest", "start_jail", "sweep", "this_process",
]  # fmt: skip

Progress = Callable[[str], None]
_END_S = 15.0
_STEP_S = 0.02
_FRAGMENT = f"{staging.HOME}/command"


def prepare(around: Sequence[str], kernel: str = "", progress: Progress = lambda _: None) -> None:
    """Build the jail around UML where `around` asks for one and it is missing or made for another kernel."""
    if tuple(around[:1]) != ("jail",):
        return
    found = kernels.find(kernel)
    if not walls.is_built(found):
        from . import workflow

        workflow.build(walls.specification(found), observe=False, verify=False, progress=progress)
        walls.mark_built(found)


def start_guest(
    name: str, *, leash: bool = False, wait: bool = False, await_service: bool = True, ready_s: float | None = None,
    progress: Progress = lambda _: None,
) -> Started:  # fmt: skip
    """Start the guest `name`, its walls built first where they are missing; return once its service answers.

    That is when the port that its image names is open, for which it has `ready_s` (default: what the image says);
    without `await_service` nothing is waited for. `wait`: the service is started when it is told to. ServiceError, with
    the end of the console's log, for a service that is not up in time: the guest is ended then. Else errors as
    `vm.start.start` has them.
    """
    guest = store.load(name)
    prepare(guest.walls, guest.kernel, progress)
    image = image_for(guest)
    started = start(guest, image, leash=leash, wait=wait)
    if await_service and not wait and image.ready_tcp is not None and image.start.has_line:
        try:
            _await_port(name, image.ready_tcp, image.ready_s if ready_s is None else ready_s)
        except BaseException:
            started.close()
            end(name)
            raise
    return started


def _await_port(name: str, port: int, limit_s: float) -> None:
    """Until somebody in the guest listens on the TCP port."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            tables = b"".join(control.execute(name, ["@read", f"/proc/net/{table}"])[1] for table in ("tcp", "tcp6"))
        except StateError:
            why = "ended before it"
            break
        if any(_listens(line, port) for line in tables.splitlines()):
            return
        if time.monotonic() > deadline:
            why = f"has not within {limit_s:g} s"
            break
        time.sleep(_STEP_S)
    raise ServiceError(
        f"the service of guest `{name}` is to open port {port}, and {why}",
        hint=f"`stockade guest log {name}` shows what it said", log=log_tail(name),
    )  # fmt: skip


def _listens(line: bytes, port: int) -> bool:
    """A row of /proc/net/tcp (proc(5)): whether it is a socket in the state LISTEN on the port."""
    words = line.split()
    return len(words) > 3 and words[1].endswith(b":%04X" % port) and words[3] == b"0A"


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
    maker: tuple[int, int] | None = None, progress: Progress = lambda _: None,
) -> Guest:  # fmt: skip
    """Make a guest of a jail's image, by default with the ports that the jail's spec publishes.

    `record`, or the spec's: what is executed and typed is kept. `maker` as `Guest` has it. SpecError when `around` has
    no "vm".
    """
    if "vm" not in around:
        raise SpecError("walls without `vm` make no guest", hint="`vm`, `jail,vm` or `jail,vm,jail`")
    spec = msgspec.json.decode((current(jail) / "spec.json").read_bytes(), type=Spec)
    image = image_of_jail(jail, progress=progress)
    given = () if network == "none" else tuple(parse(text) for text in spec.network.publish)
    ports = given if publish is None else tuple(publish)
    mode: NetworkMode = network or ("nat" if spec.network.egress else "publish" if ports else "none")
    return store.create(
        name or jail, image, memory=memory, walls=tuple(around), network=mode, publish=ports,
        record=record or spec.record, jail=jail, generation=generation_number(jail), maker=maker,
    )  # fmt: skip


def generation_number(jail: str) -> int:
    """Number of the jail's current generation; 0 for one that has none."""
    name = current(jail).name
    return int(name) if name.isdecimal() else 0


def start_jail(
    jail: str, around: Sequence[str], *, memory: int = 128 << 20, publish: Sequence[Published] | None = None,
    leash: bool = True, wait: bool = False, progress: Progress = lambda _: None,
) -> Started:  # fmt: skip
    """Run a jail behind `around` as a new guest `JAIL-PID-…`, which the caller removes once it has ended.

    Where the caller is killed before, `sweep` does.
    """
    sweep()
    prepare(around, progress=progress)
    name = f"{jail[:40]}-{os.getpid()}-{time.monotonic_ns() % 1000000}"
    guest = guest_of_jail(
        jail, around, name=name, memory=memory, publish=publish, maker=this_process(), progress=progress
    )
    try:
        return start(guest, image_for(guest), leash=leash, wait=wait)
    except BaseException:
        store.remove(name)
        raise


def end(name: str) -> None:
    """End the guest `name` at once, if it runs, and return when it has."""

    def look() -> None:
        with store.locked(name):
            pass

    _after_its_end(name, look)


def command(
    name: str, argv: Sequence[str], *, environment: Mapping[str, str] | None = None, directory: str | None = None,
    terminal: tuple[int, int] | None = None,
) -> control.Session:  # fmt: skip
    """Run `argv` in the running guest `name` in its service's place: by the service's plan, behind the same walls.

    `environment` is added to the plan's. `terminal`: columns and rows of one of its own. StateError for an image that
    has no plan.
    """
    guest = store.load(name)
    plans = image_for(guest).start.plan
    plan = plans.get("jail" if len(guest.walls) > 1 and guest.walls[-1] == "jail" else "vm")
    if plan is None:
        raise StateError(
            f"image `{guest.image}` was made of no jail, and has no place for a service",
            hint=f"`stockade guest exec {name} -- COMMAND` runs a command as the guest's root",
        )
    records = [wire.text(wire.ARGV, *argv), wire.record(wire.LIFELINE)]
    records += [wire.text(wire.ENV, f"{key}={value}") for key, value in (environment or {}).items()]
    if directory is not None:
        records.append(wire.text(wire.DIRECTORY, directory))
    size = None
    if terminal is not None:
        columns, rows = terminal
        size = rows, columns
        records.append(wire.record(wire.TERMINAL, rows, columns))
        records.append(wire.text(wire.ENV, "TERM=" + os.environ.get("TERM", "dumb")))
    with tempfile.NamedTemporaryFile(prefix="stockade-plan-") as file:
        file.write(wire.plan(records))
        file.flush()
        transfer.push(name, Path(file.name), _FRAGMENT)
    return control.Session(name, [staging.INIT, plan, _FRAGMENT], terminal=size)


def keep_record(name: str) -> Path | None:
    """Put what was recorded of the guest `name`, which has ended, where it stays when the guest is removed.

    None where nothing was. StateError where a record of that name is there: nothing is replaced.
    """
    guest = store.load(name)
    source = places.guest(name) / record.NAME
    if not guest.record or not source.exists() or source.stat().st_size == 0:
        return None
    places.records().mkdir(mode=0o700, parents=True, exist_ok=True)
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = places.records() / f"{guest.jail or name}-{when}-{os.getpid()}-{name}.log"
    source.chmod(0o400)
    try:
        os.link(source, target)  # rename(2) would replace
    except FileExistsError as error:
        raise StateError(
            f"`{target}` is there already: the record of guest `{name}` stays with it", hint="try again"
        ) from error
    source.unlink()
    return target


def this_process() -> tuple[int, int]:
    """The `maker` of a guest that this process removes."""
    return os.getpid(), start_time(os.getpid()) or 0


def sweep() -> None:
    """Remove each guest that has ended and whose maker was killed; what was recorded of it is kept."""
    for name in store.names():
        # Another sweep was faster, its record is damaged, or it has not ended yet.
        with contextlib.suppress(NotFoundError, FileNotFoundError, StateError):
            maker = store.load(name).maker
            if maker is not None and not is_alive(maker):
                with store.locked(name):
                    keep_record(name)
                store.remove(name)


def discard(name: str) -> None:
    """End the guest `name`, if it runs, and remove it."""
    _after_its_end(name, lambda: store.remove(name))


def _after_its_end(name: str, work: Callable[[], object]) -> None:
    """Kill the guest, if it runs, and do `work` as soon as its keeper lets go of it. StateError when it never does."""
    with contextlib.suppress(StateError, OSError):  # it ends while it is asked
        control.request(name, "kill")
    deadline = time.monotonic() + _END_S
    while True:
        try:
            work()
            return
        except StateError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_STEP_S)
