"""Start a jail and wait until its service is ready; look at its files before. Joins contain, observe and build."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from . import contain
from .build.lock import read_lock
from .build.verify import Difference, verify
from .contain.network import open_listener
from .contain.starting import alone, log_path
from .errors import NotFoundError, ServiceError, StateError
from .kernel.beneath import Root
from .records.publish import parse_listen
from .records.spec import Ready, Spec, ready_beside
from .records.text import portable

if TYPE_CHECKING:
    from .observe.ready import Probe

__all__ = ["activation", "listening", "refuse_tampered", "start", "wait_until_ready"]

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
_LOG_TAIL = 64 * 1024
_SHOWN = 20
_POLL_S = 0.02
_LAST_WORDS_S = 1.0


def start(
    name: str, *, wait: bool = True, ephemeral: bool = False, intact: bool = False, listen: Sequence[str] = (),
    sockets: Sequence[int] = (),
) -> contain.RunningJail:  # fmt: skip
    """Start the service of the jail `name` in the background, and return once it is ready, as `service.ready` says.

    Without `wait` it returns once the service is executed. `ephemeral`: what is written to volumes vanishes. `intact`:
    the rootfs is compared with its lock first. `listen`: sockets to open and give to the service, as
    `network.listen` has them; `sockets`: descriptors of such that are open already. With either, those of the spec are
    not opened.

    ServiceError, with the end of its log, for a service that ends before it is ready, or is not in time: it is stopped
    then. StateError for a rootfs that is not as built, and for walls with a machine among them. Else errors as
    `contain.launch` has them.
    """
    generation = alone(name)
    if intact:
        refuse_tampered(generation)
    log = _Log(name)
    with listening(listen) as opened:
        given = (*sockets, *opened)
        ports = _ports(generation, given)
        jail = contain.launch_generation(generation, name=name, detach=True, ephemeral=ephemeral, sockets=given)
        jail.close()
    try:
        if wait:
            wait_until_ready(name, log=log, given=ports)
        return contain.find(name)
    except NotFoundError:
        raise _ended(name, log) from None


class _Log:
    """What a jail has logged since this was made."""

    def __init__(self, name: str) -> None:
        self._path = log_path(name)
        self._begin = self._path.stat() if self._path.exists() else None

    def __call__(self) -> str:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                same = self._begin is not None and self._begin.st_ino == status.st_ino
                begin = self._begin.st_size if same and self._begin is not None else 0
                file.seek(max(begin, status.st_size - _LOG_TAIL))
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""


def _ended(name: str, log: Callable[[], str]) -> ServiceError:
    # The supervisor writes status and last words down a moment after the service has ended.
    deadline = time.monotonic() + _LAST_WORDS_S
    while (status := contain.last_status(name)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    how = "" if status is None else f", with status {status}"
    hint = f"`stockade run {name}` is for a command that ends by itself" if status == 0 else (
        f"`stockade logs {name}` shows all of it"
    )
    return ServiceError(f"jail `{name}` ended right after its start{how}", hint=hint, log=log())


def wait_until_ready(name: str, *, log: Callable[[], str], given: frozenset[tuple[str, int]] = frozenset()) -> None:
    """Wait until the running jail `name` is ready; what never is, is stopped.

    `given` has the protocol and port of each socket that it was given open: none of its own will show there.
    """
    spec = _spec(contain.find(name).generation)
    ready = ready_beside(spec.service.ready, given)
    try:
        with contextlib.ExitStack() as stack:
            _await(name, spec, ready, log, stack)
    except BaseException as error:
        with contextlib.suppress(NotFoundError):
            contain.stop(name)
        if not isinstance(error, ServiceError):
            raise
        raise ServiceError(error.message, hint=error.hint, log=log()) from None


def _await(name: str, spec: Spec, ready: Ready, log: Callable[[], str], stack: contextlib.ExitStack) -> None:
    """Wait for one life after the other, until one is ready or the time is up."""
    from .observe.ready import await_ready, conditions, settle

    deadline = time.monotonic() + ready.timeout_s
    while True:
        jail = _alive(name, deadline)
        seconds = min(ready.timeout_s, max(0.1, round(deadline - time.monotonic(), 1)))
        left = msgspec.structs.replace(ready, timeout_s=seconds)
        probe = _probe(jail, log, stack)
        try:
            if conditions(ready):
                await_ready(left, probe)
            else:
                settle(probe, timeout_s=left.timeout_s, until_end=False, at_most=True)
        except _LifeEnded:
            continue
        return


class _LifeEnded(Exception):
    """The life that was waited for is over, and another may follow."""


def _alive(name: str, deadline: float) -> contain.RunningJail:
    """The jail in a life of its; ServiceError where none follows, or none in time."""
    while True:
        try:
            jail = contain.find(name)
        except NotFoundError:
            raise _ended(name, lambda: "") from None
        if jail.init_pid:
            return jail
        if time.monotonic() > deadline:
            raise ServiceError(f"the service of jail `{name}` ended again and again", hint="its log says why")
        time.sleep(0.02)


def _probe(jail: contain.RunningJail, log: Callable[[], str], stack: contextlib.ExitStack) -> Probe:
    """The ways to ask about the jail's service. A view for clients is only made where a command asks for one."""
    from .observe.exercise import client
    from .observe.ready import Probe
    from .observe.view import View

    views: list[View] = []

    def run(command: tuple[str, ...], timeout_s: float) -> int | None:
        if not views:
            views.append(stack.enter_context(View.open(network_of=jail.init_pid, service_root_of=jail.pid)))
        return client(views[0])(command, b"", timeout_s).status

    def lives() -> bool:
        return os.path.exists(f"/proc/{jail.init_pid}")

    def check() -> None:
        if not lives():
            raise _LifeEnded

    return Probe(
        pid=jail.init_pid, exists=lambda path: _exists(jail, path), run=run, log=log, check=check,
        ended=lambda: not lives(), ticks=lambda: round((jail.usage().cpu_seconds or 0) * 100),
        ignored=frozenset({"/dev/log"}),
    )  # fmt: skip


def _exists(jail: contain.RunningJail, path: str) -> bool:
    """Whether `path` is in the jail, as its service sees it. No link of the jail's leads out of its root."""
    for pid in (jail.init_pid, *jail.processes()):
        try:
            with Root.open(f"/proc/{pid}/root/.") as root:
                os.close(root.openat(path, os.O_PATH, follow=True))
        except PermissionError:
            continue  # PID 1 is nobody's to look at but root's
        except OSError:
            return False
        return True
    return False


def _spec(generation: str | Path) -> Spec:
    return msgspec.json.decode(Path(generation, "spec.json").read_bytes(), type=Spec)


@contextlib.contextmanager
def listening(wanted: Sequence[str]) -> Iterator[tuple[int, ...]]:
    """Open sockets, each as `network.listen` writes it, for the length of a block."""
    opened: list[int] = []
    try:
        for text in wanted:
            opened.append(open_listener(text))
        yield tuple(opened)
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _ports(generation: Path, given: Sequence[int]) -> frozenset[tuple[str, int]]:
    """Protocol and port of the sockets `given`, and of those that the spec names.

    Those are its own, or what `given` takes the place of.
    """
    found: set[tuple[str, int]] = {
        (wanted.protocol, wanted.port) for wanted in map(parse_listen, _spec(generation).network.listen)
    }
    for descriptor in given:
        with socket.socket(fileno=os.dup(descriptor)) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                found.add(("udp" if one.type == socket.SOCK_DGRAM else "tcp", one.getsockname()[1]))
    return frozenset(found)


def activation() -> tuple[int, ...]:
    """Descriptors of sockets that a service manager opened for this process (sd_listen_fds(3)); the variables are taken
    away, so that no child takes them for its own."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not re.fullmatch(r"[0-9]{1,3}", count):
        return ()
    return tuple(range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count)))


def refuse_tampered(generation: Path) -> None:
    """StateError with the list where the rootfs in `generation` is not what its lock says."""
    found = verify(generation / "rootfs", read_lock(generation / "lock.json"))
    if not found:
        return
    lines = [f"\n| {_said(difference)}" for difference in found[:_SHOWN]]
    more = f"\n| and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise StateError(
        f"{len(found)} paths of `{generation / 'rootfs'}` are not as they were built{''.join(lines)}{more}",
        hint="look at them, then build the jail again, or `stockade rollback` to an earlier generation",
    )


def _said(difference: Difference) -> str:
    text = f"{portable(difference.path)}: {difference.kind}"
    if difference.kind in ("missing", "extra"):
        return text
    return f"{text} is {_short(difference.found)}, was {_short(difference.expected)}"


def _short(value: str) -> str:
    return f"{value[:12]}…" if len(value) > 32 else value or "nothing"

