"""Watch a service work: outside in a throwaway view of the host, inside in its jail."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .absent import cures
    from .jailed import Attach, inside
    from .process import Process
    from .run import Identity, Observation, outside
    from .view import View

__all__ = ["Attach", "Identity", "Observation", "Process", "View", "cures", "inside", "outside"]

# Imported at first use: who waits for a service needs no reader of traces.
_HOMES = {"Attach": "jailed", "Process": "process", "View": "view", "cures": "absent", "inside": "jailed"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES.get(name, 'run')}", __name__), name)
