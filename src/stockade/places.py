"""Where Stockade keeps things, for root and for an ordinary user. Makes nothing."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "configuration", "due", "guest", "guest_runtime", "guests", "images", "jail", "jails", "kernels", "machine",
    "records", "run", "runtime", "state", "use",
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
    """Directory of what does not outlive a boot: one directory for each running jail.

    It is the same for every process of a user: su(1) and cron(8) set no XDG_RUNTIME_DIR where pam_systemd(8) does.
    """
    uid = os.geteuid()
    fallback = f"/run/user/{uid}" if os.access(f"/run/user/{uid}", os.W_OK) else f"/tmp/stockade-{uid}"
    return _place("run", root="/run/stockade", variable="XDG_RUNTIME_DIR", fallback=fallback)


def jails() -> Path:
    """Directory that holds one directory for each jail."""
    return state() / "jails"


def jail(name: str) -> Path:
    """State directory of the jail `name`."""
    return jails() / name


def use(generation: Path) -> Path:
    """The empty file in the directory of a generation that is locked (flock(2)) as long as a jail runs from it."""
    return generation / "in-use"


def due(generation: Path) -> Path:
    """The file in the directory of a generation that says: a volume has yet to be made, or to get its size.

    Where one has yet to be made, user and group of the service stand in it.
    """
    return generation / "resize"


def machine(generation: Path) -> Path:
    """The empty file in the directory of a generation whose spec has a machine among its walls."""
    return generation / "machine"


def runtime(name: str) -> Path:
    """Runtime directory of the jail `name`."""
    return run() / name


def records() -> Path:
    """Directory of what was recorded of machines that are gone."""
    return state() / "records"


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
