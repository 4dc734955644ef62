"""The catalogues of probes, read from `probes.toml` and `machine.toml`. Tries nothing."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

import msgspec

from stockade.records.proof import Probe

__all__ = ["LIMITS", "OUTSIDE", "catalogue", "machine_catalogue", "row"]

#: Probes of limits: tried in a launch of their own, in which the limits that are set are small.
LIMITS = ("R1", "R2", "R3", "R4")

#: Probes that the launcher itself is put to: nothing runs inside.
OUTSIDE = ("F19",)


@cache
def catalogue() -> dict[str, Probe]:
    """Every probe out of a jail by its id, in order."""
    return _read("probes.toml")


@cache
def machine_catalogue() -> dict[str, Probe]:
    """Every probe out of a machine by its id, in order."""
    return _read("machine.toml")


def row(name: str) -> Probe:
    """The probe `name` of either catalogue."""
    return catalogue().get(name) or machine_catalogue()[name]


def _read(file: str) -> dict[str, Probe]:
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    rows = msgspec.convert(tomllib.loads(text)["probe"], tuple[Probe, ...])
    return {row.id: row for row in rows}
