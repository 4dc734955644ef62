"""One run of the probes behind one set of walls: the terminal they are given, what they ask, what they report."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import select
import time
import tty
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from stockade.errors import WallError
from stockade.kernel import capabilities, libc

from .canaries import VARIABLE, Canaries

__all__ = ["Input", "Seen", "Terminal", "conduct", "dirty", "messages", "terminal"]

#: A group that no account has, to see whether the launcher's own groups are given up.
GROUP = 64177
_INHERITED = ("net_raw",)
_CAPABILITY_VERSION = 0x20080522
_EVERY = (1 << 64) - 1
_RUN_S = 60.0

_capget = libc.function("capget", ctypes.c_void_p, ctypes.c_void_p)
_capset = libc.function("capset", ctypes.c_void_p, ctypes.c_void_p)


class Input(Protocol):
    """The probes' standard input, seen from outside."""

    def say(self, line: str) -> None:
        """Type a line."""

    def pushed(self) -> bytes:
        """What stands in it and was never typed here."""


@dataclass
class Terminal:
    """A terminal outside: the probes' standard input. What is pushed into it is seen here."""

    master: int
    slave: int

    def say(self, line: str) -> None:
        """Type a line."""
        os.write(self.master, line.encode() + b"\n")

    def pushed(self) -> bytes:
        """What stands in the terminal's input and was never typed here."""
        found = b""
        while select.select([self.slave], [], [], 0)[0]:
            piece = os.read(self.slave, 4096)
            if not piece:
                break
            found += piece
        return found


@contextlib.contextmanager
def terminal() -> Iterator[Terminal]:
    """A pair of our own, raw, so that what is read is what was typed."""
    master, slave = pty.openpty()
    try:
        tty.setraw(slave)
        yield Terminal(master, slave)
    finally:
        os.close(master)
        os.close(slave)


@dataclass
class Seen:
    """What a run reported: each probe's result, and what stood in the terminal afterwards."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    pushed: bytes = b""


@contextlib.contextmanager
def dirty(canaries: Canaries) -> Iterator[int]:
    """A launcher's state as careless callers have it: an open directory, a secret, groups, inheritable capabilities.

    Gives the directory's descriptor. Everything is as before afterwards.
    """
    descriptor = os.open(canaries.directory, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(descriptor, True)
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = canaries.marks["environment"]
    groups, inherited = os.getgroups(), _inherit(0, clear=0)
    try:
        if os.geteuid() == 0:
            os.setgroups([*groups, GROUP])
            _inherit(capabilities.mask(_INHERITED), clear=0)
        yield descriptor
    finally:
        if os.geteuid() == 0:
            _inherit(inherited, clear=_EVERY)
            os.setgroups(groups)
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        os.close(descriptor)


def _inherit(mask: int, *, clear: int) -> int:
    """Take `clear` out of this thread's inheritable set and put `mask` in, where it is permitted; the set before."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    libc.check(_capget(header, data), "capget")
    before = data[2] | data[5] << 32
    wanted = before & ~clear | mask & (data[1] | data[4] << 32)
    if wanted != before:
        data[2], data[5] = wanted & 0xFFFFFFFF, wanted >> 32
        libc.check(_capset(header, data), "capset")
    return int(before)


def conduct(
    told: Iterable[dict[str, Any]], terminal: Input, *, at_ready: Callable[[dict[str, Any]], None],
    answer: Callable[[dict[str, Any]], str],
) -> Seen:  # fmt: skip
    """Lead the probes that tell `told`, as `messages` reads it, through their run.

    `at_ready` is called once they are executed and before the first; `answer` answers what they ask of the outside.
    """
    seen = Seen()
    for message in told:
        if "ready" in message:
            at_ready(message)
            terminal.say("go")
        elif "pushed" in message:
            seen.pushed += terminal.pushed()
        elif "ask" in message:
            terminal.say(answer(message))
        elif "id" in message:
            seen.results[message["id"]] = message
    seen.pushed += terminal.pushed()
    return seen


def messages(output: int, *, limit_s: float = _RUN_S) -> Iterator[dict[str, Any]]:
    """What the probes tell on the descriptor `output`, until it ends. WallError when that takes more than `limit_s`."""
    deadline = time.monotonic() + limit_s
    text = b""
    while True:
        while b"\n" not in text:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WallError(
                    f"the probes did not end within {limit_s:.0f} seconds", hint="stop what keeps the host busy"
                )
            piece = os.read(output, 65536)
            if not piece:
                return
            text += piece
        line, _, text = text.partition(b"\n")
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


