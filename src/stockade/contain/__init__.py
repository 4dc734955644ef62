"""Put walls around a service: compile the launch plan, start the warden, keep track of what runs."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as typing's, which costs more to import than the whole of `fast`

if TYPE_CHECKING:
    from stockade.records.launch import IdRange, LaunchPlan

    from .compile import compile_plan
    from .encoding import encode
    from .entering import enter
    from .ids import allocate, for_jail, of_caller
    from .installing import install
    from .jail import Running
    from .limiting import not_limited
    from .log import Follower, logs
    from .network import RESOLVER
    from .registry import EndedJail, RunningJail, ended, find, last_status, running, stop
    from .runfiles import alive
    from .starting import launch, launch_generation
    from .wording import describe

__all__ = [
    "EndedJail", "Follower", "IdRange", "LaunchPlan", "RESOLVER", "Running", "RunningJail", "alive", "allocate",
    "compile_plan", "describe", "encode", "ended", "enter", "find", "for_jail", "install", "last_status", "launch",
    "launch_generation", "logs", "not_limited", "of_caller", "running", "stop", "warden_path",
]  # fmt: skip

# Imported at first use: the path of `stockade run` goes through this package and needs one module of it.
_HOMES = {
    "IdRange": "stockade.records.launch",
    "LaunchPlan": "stockade.records.launch",
    "RESOLVER": "stockade.contain.network",
    "Running": "stockade.contain.jail",
    "EndedJail": "stockade.contain.registry",
    "Follower": "stockade.contain.log",
    "RunningJail": "stockade.contain.registry",
    "alive": "stockade.contain.runfiles",
    "allocate": "stockade.contain.ids",
    "compile_plan": "stockade.contain.compile",
    "describe": "stockade.contain.wording",
    "encode": "stockade.contain.encoding",
    "ended": "stockade.contain.registry",
    "enter": "stockade.contain.entering",
    "find": "stockade.contain.registry",
    "for_jail": "stockade.contain.ids",
    "install": "stockade.contain.installing",
    "last_status": "stockade.contain.registry",
    "launch": "stockade.contain.starting",
    "launch_generation": "stockade.contain.starting",
    "logs": "stockade.contain.log",
    "not_limited": "stockade.contain.limiting",
    "of_caller": "stockade.contain.ids",
    "running": "stockade.contain.registry",
    "stop": "stockade.contain.registry",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)


def warden_path() -> str:
    """The warden's file: part of the package, compiled when the package was built."""
    return f"{os.path.dirname(os.path.dirname(__file__))}/_warden/warden"
