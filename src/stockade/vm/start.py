"""Start a guest: put its orders together, hand them to a keeper, wait until it is up."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

import stockade
from stockade import places
from stockade.errors import StateError
from stockade.records.guest import Guest
from stockade.records.image import Image

from . import commandline, control, cow, kernels, network, record, store, walls

__all__ = ["Started", "start", "stop"]

_LOG_BYTES = 8 << 20
_RECORD_BYTES = 256 << 20
_READY_S = 20.0
_SYSTEM_READY_S = 180.0  # a systemd gives a unit 90 s, more than once
_STOP_S = 20.0
_LONGEST_STOP_S = 600.0
_KILL_S = 10.0
_KEEPER = "import sys; sys.path.insert(0, sys.argv[1]); from stockade.vm.keeper import main; main()"


class Started:
    """A guest that this process started. `seconds` from the start: "console" (first line), "ready"."""

    def __init__(self, name: str, keeper: subprocess.Popen[bytes], leash: int | None) -> None:
        self.name = name
        self.pid = 0
        self.status: int | None = None
        self.ended: dict[str, Any] | None = None
        self.seconds: dict[str, float] = {}
        self.keeper_pid = keeper.pid
        self._keeper = keeper
        self._leash = leash
        self._text = b""

    def event(self, timeout_s: float | None) -> dict[str, Any] | None:
        """The next thing that the keeper says; None when it has ended. TimeoutError."""
        assert self._keeper.stdout is not None
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._text:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._keeper.stdout], [], [], left)[0]:
                raise TimeoutError(f"guest `{self.name}` said nothing for {timeout_s:g} s")
            data = os.read(self._keeper.stdout.fileno(), 65536)
            if not data:
                return None
            self._text += data
        line, _, self._text = self._text.partition(b"\n")
        event = dict(json.loads(line))
        self.pid = int(event.get("started", self.pid))
        for word in ("console", "ready"):
            if word in event:
                self.seconds[word] = event[word]
        if event.get("status") is not None:
            self.status = event["status"]
        if "ended" in event:
            self.ended = event
        return event

    def wait_ready(self, timeout_s: float = _READY_S) -> None:
        """Until the guest is up. StateError with what its console says when it fails, or takes longer."""
        end = time.monotonic() + timeout_s
        while "ready" not in self.seconds:
            try:
                event = self.event(max(0.0, end - time.monotonic()))
            except TimeoutError:
                self.kill()
                raise self._failed(f"it was not up after {timeout_s:g} s") from None
            if event is None or "failed" in event or "ended" in event:
                why = (
                    str(event.get("failed") or event.get("fault") or "it ended early") if event else "its keeper ended"
                )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._keeper.wait(_KILL_S)
                self.kill()
                raise self._failed(why)

    def _failed(self, why: str) -> StateError:
        text = log_tail(self.name)
        return StateError(
            f"guest `{self.name}` did not start: {why}" + (f"\n{text}" if text else ""),
            hint=f"`{places.guest(self.name) / 'console.log'}` has all that it said",
        )

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Until the guest has ended; returns the service's status, None when it had none. TimeoutError."""
        while self.ended is None and self.event(timeout_s) is not None:
            pass
        self._keeper.wait(timeout_s)
        self.close()
        return self.status

    def kill(self) -> None:
        """End the guest at once: its keeper is told to, and killed when it does not heed that."""
        self._keeper.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(_KILL_S)
        self._keeper.kill()
        self._keeper.wait()
        self.close()

    def close(self) -> None:
        """Let go: the guest goes on, unless it was started with a leash."""
        if self._keeper.stdout is not None:
            self._keeper.stdout.close()
        if self._leash is not None:
            os.close(self._leash)
            self._leash = None
        # The keeper goes on alone and is not this process's to wait for.
        self._keeper.poll()
        if self._keeper.returncode is None:
            self._keeper.returncode = 0


def start(
    guest: Guest, image: Image, *, leash: bool = False, wait: bool = False, read_only: bool = False,
    ready_s: float | None = None, say: Callable[[str], None] = lambda _: None,
) -> Started:  # fmt: skip
    """Start `guest` and return once it is up. `leash`: it ends with this process. `wait`: its service is started later.

    `ready_s`: how long that may take (default: 20 s, 180 s with a systemd).
    StateError when it runs already, its disk does not fit its base, or it does not come up; HostError without a kernel.
    """
    if image.quarantine and (guest.network != "none" or guest.links):
        raise StateError(
            f"image `{image.name}` was imported and has never been booted",
            hint=f"`stockade boot {image.name}` boots it first, on a throw-away disk without a network; or import it "
            "with `--trusted`",
        )
    if guest.record and image.start.system:
        raise StateError(
            f"guest `{guest.name}` cannot be recorded: its PID 1 is `{image.start.system}`",
            hint="what is executed is recorded by Stockade's own PID 1: make the image without `--init`",
        )
    kernel = kernels.find(guest.kernel)
    machine = store.machine(guest.name)
    place = places.guest(guest.name)
    with store.locked(
        guest.name, running=f"`stockade guest exec {guest.name} -- COMMAND` runs a command in it"
    ) as lock:
        cow.check(store.disk(guest.name), machine / "base")
        base = (machine / "base").stat()
        if (base.st_size, int(base.st_mtime)) != (image.size, image.mtime):
            raise StateError(
                f"the base of guest `{guest.name}` is not image `{image.name}` any more",
                hint=f"`stockade guest rm {guest.name}`, and make it again",
            )
        run = runtime_directory(guest.name)
        shutil.rmtree(machine / "run", ignore_errors=True)
        (machine / "run").mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(machine / "run", guest.uid, guest.gid)
        (place / "last.json").unlink(missing_ok=True)
        links = network.wires(guest)
        plan = network.plan(guest, links)
        wall = walls.around(guest, kernel, machine)
        leash_reader, leash_writer = os.pipe() if leash else (None, None)
        orders = {
            "record": os.fspath(place / record.NAME) if guest.record else "", "record_bytes": _RECORD_BYTES,
            "machine": os.fspath(machine), "run": os.fspath(run), "log": os.fspath(place / "console.log"),
            "log_bytes": _LOG_BYTES, "last": os.fspath(place / "last.json"), "output": os.fspath(place / "uml.log"),
            "uid": guest.uid, "gid": guest.gid, "cpu": choose_cpu(guest.name), "line": image.start.has_line,
            "stop_s": max(_STOP_S, image.start.stop_ms / 1000 + 2.0),
            "leash": leash_reader, "helpers": plan.helpers, "late": plan.late,
            "wires": links.near, "far_ends": links.far, "peers": list(guest.links), **wall.orders,
            "argv": [
                wall.kernel,
                *commandline.words(
                    kernel, name=guest.name, memory=guest.memory, lpj=kernels.loops_per_jiffy(kernel),
                    start=image.start,
                    walls=guest.walls, interfaces=(*plan.interfaces, *links.interfaces), dns=plan.dns,
                    read_only=read_only, wait=wait, record=guest.record,
                ),
            ],
        }  # fmt: skip
        passed = [
            number
            for number in (lock, leash_reader, *links.near, *links.far.values(), *plan.inherit)
            if number is not None
        ]
        started = Started(guest.name, _spawn_keeper(orders, passed, place / "keeper.log"), leash_writer)
        for number in (leash_reader, *links.near, *links.far.values(), *plan.inherit):
            if number is not None:
                os.close(number)
    try:
        started.wait_ready(ready_s or (_SYSTEM_READY_S if image.start.system else _READY_S))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        raise
    if not guest.booted:
        store.save(msgspec.structs.replace(guest, booted=True))
    return started


def _spawn_keeper(orders: dict[str, Any], inherit: Sequence[int], log: Path) -> subprocess.Popen[bytes]:
    package = os.path.dirname(os.path.dirname(os.path.abspath(stockade.__file__)))
    with open(log, "wb") as errors:
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _KEEPER, package], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, pass_fds=inherit, start_new_session=True, cwd="/",
        )  # fmt: skip
    assert keeper.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        keeper.stdin.write(json.dumps(orders).encode("utf-8", "surrogatepass"))
        keeper.stdin.close()
    return keeper


def runtime_directory(name: str) -> Path:
    """RUN/@guests/NAME, made for the caller alone."""
    from stockade.contain.runfiles import private

    base = places.run()
    if str(base.parent).startswith("/tmp/"):
        private(base.parent)
    for path in (base, base / "@guests", places.guest_runtime(name)):
        private(path)
    return places.guest_runtime(name)


def choose_cpu(name: str) -> int:
    """One of the CPUs that this process may use: UML is several times slower when it moves between them."""
    allowed = sorted(os.sched_getaffinity(0))
    running = [other for other in store.names() if other != name and control.is_running(other)]
    return allowed[len(running) % len(allowed)]


def log_tail(name: str, lines: int = 12) -> str:
    """The last lines of the guest's console and of the kernel's own output."""
    text = []
    for file in ("uml.log", "console.log", "keeper.log"):
        with contextlib.suppress(FileNotFoundError), open(places.guest(name) / file, "rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - 4096))
            text += opened.read().decode("utf-8", "replace").splitlines()[-lines:]
    return "\n".join(line.rstrip() for line in text if line.strip())


def stop(name: str, *, timeout_s: float | None = None, kill: bool = False) -> dict[str, Any]:
    """End a guest: its PID 1 is told to, after `timeout_s` the kernel is halted, then its processes are ended.

    `timeout_s`: 20 by default, or what the image says where that is longer. `kill`: its processes are ended at once.
    Returns what the keeper says last: "status" of the service, "cause".
    StateError when it does not run.
    """
    limit, given = (_LONGEST_STOP_S, {}) if timeout_s is None else (timeout_s, {"timeout_s": timeout_s})
    with control.connect(name) as connection:
        if kill:
            last = control.ask(connection, "kill", _KILL_S)
        else:
            last = control.ask(connection, "stop", limit + _KILL_S, **given)
    _await_unlocked(name)
    return last


def _await_unlocked(name: str) -> None:
    """Until the keeper is gone, and with it the lock."""
    end = time.monotonic() + 10.0
    while time.monotonic() < end:
        try:
            with store.locked(name):
                return
        except StateError:
            time.sleep(0.005)
