"""When an observed service counts as started. Looks at its sockets in /proc, connects to nothing.

A connection would be an event: a service started for each connection would consume it, others log it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import ServiceError
from ..records.spec import Ready

__all__ = ["Probe", "Sockets", "await_ready", "conditions", "settle", "sockets"]

_POLL_S = 0.02
_QUIET_S = 0.4
_COMMAND_TIMEOUT_S = 10.0
_TCP_LISTEN = "0A"  # include/net/tcp_states.h
_SO_ACCEPTCON = 0x10000  # include/uapi/linux/net.h: the unix socket listens


@dataclass(frozen=True)
class Sockets:
    """What a network namespace listens to: ports, and paths of unix sockets."""

    tcp: frozenset[int]
    udp: frozenset[int]
    unix: frozenset[str]
    listening_unix: bool

    @property
    def listening(self) -> bool:
        """Whether a client could connect to anything."""
        return bool(self.tcp or self.udp or self.listening_unix)


@dataclass(frozen=True)
class Probe:
    """The ways to ask about the service. `check` raises when it has ended and should not have."""

    pid: int
    exists: Callable[[str], bool]
    run: Callable[[tuple[str, ...], float], int | None]
    log: Callable[[], str]
    check: Callable[[], None]
    ended: Callable[[], bool]
    ticks: Callable[[], int]
    ignored: frozenset[str] = frozenset()


def sockets(pid: int, *, ignored: frozenset[str] = frozenset()) -> Sockets:
    """The sockets of the network namespace of process `pid`, but for unix sockets of the paths `ignored`."""
    ports: dict[str, set[int]] = {"tcp": set(), "udp": set()}
    for kind, found in ports.items():
        for table in (kind, f"{kind}6"):
            for fields in _rows(pid, table):
                if kind == "udp" or fields[3] == _TCP_LISTEN:
                    found.add(int(fields[1].rpartition(":")[2], 16))
    paths = set()
    listening = False
    for fields in _rows(pid, "unix"):
        path = fields[7] if len(fields) > 7 else ""
        if path and path not in ignored:
            paths.add(path)
            listening = listening or bool(int(fields[3], 16) & _SO_ACCEPTCON)
    return Sockets(frozenset(ports["tcp"]), frozenset(ports["udp"]), frozenset(paths), listening)


def _rows(pid: int, table: str) -> Iterator[list[str]]:
    """The lines below the heading of /proc/PID/net/TABLE; none if the kernel has no such protocol."""
    try:
        with open(f"/proc/{pid}/net/{table}", encoding="utf-8", errors="surrogateescape") as file:
            next(file, None)
            for line in file:
                yield line.removesuffix("\n").split(maxsplit=7 if table == "unix" else -1)
    except (FileNotFoundError, ProcessLookupError):
        return


def conditions(ready: Ready) -> tuple[str, ...]:
    """The conditions that are given, as a message names them."""
    given = (
        (ready.tcp is not None, f"TCP port {ready.tcp} is listened to"),
        (ready.udp is not None, f"UDP port {ready.udp} is bound"),
        (ready.unix is not None, f"`{ready.unix}` is listened to"),
        (ready.file is not None, f"`{ready.file}` is there"),
        (bool(ready.command), f"`{' '.join(ready.command)}` succeeds"),
        (ready.log is not None, f"its output matches `{ready.log}`"),
    )
    return tuple(text for holds, text in given if holds)


def _holds(ready: Ready, probe: Probe) -> bool:
    if ready.tcp is not None or ready.udp is not None or ready.unix is not None:
        found = sockets(probe.pid, ignored=probe.ignored)
        if ready.tcp in found.tcp or ready.udp in found.udp:
            return True
        if ready.unix is not None and probe.exists(ready.unix):
            # A service that has changed its directory or root binds a shorter name of the same file.
            name = os.path.basename(ready.unix)
            if any(os.path.basename(path) == name for path in found.unix):
                return True
    if ready.file is not None and probe.exists(ready.file):
        return True
    if ready.log is not None and re.search(ready.log, probe.log(), re.MULTILINE):
        return True
    return bool(ready.command) and probe.run(ready.command, _COMMAND_TIMEOUT_S) == 0


def await_ready(ready: Ready, probe: Probe) -> None:
    """Wait until one of the conditions holds; ServiceError if none does in time, or the service ends before."""
    deadline = time.monotonic() + ready.timeout_s
    while not _holds(ready, probe):
        probe.check()
        if time.monotonic() > deadline:
            found = sockets(probe.pid, ignored=probe.ignored)
            heard = [f"{kind} {port}" for kind in ("tcp", "udp") for port in sorted(getattr(found, kind))]
            raise ServiceError(
                f"the service was not ready within {ready.timeout_s:g} s: "
                f"waited until {', or '.join(conditions(ready))}",
                hint=(f"it listens to {', '.join(heard)}; " if heard else "")
                + "set `ready` in `[service]` to what tells that it has started, or a longer `timeout_s` there",
                log=probe.log(),
            )
        time.sleep(_POLL_S)


def settle(probe: Probe, *, timeout_s: float, until_end: bool, at_most: bool = False) -> None:
    """Without a condition: wait until the service ends, or does nothing for a while, or `timeout_s` is over.

    One that listens may still be starting: what it binds first need not be what clients come for. With `until_end`
    idleness alone does not count: a command that sleeps goes on to its end. One that works and listens nowhere may
    be a command that will end, and is waited for even longer, but `at_most`.
    """
    deadline = time.monotonic() + timeout_s
    ticks, since = -1, time.monotonic()
    while not probe.ended():
        now = time.monotonic()
        used = probe.ticks()
        if used != ticks:
            ticks, since = used, now
        listening = sockets(probe.pid, ignored=probe.ignored).listening
        idle = now - since >= _QUIET_S
        if (idle and (listening or not until_end)) or (now > deadline and (idle or listening or at_most)):
            break
        time.sleep(_POLL_S)
    probe.check()
