"""The catalogue of probes, read from `probes.toml`. Tries nothing."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

import msgspec

from stockade.records.proof import Probe

__all__ = ["LIMITS", "OUTSIDE", "catalogue"]

#: Probes of limits: tried in a launch of their own, in which the limits that are set are small.
LIMITS = ("R1", "R2", "R3", "R4")

#: Probes that the launcher itself is put to: nothing runs inside.
OUTSIDE = ("F19",)


@cache
def catalogue() -> dict[str, Probe]:
    """Every probe by its id, in order."""
    text = Path(__file__).with_name("probes.toml").read_text(encoding="utf-8")
    rows = msgspec.convert(tomllib.loads(text)["probe"], tuple[Probe, ...])
    return {row.id: row for row in rows}
