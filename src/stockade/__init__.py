"""Put walls around a service: observe it, build the smallest root in which it works, run it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .records.report import BuildReport
    from .records.spec import Spec
    from .workflow import build, build_from_lock

__all__ = ["BuildReport", "Spec", "build", "build_from_lock"]

# Imported at first use: the path of `stockade run` goes through this package and needs none of it.
_HOMES = {
    "BuildReport": "stockade.records.report",
    "Spec": "stockade.records.spec",
    "build": "stockade.workflow",
    "build_from_lock": "stockade.workflow",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)
