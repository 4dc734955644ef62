"""Try a change on a throw-away clone, see what it does, keep it or drop it."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from stockade import places
from stockade.errors import NotFoundError, StateError
from stockade.records.guest import Guest, TrialReport, TrialStep
from stockade.records.image import Image
from stockade.records.publish import Published
from stockade.records.text import escape

from . import changes, control, cow, images, snapshots, store
from .network import ADDRESS
from .start import start, stop

__all__ = ["trial"]

_MARK = "-trial-"
_TAIL = 4000
_SETTLE_S = 30.0


def trial(
    guest: str, commands: Sequence[Sequence[str]], *, exercises: Sequence[str] = (),
    inside: Sequence[Sequence[str]] = (), commit: bool = False, network: str = "nat",
    timeout_s: float = 1800.0, snapshot: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> TrialReport:  # fmt: skip
    """Run `commands` as root in a clone of `guest`, then the exercises, and compare its disk with what it was.

    `exercises` are shell commands on the host with the guest's published port N as $PORT_N; `inside` are commands in
    the guest. All must end with 0. `commit`: when all passed, the guest's disk becomes the clone's, and the state
    before is kept as a snapshot. The clone starts from `snapshot`, or the guest's disk as it is now.
    """
    record = store.load(guest)
    image = images.load(record.image)
    if not image.start.has_line:
        raise StateError(f"no command can be run in guest `{guest}`: its image has a PID 1 of its own")
    _remove_left()
    name = f"{guest[:40]}{_MARK}{os.getpid()}"
    ports = tuple(
        Published(address="127.0.0.1", port=_free_port(), target=published.target) for published in record.publish
    )
    mode = network if network == "nat" or not ports else "publish"
    snapshots.clone(guest, name, snapshot=snapshot, network=mode, publish=ports)
    try:
        report = _carry_out(record, name, image, commands, exercises, inside, ports, timeout_s, say)
        if commit and report.passed:
            say("keeping it")
            _commit(record, name)
            report = msgspec.structs.replace(report, committed=True)
    finally:
        with suppress(StateError):
            control.request(name, "kill")
        _remove(name)
    return report


def _remove_left() -> None:
    """Remove the clones of trials that were killed; each has ended with its trial."""
    for name in store.names():
        _, mark, pid = name.rpartition(_MARK)
        if mark and pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with suppress(StateError, NotFoundError):
                store.remove(name)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _remove(name: str) -> None:
    end = time.monotonic() + 10.0
    while True:
        try:
            store.remove(name)
            return
        except StateError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _carry_out(
    record: Guest, name: str, image: Image, commands: Sequence[Sequence[str]], exercises: Sequence[str],
    inside: Sequence[Sequence[str]], ports: Sequence[Published], timeout_s: float, say: Callable[[str], None],
) -> TrialReport:  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=places.guest(name)) as scratch:
        before = Path(scratch) / "before.cow"
        store.copy_disk(store.disk(name), before, os.geteuid(), os.getegid())
        say("starting a clone")
        started = start(store.load(name), image, leash=True)
        try:
            steps = []
            for command in commands:
                say(f"running `{shlex.join(command)}`")
                steps.append(_run(name, command, timeout_s))
                if steps[-1].status:
                    break
            tried = []
            if all(step.status == 0 for step in steps):
                variables = {f"PORT_{published.target}": str(published.port) for published in ports}
                tried += [_exercise(text, variables, say) for text in exercises]
                tried += [_run(name, command, _SETTLE_S) for command in inside]
            stop(name)
        finally:
            started.close()
        say("comparing the disks")
        base = images.file(image.name)
        with changes.merged(before, base, Path(scratch)) as old, \
                changes.merged(store.disk(name), base, Path(scratch)) as new:  # fmt: skip
            found = changes.compare(old, new, list(cow.written_sectors(store.disk(name), cow.read(store.disk(name)))))
            packages = changes.package_changes(old, new)
    return TrialReport(
        guest=record.name, steps=tuple(steps), exercises=tuple(tried), packages=tuple(packages),
        changes=tuple(msgspec.structs.replace(change, path=escape(change.path)) for change in found),
        passed=all(step.status == 0 for step in (*steps, *tried)),
    )  # fmt: skip


def _run(name: str, command: Sequence[str], timeout_s: float) -> TrialStep:
    began = time.monotonic()
    tail = bytearray()

    def take(_: int, data: bytes) -> None:
        tail.extend(data)
        del tail[:-_TAIL]

    status, _, _ = control.execute(
        name, command, output=take, timeout_s=timeout_s,
        environment={"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    return TrialStep(
        command=tuple(command), status=status, seconds=time.monotonic() - began, output=tail.decode("utf-8", "replace")
    )


def _exercise(text: str, variables: dict[str, str], say: Callable[[str], None]) -> TrialStep:
    say(f"exercise `{text}`")
    began = time.monotonic()
    try:
        done = subprocess.run(
            ["sh", "-c", text], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_SETTLE_S, env={**os.environ, **variables, "GUEST_ADDRESS": ADDRESS}, check=False,
        )  # fmt: skip
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 124, error.stdout or b""  # as timeout(1) reports it
    return TrialStep(
        command=("sh", "-c", text), status=status, seconds=time.monotonic() - began,
        output=output[-_TAIL:].decode("utf-8", "replace"),
    )  # fmt: skip


def _commit(record: Guest, clone: str) -> None:
    """The guest's disk becomes the clone's; what it was is a snapshot that can be restored."""
    if control.is_running(record.name):
        raise StateError(
            f"guest `{record.name}` runs: what it has written since would be lost", hint="stop it, then try again"
        )
    snapshots.create(record.name, f"before-{time.strftime('%Y%m%d-%H%M%S')}", good=True)
    with store.locked(record.name):
        store.replace_disk(store.machine(record.name), store.disk(clone), record.uid, record.gid)
