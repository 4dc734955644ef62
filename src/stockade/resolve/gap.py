"""Compare a run in the built jail with one outside: what is missing inside. Changes nothing."""

from __future__ import annotations

import stat
from collections.abc import Container

from ..records.closure import Closure, Gap
from ..records.trace import Access, Trace
from .history import WRITES, follows, place
from .host import Host
from .rules import rules

__all__ = ["gaps", "obstacles"]

_MISSING = frozenset({"ENOENT", "ENOTDIR", "EACCES", "ENXIO"})
_MISSING_WRITE = _MISSING | {"EROFS"}
_KERNEL = ("/proc", "/sys")


def gaps(outside: Trace, inside: Trace, closure: Closure, *, root: str = "/") -> tuple[Gap, ...]:
    """Accesses that failed inside and succeeded outside, or whose target the host below `root` has.

    What `closure` holds already, what it left out and what it calls state is no gap, so repeated rounds come to an
    end: each adds something or is the last. Sorted by path.
    """
    return _Comparison(outside, closure, Host(root)).gaps(inside)


def obstacles(outside: Trace, inside: Trace, closure: Closure) -> tuple[Gap, ...]:
    """Directories made for the service that it made itself outside, and could not inside, because they are there.

    Most programs go on then. One that failed needs them not to be there.
    """
    made = {access.path for access in outside.accesses if access.operation == "mkdir" and not access.error}
    work = made & {directory.path for directory in closure.tmpfs}
    found = {
        access.path: Gap(path=access.path, operation="mkdir", error="EEXIST", reason="succeeded outside")
        for access in inside.accesses
        if access.operation == "mkdir" and access.error == "EEXIST" and access.path in work
    }
    return tuple(sorted(found.values()))


class _Comparison:
    def __init__(self, outside: Trace, closure: Closure, host: Host) -> None:
        self.host, self.rules = host, rules()
        self.entries = {entry.path for entry in closure.entries}
        self.work = {directory.path for directory in (*closure.tmpfs, *closure.state)}
        self.devices = set(closure.devices)
        self.refused = {
            name
            for positive in closure.false_positives
            if positive.reason.startswith("left out")
            for name in (positive.path, host.walk(positive.path).path)
        }
        self.advised = {advice.path for advice in closure.advice}
        self.succeeded: set[tuple[str, bool]] = set()
        self.failed: set[tuple[str, bool]] = set()
        for access in outside.accesses:
            key = (self.place(access), access.operation in WRITES)
            (self.failed if access.error else self.succeeded).add(key)

    def place(self, access: Access) -> str:
        return place(self.host, access.path, follow=follows(access))

    def gaps(self, inside: Trace) -> tuple[Gap, ...]:
        found: dict[str, Gap] = {}
        succeeded = {(self.place(access), access.operation in WRITES) for access in inside.accesses if not access.error}
        for access in sorted(inside.accesses, key=lambda item: item.order):
            where = self.place(access)
            reason = self.reason(access, where, succeeded)
            if reason and where not in found:
                found[where] = Gap(path=access.path, operation=access.operation, error=access.error, reason=reason)
        return tuple(sorted(found.values()))

    def reason(self, access: Access, where: str, succeeded_inside: Container[tuple[str, bool]]) -> str:
        """Why the access is a gap, "" when it is none."""
        write = access.operation in WRITES
        if access.error not in (_MISSING_WRITE if write else _MISSING) or access.operation in ("connect", "unlink"):
            return ""
        if where.startswith(_KERNEL) or where in self.refused or access.path in self.refused:
            return ""
        if (where, write) in self.succeeded:
            why = "succeeded outside"
        elif (where, write) in self.failed:
            return ""
        else:
            why = "exists on the host"
        if where.startswith("/dev/"):
            return why if self._device(where) else ""
        if write and access.operation != "write":
            if (where, write) in self.failed and (where, write) in succeeded_inside:
                return ""  # outside too it failed and then succeeded: tried before the directory above it was made
            return why if why == "succeeded outside" and not self._writable(where) else ""
        found = (where, True) in succeeded_inside or (where, False) in succeeded_inside
        return why if not found and self._lacking(where, write) else ""

    def _device(self, where: str) -> bool:
        status, _ = self.host.status(where)
        known = where.removeprefix("/dev/") in self.devices or self.rules.private_devices.covers(where)
        return status is not None and stat.S_ISCHR(status.st_mode) and not known

    def _writable(self, where: str) -> bool:
        """The place to write to is made at the start, or there is advice about it."""
        parent = where.rpartition("/")[0] or "/"
        return parent in self.work or parent in self.rules.tmpfs_tops or where in self.advised

    def _lacking(self, where: str, write: bool) -> bool:
        """The host has it, and the jail neither has it nor is meant to."""
        found = self.host.walk(where, follow=False)
        if found.status is None or where in self.entries or where in self.work:
            return False
        if self.rules.left_out(where) is not None or where in self.rules.built:
            return False
        if self.rules.temporary(where):
            return found.is_directory and where not in self.rules.tmpfs_tops
        if self.rules.logs.covers(where):
            if write:  # what was written outside too has its directory by now, unless the spec says otherwise
                return (where, write) not in self.succeeded and not self._writable(where)
            return found.is_directory
        return found.is_file or found.is_directory or found.is_link
