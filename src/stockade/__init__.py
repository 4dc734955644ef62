"""Put walls around a service: observe it, build the smallest root in which it works, run it there."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, whose import would double the time of `stockade run`

if TYPE_CHECKING:
    from .api import Completed, Jail, Pool, run, run_async
    from .errors import ProgramError, ProgramTimeoutError, StockadeError, WallError
    from .records.spec import Spec

__all__ = [
    "Completed", "Jail", "Pool", "ProgramError", "ProgramTimeoutError", "Spec", "StockadeError", "WallError", "run",
    "run_async",
]  # fmt: skip

# Imported at first use: the path of `stockade run` goes through this package and needs none of it.
_HOMES = {
    "Completed": "stockade.api",
    "Jail": "stockade.api",
    "Pool": "stockade.api",
    "ProgramError": "stockade.errors",
    "ProgramTimeoutError": "stockade.errors",
    "Spec": "stockade.records.spec",
    "StockadeError": "stockade.errors",
    "WallError": "stockade.errors",
    "run": "stockade.api",
    "run_async": "stockade.api",
}


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # or a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(home), name)
