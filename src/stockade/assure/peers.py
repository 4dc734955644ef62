"""The same probes behind other programs' walls, and behind none: what the table in the documentation is made of."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Literal

import msgspec

from stockade.errors import NotFoundError, StockadeError
from stockade.records.proof import ProbeRun

from . import request
from .canaries import Canaries
from .catalogue import OUTSIDE, catalogue
from .judge import Control, Outside, judge
from .planted import chroot_follows
from .probetree import REQUEST, ProbeTree
from .processes import find_runner, host_uid, observed
from .session import Seen, Terminal, conduct, dirty, messages, terminal

__all__ = ["Peer", "control", "named", "peers", "run"]

PLACE = "/.stockade-probe"

_SCRIPT = Path(__file__).with_name("prepare.sh")
_PRIVATE = ("unshare", "--mount", "--propagation", "private")
_USER = ("setpriv", "--reuid", "64178", "--regid", "64178", "--clear-groups", "--")
_ON_HOST = "/mnt"
_END_S = 10.0


class Peer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another program and its documented call; see `peers.toml`."""

    name: str
    program: str
    package: str
    version: tuple[str, ...]
    command: tuple[str, ...]
    caller: Literal["root", "user"]
    gid: int = 0
    host_root: bool = False

    @property
    def place(self) -> str:
        """Where it sees the probes' tree."""
        return _ON_HOST if self.host_root else PLACE
    source: str

    def why_not(self) -> str:
        """Why it cannot be run here, "" when it can."""
        if os.geteuid() != 0:
            return "root prepares the file system that all of them get"
        if shutil.which(self.program) is None:
            return f"not installed: `apt-get install {self.package}`"
        return ""


_BARE = Peer(
    name="bare", program="unshare", package="util-linux", version=("unshare", "--version"), command=(), caller="root",
    host_root=True, source="unshare(1)",
)  # fmt: skip


@cache
def peers() -> dict[str, Peer]:
    """Every known peer by its name."""
    text = Path(__file__).with_name("peers.toml").read_text(encoding="utf-8")
    return {peer.name: peer for peer in msgspec.convert(tomllib.loads(text)["peer"], tuple[Peer, ...])}


def named(name: str) -> Peer:
    """The peer `name`; NotFoundError with those that there are."""
    found = peers().get(name)
    if found is None:
        raise NotFoundError(f"`{name}` is not among the programs to compare with", hint=f"known: {', '.join(peers())}")
    return found


def run(
    peer: Peer, rootfs: Path, tree: ProbeTree, canaries: Canaries, *, control: Control | None = None,
    populated: bool = False,
) -> tuple[ProbeRun, Seen]:  # fmt: skip
    """All probes behind `peer`, in the file system `rootfs`, which stays as it is.

    `populated`: with /proc, /sys, /dev and /run of the host in it, as guides for a chroot have it, and a copy of the
    canary. StockadeError where the peer starts nothing.
    """
    names = tuple(name for name in catalogue() if name not in OUTSIDE)
    request.write(tree, canaries, place=peer.place, probes=names, unknown_storage=True,
                  groups=(peer.gid,),
                  launchers=(shutil.which(peer.program) or peer.program,))  # fmt: skip
    start = time.monotonic()
    with _started(peer, rootfs, tree, canaries, populated=populated) as (process, output, screen, errors):
        facts: list[Outside] = []
        runner: list[int] = []

        def at_ready(message: dict[str, int]) -> None:
            runner.append(find_runner(process.pid, message["ready"], f"{peer.place}/{REQUEST}"))
            facts.append(observed(runner[0], network="private"))

        seen = conduct(
            messages(output), screen, at_ready=at_ready, answer=lambda asked: host_uid(runner[0], asked["path"])
        )
        if not facts:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise StockadeError(
                f"`{peer.program}` did not start the probes: {said[-1] if said else 'no message'}",
                hint="try the command by hand: " + shlex.join(peer.command),
            )
    results = judge(seen, outside=facts[0], canaries=canaries, control=control, names=names)
    if peer.program == "chroot":
        results = (*results, chroot_follows(canaries))
    done = ProbeRun(
        walls=peer.name, command=shlex.join([*(word.format(root="ROOT") for word in peer.command), "COMMAND"]),
        version=version(peer), user="root" if facts[0].uid == 0 else str(facts[0].uid), uid=facts[0].uid,
        network="its own" if not facts[0].namespaces["net"] else "host", seconds=time.monotonic() - start,
        results=results,
    )  # fmt: skip
    return done, seen


def control(rootfs: Path, tree: ProbeTree, canaries: Canaries) -> Control:
    """What the probes give where every object is inside and no wall stands: a plain chroot, as root and as nobody.

    An ordinary user can have none: then it is a user namespace of its own, which tells what the kernel does not have.
    """
    if os.geteuid() != 0:
        made = Control(complete=False)
        made.add(run(_BARE, rootfs, tree, canaries)[1])
        return made
    made = Control(complete=True)
    for name in ("chroot", "chroot-nobody"):
        made.add(run(peers()[name], rootfs, tree, canaries, populated=True)[1])
    return made


def version(peer: Peer) -> str:
    """First line of what the program says about its version."""
    done = subprocess.run(peer.version, capture_output=True, text=True, timeout=_END_S, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else ""


@contextlib.contextmanager
def _started(
    peer: Peer, rootfs: Path, tree: ProbeTree, canaries: Canaries, *, populated: bool
) -> Iterator[tuple[subprocess.Popen[bytes], int, Terminal, IO[bytes]]]:
    """The peer running the probes, with a terminal of ours as its own and a careless launcher's state."""
    base = Path(tempfile.mkdtemp(prefix="stockade-peer-"))
    words = [word.format(root=f"{base}/root") for word in peer.command]
    private = _PRIVATE if os.geteuid() == 0 else (*_PRIVATE, "--user", "--map-root-user")
    become = _USER if peer.caller == "user" and os.geteuid() == 0 else ()
    command = ["setsid", "-c", *private, "sh", "-eu", os.fspath(_SCRIPT), *become, *words, *tree.run(peer.place)]
    try:
        with terminal() as screen, tempfile.TemporaryFile() as errors, dirty(canaries):
            environment = os.environ | {
                "BASE": str(base), "ROOTFS": str(rootfs), "TREE": str(tree.path), "POPULATED": str(int(populated)),
                "CANARY": str(canaries.directory), "DISK": _disk_name(),
                "LAUNCHER": shutil.which(peer.program) or "",
                "HOST": str(int(peer.host_root)),
            }  # fmt: skip
            process = subprocess.Popen(
                command, stdin=screen.slave, stdout=subprocess.PIPE, stderr=errors, env=environment, close_fds=False,
                cwd="/",
            )  # fmt: skip
            assert process.stdout is not None
            try:
                yield process, process.stdout.fileno(), screen, errors
                process.wait(_END_S)
            finally:
                process.kill()
                process.stdout.close()
                process.wait()
    finally:
        base.rmdir()


def _disk_name() -> str:
    device = os.stat("/").st_dev
    link = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    return os.path.basename(os.path.realpath(link)) if link.exists() else ""
