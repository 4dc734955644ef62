"""Turn what was typed into a jail that is there, or into an error that names the nearest one."""

from __future__ import annotations

from stockade import places, specfile
from stockade.build.generations import Store
from stockade.build.leftovers import sweep
from stockade.cli import console
from stockade.errors import NotFoundError
from stockade.records.generation import Generation

__all__ = ["RUNNING", "built", "existing", "jail_of", "known"]

#: What verbs about running jails take for NAME.
RUNNING = "name of the jail; NAME@NUMBER, as `ps` shows it, for one of several commands in it"


def known() -> list[str]:
    """Return the names of the caller's jails, sorted. What killed builds and removals left is swept first."""
    sweep()
    try:
        return sorted(path.name for path in places.jails().iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


def existing(name: str) -> Store:
    """Return what is kept of the jail `name`; `NotFoundError` when there is nothing. Sweeps as `known` does."""
    store = Store(name)
    sweep(name)
    if store.exists():
        return store
    if name in {*specfile.specs(), *specfile.recipes()}:
        hint = f"`stockade build {name}` makes it"
    else:
        hint = "`stockade list` shows the jails that there are, `stockade recipes` what can be built"
    raise NotFoundError(f"there is no jail `{name}`{console.nearest(name, known())}", hint=hint)


def jail_of(instance: str) -> str:
    """Return the jail of a running instance: what `ps` shows as NAME, or as NAME@NUMBER for a command beside it."""
    return instance.partition("@")[0]


def built(name: str) -> Generation:
    """Return the current generation of the jail `name`; `NotFoundError` when none was built."""
    current = existing(name).current()
    if current is None:
        raise NotFoundError(f"jail `{name}` has not been built", hint=f"`stockade build {name}` builds it")
    return current
