"""The system calls of UML as a policy, from `calls.toml`: exactly those, whatever a preset holds."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Literal

from stockade.kernel import presets
from stockade.records.spec import Syscalls

__all__ = ["allowed", "policy"]

_PRESET: Literal["strict"] = "strict"


@functools.cache
def allowed() -> frozenset[str]:
    """Words for everything that UML is allowed: names of calls, `socket:FAMILY`."""
    table = tomllib.loads(Path(__file__).with_name("calls.toml").read_text(encoding="utf-8"))
    return frozenset({*table["seen"], *table["unseen"], *(f"socket:{family}" for family in table["families"])})


def policy() -> Syscalls:
    """The policy that allows `allowed`, as a difference from a preset."""
    preset = presets.presets()[_PRESET]
    held = {call for group in preset.groups for call in presets.groups()[group].calls}
    held |= {f"socket:{family}" for family in preset.families} | {f"netlink:{name}" for name in preset.netlink}
    return Syscalls(preset=_PRESET, add=tuple(sorted(allowed() - held)), remove=tuple(sorted(held - allowed())))
