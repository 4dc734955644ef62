"""Where Stockade keeps things, for root and for an ordinary user. Makes nothing."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "configuration", "guest", "guest_runtime", "guests", "images", "jail", "jails", "kernels", "run", "runtime",
    "state",
]  # fmt: skip


def _place(part: str, *, root: str, variable: str, fallback: str) -> Path:
    """$STOCKADE_HOME/`part` when that is set, else root's place, else the user's below an XDG base directory.

    A relative value of `variable` is ignored, as the XDG specification demands.
    """
    home = os.environ.get("STOCKADE_HOME", "")
    if home:
        return Path(f"{os.path.abspath(home)}/{part}")
    if os.geteuid() == 0:
        return Path(root)
    base = os.environ.get(variable, "")
    return Path(f"{base if os.path.isabs(base) else os.path.expanduser(fallback)}/stockade")


def configuration() -> Path:
    """Directory of the owner's specs, `NAME.toml`."""
    return _place("config", root="/etc/stockade", variable="XDG_CONFIG_HOME", fallback="~/.config")


def state() -> Path:
    """Directory of what outlives a boot: jails with their generations, volumes and secrets."""
    return _place("state", root="/var/lib/stockade", variable="XDG_DATA_HOME", fallback="~/.local/share")


def run() -> Path:
    """Directory of what does not outlive a boot: one directory for each running jail."""
    fallback = f"/tmp/stockade-{os.geteuid()}"
    return _place("run", root="/run/stockade", variable="XDG_RUNTIME_DIR", fallback=fallback)


def jails() -> Path:
    """Directory that holds one directory for each jail."""
    return state() / "jails"


def jail(name: str) -> Path:
    """State directory of the jail `name`."""
    return jails() / name


def runtime(name: str) -> Path:
    """Runtime directory of the jail `name`."""
    return run() / name


def images() -> Path:
    """Directory that holds one directory for each image."""
    return state() / "images"


def kernels() -> Path:
    """Directory of what was measured of this host's UML kernels."""
    return state() / "kernels"


def guests() -> Path:
    """Directory that holds one directory for each guest."""
    return state() / "guests"


def guest(name: str) -> Path:
    """State directory of the guest `name`."""
    return guests() / name


def guest_runtime(name: str) -> Path:
    """Runtime directory of the guest `name`. No jail can have its name: those begin with a letter or digit."""
    return run() / "@guests" / name
