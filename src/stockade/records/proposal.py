"""What walls refused and which policy is enough, both in a spec's own words."""

from __future__ import annotations

from typing import Literal

import msgspec


class SpecLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of TOML for a spec, and the table that it belongs in (`policy.syscalls`)."""

    table: str
    line: str


Obstacle = Literal[
    "filter",        # the system call filter
    "capability",    # a capability that the service does not have
    "host",          # a right over the host, which no jail can have
    "read-only",     # a place that is read-only
    "files",         # owner and mode of a file
    "device",        # a device that the jail does not show
    "landlock",
    "network",
    "limit",
    "missing",       # a file that the host has and the jail does not
]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a wall refused. `lines` allow it; none where nothing can (`never`) or nothing in a spec would.

    `confirmed`: whether it was no longer refused in a run with these lines, null where that was not tried.
    """

    what: str
    wall: Obstacle
    reason: str
    call: str = ""
    error: str = ""
    path: str = ""
    count: int = 1
    never: bool = False
    lines: tuple[SpecLine, ...] = ()
    confirmed: bool | None = None


class Missed(msgspec.Struct, frozen=True, kw_only=True):
    """A capability that the exercises do not need, and calls that are refused for want of it."""

    capability: str
    calls: tuple[str, ...]


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """The narrowest policy in which everything that was exercised works, as observed inside.

    `preset` is the narrowest that covers every call used and `used` counts these; `unused` counts the calls that it
    allows and nobody made. `add` is what is used beyond the widest preset. `refused` are calls that were refused
    though nothing failed. `devices` are those opened beyond the default ones. `written` are the directories written
    to, with the kind that each should have. `ports` are listened on. `lines` say all this in a spec's words.
    """

    preset: str
    preset_now: str
    add: tuple[str, ...] = ()
    used: int = 0
    unused: int = 0
    capabilities: tuple[str, ...] = ()
    missed: tuple[Missed, ...] = ()
    refused: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    written: dict[str, str] = {}
    ports: tuple[str, ...] = ()
    lines: tuple[SpecLine, ...] = ()
    toml: str = ""
