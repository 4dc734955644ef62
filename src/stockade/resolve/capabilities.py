"""Guess from a trace which capabilities a root service needs. Trials in the jail decide.

No system call tells which capability let it succeed, so the trace gives candidates only (capabilities(7)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..records.trace import Trace

__all__ = ["CANDIDATES", "candidates", "strongest_first"]


def _did(operation: str) -> Callable[[Trace], bool]:
    return lambda trace: any(access.operation == operation and not access.error for access in trace.accesses)


#: Capability, and whether a trace suggests it. A service that changes ids has processes and files of other users.
_SIGNS: dict[str, Callable[[Trace], bool]] = {
    "setuid": lambda trace: any(uid > 0 for uid in trace.uids),
    "setgid": lambda trace: any(gid > 0 for gid in trace.gids),
    "kill": lambda trace: any(uid > 0 for uid in trace.uids),
    "chown": _did("chown"),
    "fowner": lambda trace: _did("chown")(trace) and _did("chmod")(trace),
    "sys_chroot": _did("chroot"),
}

#: What is tried where those that the trace suggests do not do. None of them reaches beyond the jail.
CANDIDATES = (
    "chown", "dac_override", "fowner", "fsetid", "kill", "net_bind_service", "setgid", "setuid", "sys_chroot",
)  # fmt: skip

#: What an attacker gains most by comes first: where either of two would do, the weaker one is to stay.
_BY_STRENGTH = (
    "sys_admin", "dac_override", "dac_read_search", "setuid", "chown", "fowner", "setgid", "net_admin", "setpcap",
    "sys_chroot", "net_raw", "fsetid", "kill",
)  # fmt: skip


def strongest_first(names: Iterable[str]) -> tuple[str, ...]:
    """The order in which capabilities are tried to be done without."""
    places = {name: place for place, name in enumerate(_BY_STRENGTH)}
    return tuple(sorted(names, key=lambda name: (places.get(name, len(places)), name)))


def candidates(trace: Trace) -> tuple[str, ...]:
    """Names of the capabilities that the trace suggests for a service that runs as root, sorted."""
    return tuple(sorted(name for name, sign in _SIGNS.items() if sign(trace)))
