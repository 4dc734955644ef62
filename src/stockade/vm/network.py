"""A guest's network: none, published ports without egress, egress too, and wires to other guests. Without root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from stockade.records.guest import Guest

from .commandline import Interface

__all__ = ["Plan", "Wires", "plan", "wires"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Interfaces of a guest, commands that the keeper runs for them, and descriptors that those inherit."""

    interfaces: tuple[Interface, ...] = ()
    helpers: list[dict[str, Any]] = []
    inherit: tuple[int, ...] = ()
    dns: str = ""


class Wires(msgspec.Struct, frozen=True, kw_only=True):
    """Wires to other guests: this guest's ends, and the far ends that its keeper holds for those guests."""

    interfaces: tuple[Interface, ...] = ()
    near: list[int] = []
    far: dict[str, int] = {}


def plan(guest: Guest, run: Path, links: Wires) -> Plan:
    return Plan()


def wires(guest: Guest) -> Wires:
    return Wires()
