"""The process that keeps one guest: starts UML, holds its console and serial line, serves clients, cleans up.

Started by `start.py` with its orders as JSON on standard input; says what happens in lines of JSON on its standard
output. When it ends, the guest ends: UML is the first process of a pid namespace and dies with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

from . import frames, keys
from .clients import Clients
from .consolelog import ConsoleLog
from .disks import Disks
from .helpers import Helpers
from .mconsole import Console
from .record import Record
from .spawn import Machine, start_machine

__all__ = ["Keeper", "main"]

_READ = 65536
_HALT_S = 2.0
_POLL_S = 0.005
_BUSY_S, _BUSY_MOST_S = 0.05, 10.0


class Keeper:
    """State of a running guest, as its keeper knows it."""

    def __init__(self, orders: dict[str, Any], report: int) -> None:
        self.orders = orders
        self.selector = selectors.DefaultSelector()
        self._report = report
        self.began = time.monotonic()
        self.ready = False
        self.frozen = False
        self._gathers = False  # its kernel's way of gathering keys is known
        self.service: int | None = None
        self.status: int | None = None
        self.fault = ""
        self.log = ConsoleLog(orders["log"], orders["log_bytes"])
        self.record = Record(orders["record"], orders["record_bytes"]) if orders["record"] else None
        self._reader = frames.Reader()
        self._line_out = bytearray()
        self._room = frames.LINE_MOST
        self._timers: list[tuple[float, str]] = []
        self._mconsole: Console | None = None
        self.helpers = Helpers()
        self._late = list(orders["late"])
        self.machine: Machine | None = None
        self.console, console_far = socket.socketpair()
        self.line, line_far = socket.socketpair()
        for mine in (self.console, self.line):
            mine.setblocking(False)
        self._given = [console_far, line_far]
        self.clients = Clients(self)
        self.disks = Disks(self.mconsole)

    def say(self, **what: object) -> None:
        """Tell whoever started the guest, while anybody listens."""
        with contextlib.suppress(BrokenPipeError, OSError):
            os.write(self._report, json.dumps(what).encode() + b"\n")

    def begin(self) -> None:
        """Start helpers and UML."""
        self.helpers.wait(self.orders["helpers"])
        wires = [int(number) for number in self.orders["wires"]]
        given = [item.fileno() for item in self._given] + wires
        self.machine = start_machine(self.orders, given)
        for item in self._given:
            item.close()
        self.say(started=self.machine.pid)
        self.selector.register(self.console, selectors.EVENT_READ, self._read_console)
        self.selector.register(self.line, selectors.EVENT_READ, self._line_event)
        self.selector.register(self.machine.watch, selectors.EVENT_READ, self._machine_event)

    def run(self) -> None:
        """Serve until UML has ended."""
        assert self.machine is not None
        while not self.machine.ended:
            now = time.monotonic()
            due = [what for when, what in self._timers if when <= now]
            self._timers = [timer for timer in self._timers if timer[0] > now]
            for what in due:
                self._on_time(what)
            left = min((when for when, _ in self._timers), default=None)
            for key, mask in self.selector.select(None if left is None else max(0.0, left - time.monotonic())):
                key.data(mask)
                if self.machine.ended:
                    break
        self._read_rest()

    def finish(self) -> None:
        """End what is left and tell everybody."""
        if self.machine is not None:
            self.machine.kill()
        self.helpers.end()
        if self.machine is not None and self.machine.lacked_memory and not self.fault:
            self.fault = f"its process went over the memory limit of the jail around it, {self.orders['limit']}"
            self.log.write(f"stockade: {self.fault}: the host killed it\n".encode())
        self.log.close()
        if self.record is not None:
            self.record.close()
        last = {"ended": time.time(), "status": self.status, "cause": self._cause(), "fault": self.fault}
        with contextlib.suppress(OSError), open(self.orders["last"], "w", encoding="utf-8") as file:
            json.dump(last, file)
        self.clients.finish(last)
        self.say(**last)

    def _cause(self) -> str:
        if self.machine is not None and self.machine.lacked_memory:
            return "memory"
        if self.fault:
            return "fault"
        code = None if self.machine is None else self.machine.code
        return "halted" if code == 0 else "killed" if code is None or code < 0 or code >= 128 else "failed"

    def _read_rest(self) -> None:
        for source, take in ((self.console, self._take_console), (self.line, self._take_line)):
            with contextlib.suppress(OSError, ValueError):
                while data := source.recv(_READ):
                    take(data)

    # the console

    def _read_console(self, _: int) -> None:
        try:
            data = self.console.recv(_READ)
        except (BlockingIOError, ConnectionResetError):
            return
        if data:
            self._take_console(data)
        else:
            self.selector.unregister(self.console)

    def _take_console(self, data: bytes) -> None:
        first = not self.log.written
        self.log.write(data)
        if first:
            self.say(console=time.monotonic() - self.began)
            if not self.orders["line"]:
                self._connect()
        self.clients.console(data)

    def type(self, data: bytes) -> None:
        """Send what was typed to the console; what it does not take is dropped, as a terminal does."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self.console.send(data)

    # the serial line

    def send(self, frame: bytes) -> None:
        """Send a frame to the guest."""
        self._line_out += frame
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._line_out and self._room > 0:
                    sent = self.line.send(self._line_out[: self._room])
                    del self._line_out[:sent]
                    self._room -= sent
            except (BrokenPipeError, ConnectionResetError):
                self._line_out.clear()
        waiting = self._line_out and self._room > 0
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if waiting else 0)
        with contextlib.suppress(KeyError):
            self.selector.modify(self.line, events, self._line_event)

    def _line_event(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if mask & selectors.EVENT_READ:
            try:
                data = self.line.recv(_READ)
            except (BlockingIOError, ConnectionResetError):
                return
            if not data:
                self.selector.unregister(self.line)
                return
            try:
                self._take_line(data)
            except ValueError:
                # A guest whose line is out of step cannot be spoken with any more.
                self.fault = "the guest sent what is no frame on its serial line"
                self.say(failed=self.fault)
                self.selector.unregister(self.line)
                self._end_record("the record of the guest has ended with its line: it is frozen")

    def _take_line(self, data: bytes) -> None:
        for kind, session, payload in self._reader.feed(data):
            if kind == frames.READY:
                self._connect()
            elif kind == frames.RECORD:
                self._take_record(session, payload)
            elif kind == frames.GATHERS:
                self._tell_keys_at_once(payload)
            elif kind == frames.TAKEN:
                self._room = min(frames.LINE_MOST, self._room + frames.number(payload))
                self._flush()
            elif kind in (frames.STARTED, frames.ENDED, frames.FAULT):
                self._take_news(kind, payload)
            else:
                self.clients.frame(kind, session, payload)

    def _take_news(self, kind: int, payload: bytes) -> None:
        """Pass on what is said once in a guest's life: whoever started it may not read, the guest say it forever."""
        if kind == frames.STARTED and self.service is None and self.status is None:
            self.service = frames.number(payload)
            self.say(service=self.service)
        elif kind == frames.ENDED and self.status is None:
            self.status = frames.number(payload)
            self.service = None
            self.say(status=self.status)
        elif kind == frames.FAULT and not self.fault:
            self.fault = payload.decode("utf-8", "replace")
            self.say(failed=self.fault)

    def _take_record(self, session: int, payload: bytes) -> None:
        """Keep what the guest's kernel tells. A guest whose doings cannot be kept does nothing more."""
        if self.record is None:
            return
        try:
            self.record.take(payload, more=session == 1)
            whole = not self.record.full
        except OSError:
            whole = False
        if not whole:
            self._end_record("the record of the guest is full: it is frozen")

    def _end_record(self, why: str) -> None:
        """A guest whose doings cannot be kept any more does nothing more."""
        if self.record is None or self.frozen:
            return
        self.say(note=why)
        try:
            self.freeze()
        except Exception:
            self.kill()

    def _tell_keys_at_once(self, payload: bytes) -> None:
        """Have the guest's kernel tell each key when it is read; before anything runs in the guest."""
        if self.record is None or self.machine is None or self.ready or self._gathers:
            return
        self._gathers = True
        try:
            keys.tell_at_once(self.machine.processes(), payload)
        except (OSError, ValueError) as error:
            self.record.note(f"keys are recorded late: {error}")

    def _connect(self) -> None:
        """What the network still needs once UML has opened its side of it; then the guest is ready."""
        while self._late:
            if not self.helpers.carry_out(self._late[0]):
                self._timers.append((time.monotonic() + _POLL_S, "connect"))
                if self.orders["line"]:
                    return
                break
            del self._late[0]
        if not self.ready:
            self.ready = True
            self.say(ready=time.monotonic() - self.began)

    # the machine

    def _machine_event(self, _: int) -> None:
        assert self.machine is not None
        self.machine.reap()

    def mconsole(self, command: str) -> str:
        """Ask the kernel's management console. StateError, TimeoutError as it has them."""
        if self._mconsole is None:
            self._mconsole = Console("run/uml/mconsole", f"run/client{os.getpid()}")
        return self._mconsole.request(command)

    def detach(self, disk: str, wait_s: float = _BUSY_S) -> None:
        """Take a disk away, once nobody in the guest has it open: that is tried again, less and less often."""
        if not self.disks.detach(disk):
            self._timers.append((time.monotonic() + wait_s, f"detach {disk} {min(2 * wait_s, _BUSY_MOST_S)}"))

    def freeze(self) -> None:
        """Stop every processor of the guest where it is."""
        if not self.frozen:
            self.mconsole("stop")
            self.frozen = True

    def thaw(self) -> None:
        """Go on."""
        if self.frozen:
            self.mconsole("go")
            self.frozen = False

    def stop(self, timeout_s: float) -> None:
        """Ask the guest's PID 1 to end it; then halt the kernel; then end its processes."""
        now = time.monotonic()
        try:
            self.thaw()
            self.mconsole("cad")
        except (OSError, RuntimeError, Exception) as error:
            self.say(note=str(error))
            timeout_s = 0.0
        self._timers += [(now + timeout_s, "halt"), (now + timeout_s + _HALT_S, "kill")]

    def kill(self) -> None:
        """End UML at once."""
        if self.machine is not None:
            self.machine.kill()

    def _on_time(self, what: str) -> None:
        if what == "halt":
            with contextlib.suppress(Exception):
                self.mconsole("halt")
        elif what == "kill":
            self.kill()
        elif what == "connect":
            self._connect()
        elif what.startswith("detach "):
            _, disk, wait_s = what.split()
            self.detach(disk, float(wait_s))


def main() -> None:
    """Keep the guest of the orders on standard input."""
    orders = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir(orders["machine"])
    keeper = Keeper(orders, report)
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop(orders["stop_s"]))
    # A signal's handler only runs between two steps of the interpreter: a pipe wakes the wait.
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer)
    keeper.selector.register(reader, selectors.EVENT_READ, lambda _: os.read(reader, 4096))
    try:
        keeper.clients.listen(orders["run"])
        if orders.get("leash") is not None:
            keeper.clients.leash(orders["leash"])
        keeper.begin()
        keeper.run()
    except Exception as error:
        keeper.fault = keeper.fault or f"{type(error).__name__}: {error}"
        keeper.say(failed=keeper.fault)
    finally:
        keeper.finish()
