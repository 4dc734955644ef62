"""From a trace and a spec to the closure: every file that a jail needs, with the evidence. Never runs a target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import ldso, packages, shebang
from .closure import require_command, resolve
from .packages import PackageIndex

if TYPE_CHECKING:
    from .gap import gaps, obstacles
    from .summing import Step, Summary, chain, summary

__all__ = [
    "PackageIndex",
    "Step",
    "Summary",
    "chain",
    "gaps",
    "ldso",
    "obstacles",
    "packages",
    "require_command",
    "resolve",
    "shebang",
    "summary",
]

# Imported at first use: a build that tries nothing compares and sums up nothing.
_HOMES = {
    "gaps": "gap", "obstacles": "gap",
    "Step": "summing", "Summary": "summing", "chain": "summing", "summary": "summing",
}  # fmt: skip


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{home}", __name__), name)
