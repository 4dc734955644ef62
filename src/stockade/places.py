"""Where Stockade keeps things, for root and for an ordinary user. Makes nothing."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "configuration", "guest", "guest_runtime", "guests", "images", "jail", "jails", "kernels", "run", "runtime", "state",
]  # fmt: skip


def _home(variable: str, fallback: str) -> Path:
    """An XDG base directory; a relative value is ignored, as the XDG specification demands."""
    value = os.environ.get(variable, "")
    if os.path.isabs(value):
        return Path(value)
    return Path(os.path.expanduser("~")) / fallback


def _place(part: str, *, root: str, user: Path) -> Path:
    """$STOCKADE_HOME/`part` when that is set, else root's place or the user's."""
    home = os.environ.get("STOCKADE_HOME", "")
    if home:
        return Path(os.path.abspath(home)) / part
    return Path(root) if os.geteuid() == 0 else user


def configuration() -> Path:
    """Directory of the owner's specs, `NAME.toml`."""
    return _place("config", root="/etc/stockade", user=_home("XDG_CONFIG_HOME", ".config") / "stockade")


def state() -> Path:
    """Directory of what outlives a boot: jails with their generations, volumes and secrets."""
    return _place("state", root="/var/lib/stockade", user=_home("XDG_DATA_HOME", ".local/share") / "stockade")


def run() -> Path:
    """Directory of what does not outlive a boot: one directory for each running jail."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    fallback = Path(runtime_dir) if os.path.isabs(runtime_dir) else Path(f"/tmp/stockade-{os.geteuid()}")
    return _place("run", root="/run/stockade", user=fallback / "stockade")


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
