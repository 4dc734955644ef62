"""A machine for one proof: of the jail's image with the probes' tree in it, and its service is never started."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from stockade import machines
from stockade.assure import canaries as outside
from stockade.assure import probetree
from stockade.assure.canaries import VARIABLE, Canaries
from stockade.assure.probetree import HELPERS, REQUEST, ProbeTree
from stockade.assure.session import dirty
from stockade.errors import StockadeError, WallError
from stockade.kernel.userns import Single
from stockade.records.guest import Guest, NetworkMode
from stockade.records.image import Image
from stockade.vm import control, images, jails, staging, store

__all__ = ["INIT", "PLAN", "TREE", "Bench", "Input", "bench", "messages"]

#: Where the tree is in the machine: a service that no jail holds in there has to reach it too.
TREE = "/.stockade-probes"
INIT = staging.INIT
PLAN = f"{staging.HOME}/probe.plan"

_PREFIX = "prove-"
_SCRATCH = "stockade-prove-"
_CANARY = f"{staging.HOME}/canary"
_LIMIT_S = 300.0
_END_S = 10.0


class Input:
    """The probes' standard input, over the guest's serial line. It is no terminal, so nothing can be pushed into it."""

    def __init__(self, session: control.Session) -> None:
        self._session = session

    def say(self, line: str) -> None:
        """Send a line."""
        self._session.write(line.encode() + b"\n")

    def pushed(self) -> bytes:
        """Nothing."""
        return b""


@dataclass(frozen=True)
class Bench:
    """The guest, its image, and the tree as it is on the host."""

    guest: Guest
    image: Image
    tree: ProbeTree

    @contextlib.contextmanager
    def booted(self, network: NetworkMode, made: Canaries) -> Iterator[None]:
        """The guest runs in that kind of network, started from a careless launcher's state; it ends with this process.

        Errors as `vm.start` has them.
        """
        store.save(msgspec.structs.replace(store.load(self.guest.name), network=network))
        with dirty(made):
            started = machines.start_guest(self.guest.name, wait=True, leash=True)
        try:
            yield
        finally:
            machines.end(self.guest.name)
            started.close()

    def send(self, plan: bytes | None = None) -> None:
        """Put the request that was written beside the tree into the guest's, and a launch plan to PLAN."""
        files = {f"{TREE}/{REQUEST}": (self.tree.path / REQUEST).read_bytes()}
        if plan is not None:
            files[PLAN] = plan
        self._put(files)

    def _put(self, files: dict[str, bytes]) -> None:
        self.beside("put", input=json.dumps({path: content.hex() for path, content in files.items()}).encode())

    def beside(self, task: str, *arguments: str, input: bytes = b"") -> Any:
        """The answer to a task of `inside/beside.py`, carried out by the guest's root. WallError when it fails."""
        argv = self.tree.call(TREE, "inside.beside", task, *arguments)
        status, text, errors = control.execute(self.guest.name, argv, input=input)
        if status != 0:
            said = errors.decode("utf-8", "replace").strip().splitlines()
            raise WallError(
                f"`{task}` ended with {status} in the machine: {said[-1] if said else 'no message'}",
                hint="give the machine more memory, or try once more on a host with less to do",
            )
        return json.loads(text)

    @contextlib.contextmanager
    def canaries(self) -> Iterator[Canaries]:
        """What must stay out of reach of a jail in the guest: in the guest, and beside that jail."""
        made = Canaries(outside.fresh(), Path(_CANARY))
        self._put({f"{_CANARY}/{name}": made.marks[name].encode() for name in ("file", "handle")})
        request = outside.requested(made.marks, hidden=f"{_CANARY}/handle", host_address="")
        environment = {"PATH": os.defpath, VARIABLE: made.marks["process"]}
        argv = self.tree.call(TREE, "canaryprocess")
        with control.Session(self.guest.name, argv, environment=environment, directory=_CANARY) as session:
            session.write(json.dumps(request).encode() + b"\n")
            line = next(_lines(session), b"")
            if not line:
                raise WallError("the canary process in the machine could not be started", hint="try it once more")
            made.told.update(outside.told(request, line.decode()), file=f"{_CANARY}/file")
            yield made
            session.end_input()


def messages(session: control.Session, errors: bytearray) -> Iterator[dict[str, Any]]:
    """What the probes tell in the session, until it ends; their standard error goes to `errors`."""
    for line in _lines(session, errors):
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _lines(session: control.Session, errors: bytearray | None = None) -> Iterator[bytes]:
    text = b""
    deadline = time.monotonic() + _LIMIT_S
    while session.status is None:
        for stream, data in _read(session, deadline):
            if stream == 1:
                text += data
            elif errors is not None:
                errors += data
        while b"\n" in text:
            line, _, text = text.partition(b"\n")
            yield line


def _read(session: control.Session, deadline: float) -> list[tuple[int, bytes]]:
    try:
        return session.read(max(0.1, deadline - time.monotonic()))
    except TimeoutError:
        raise WallError(
            f"the probes in the machine did not end within {_LIMIT_S:.0f} seconds", hint="stop what keeps the host busy"
        ) from None


@contextlib.contextmanager
def bench(jail: str, around: Sequence[str], *, memory: int) -> Iterator[Bench]:
    """A machine of the jail's image behind the walls `around`; nothing is left of it afterwards.

    What an earlier proof that was killed left is removed first. Errors as an image and a guest have them.
    """
    _sweep()
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as scratch, contextlib.ExitStack() as stack:
        # The one id has no helpers on the host; in the image they can be made for everybody.
        made = probetree.make(Path(scratch, "tree"), Single(uid=0, gid=0))
        tree = replace(made, helpers={kind: place for kind, (place, _, _) in HELPERS.items()})
        image = jails.image_of_jail(jail, name, ports=False, beside=_additions(made))
        stack.callback(images.remove, name, [])
        guest = store.create(name, image, memory=memory, walls=tuple(around))
        stack.callback(machines.discard, name)
        yield Bench(guest=guest, image=image, tree=tree)


def _additions(tree: ProbeTree) -> list[staging.Addition]:
    """The files of the tree, and the helpers."""
    files = [path for path in sorted(tree.path.rglob("*")) if path.is_file()]
    return [
        staging.Addition(
            path=f"{TREE}/{path.relative_to(tree.path)}", mode=path.stat().st_mode & 0o777, source=os.fspath(path)
        )
        for path in files
    ] + [
        staging.Addition(path=f"{TREE}/{place}", mode=mode, source=str(tree.path / "loader"), capability=capability)
        for place, mode, capability in HELPERS.values()
    ]


def _sweep() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        pid = path.name.removeprefix(_SCRATCH).partition("-")[0]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}") and path.lstat().st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)
    for name in (*store.names(), *images.names()):
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with contextlib.suppress(StockadeError):
                if name in store.names():
                    machines.discard(name)
                images.remove(name, [])
