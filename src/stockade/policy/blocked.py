"""Why was it blocked? From the trace of a run behind the walls: what each refused, and what would allow it.

The filter decides before the kernel does, by number and arguments alone: what it answers can be computed, so a
refusal of the filter is never mistaken for one of the kernel.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import msgspec

from ..kernel import presets
from ..kernel.capabilities import names
from ..records.lock import Lock
from ..records.proposal import Obstacle, Refusal
from ..records.spec import Directory, Spec
from ..records.text import escape, unescape
from ..records.trace import Access, CallSeen, Trace
from . import changes
from .changes import Change
from .exhausted import Exhausted, exhausted
from .guards import EXCESSIVE, HOST_ONLY, capability_for
from .writable import Place, handed_over, mount_of, refused, writable_place

__all__ = ["Blocked", "Key", "blocked", "granted", "selection"]

_SET_NAME = frozenset({"sethostname", "setdomainname"})
_NAME_IS_SET = "a jail's name is not its service's to change: set `hostname` in the spec"
_NO_FAMILY = "it is not separated between jails, or no service needs it"
_WRITING = frozenset({"write", "create", "truncate", "mkdir", "mknod", "unlink", "chmod", "chown", "bind"})
_SHORT_LIVED = ("/run", "/tmp", "/var/tmp", "/var/run", "/var/lock", "/var/cache")
_OWN = ("/proc/", "/sys/", "/run/", "/tmp/")  # what a jail and the host each have for themselves
_OWN_PROCESS = frozenset({"self", "thread-self"})
#: Devices that open the machine's memory, ports or log.
_RAW = frozenset({"mem", "kmem", "port", "kmsg", "nvram", "hpet"})

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Blocked:
    """One refusal and the change of the spec that lifts it; `tried` tells whether a run can show that.

    `limit` names the limit that was reached, "" where the refusal is of another kind.
    """

    refusal: Refusal
    change: Change | None = None
    tried: bool = True
    limit: str = ""

    @property
    def key(self) -> Key:
        """What makes it the same refusal in another run: of a limit, whatever ran into it."""
        if self.limit:
            return self.limit, self.refusal.wall, ""
        return self.refusal.what, self.refusal.wall, self.refusal.path


def granted(spec: Spec, lock: Lock) -> tuple[str, ...]:
    """Capabilities that the service has."""
    named = spec.policy.capabilities
    return lock.capabilities if named == "auto" else named


def selection(spec: Spec, lock: Lock) -> presets.Selection | None:
    """What the filter of the jail lets pass, None for everything."""
    calls = spec.policy.syscalls
    if calls.preset == "none":
        return None
    return presets.select(calls.preset, calls.add, calls.remove, chroot="sys_chroot" in granted(spec, lock))


def blocked(
    trace: Trace, spec: Spec, lock: Lock, *, outside: Trace | None = None,
    host: Callable[[str], os.stat_result | None] = lambda path: _status(path),
) -> tuple[Blocked, ...]:  # fmt: skip
    """What the walls of the jail of `spec` and `lock` refused in the run of `trace`, each kind once.

    What failed in the same way `outside` is no refusal of the walls. `host` gives the status of a path of the host.
    """
    view = _View(trace, spec, lock, outside)
    found: dict[Key, Blocked] = {}
    for one in (*view.calls(), *view.accesses(host), *view.sockets(_of_the_host)):
        known = found.get(one.key)
        if known is not None:
            count = known.refusal.count + one.refusal.count
            one = dataclasses.replace(known, refusal=msgspec.structs.replace(known.refusal, count=count))
        found[one.key] = one
    return tuple(found.values())


def _of_the_host(name: str) -> bool:
    """Whether somebody on the host has the abstract Unix socket `@NAME` (proc(5), /proc/net/unix)."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
        return any(line.split(maxsplit=7)[7:] == [f"{name}\n"] for line in file)


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


class _View:
    def __init__(self, trace: Trace, spec: Spec, lock: Lock, outside: Trace | None) -> None:
        self._trace, self._spec, self._lock = trace, spec, lock
        self._granted = granted(spec, lock)
        self._selection = selection(spec, lock)
        self._entries = {unescape(entry.path): entry for entry in lock.entries}
        seen = outside.calls if outside is not None else ()
        self._also = {(call.name, call.error, call.arguments, call.path) for call in seen if call.error}
        sockets = outside.sockets if outside is not None else ()
        self._unreached = {(one.operation, one.error, one.address) for one in sockets if one.error}
        paths = outside.accesses if outside is not None else ()
        self._failed = {(access.path, access.operation, access.error) for access in paths if access.error}
        self._read = {access.path for access in paths if access.operation == "read" and not access.error}
        self._denied = {(access.operation, access.path) for access in paths if access.error in ("EPERM", "EACCES")}

    def calls(self) -> Iterator[Blocked]:
        """Refusals that calls show by errno and arguments."""
        for seen in self._trace.calls:
            if not seen.error:
                continue
            if seen.error == "SIGSYS":
                yield Blocked(Refusal(
                    what="a system call of another architecture", wall="filter", error="SIGSYS", count=seen.count,
                    never=True, reason="the process was ended: the numbers of a foreign architecture (i386, x32) mean "
                    "other calls, and no filter judges them; use a program built for this one",
                ))  # fmt: skip
                continue
            if seen.error == "SIGKILL":
                yield from self._by_the_kernel(seen)
                continue
            if self._selection is not None and self._selection.answer(seen.name, seen.arguments) == seen.error:
                yield from self._filtered(seen, self._selection)
            elif not self._fails_outside(seen):
                yield from self._by_the_kernel(seen)

    def _fails_outside(self, seen: CallSeen) -> bool:
        also = (seen.name, seen.error, seen.arguments, seen.path) in self._also
        return also or (seen.name, seen.error, seen.path) in self._unreached

    def _filtered(self, seen: CallSeen, allowed: presets.Selection) -> Iterator[Blocked]:
        group = presets.group_of().get(seen.name)
        if group is None or (group.never and group.errno == "ENOSYS"):
            return  # answered as by a kernel that does not have it: its callers do without
        if seen.name not in allowed.calls:
            if group.never:
                yield self._never(seen, "filter", group.about)
            elif group.name == "chroot":
                yield self._lacking(seen, "sys_chroot")
            elif seen.name in _SET_NAME:
                yield self._never(seen, "filter", _NAME_IS_SET)
            else:
                why = f"the preset `{self._spec.policy.syscalls.preset}` does not allow `{seen.name}`: {group.about}"
                yield self._blocked(seen, "filter", why, changes.system_call(seen.name))
            return
        yield self._by_argument(seen, allowed)

    def _by_argument(self, seen: CallSeen, allowed: presets.Selection) -> Blocked:
        """The call is allowed, not what it was given."""
        if seen.name in ("socket", "socketpair"):
            family = seen.arguments[0]
            kind, number = ("netlink", seen.arguments[2]) if family in allowed.families else ("families", family)
            word = presets.word_of(kind, number)
            prefix, name = ("NETLINK_", "protocol") if kind == "netlink" else ("AF_", "family")
            what = f"{seen.name} of {prefix + word.partition(':')[2].upper() if word else f'{name} {number}'}"
            if not word:
                return self._never(seen, "filter", _NO_FAMILY, what)
            why = f"the policy does not allow `{word}`"
            return self._blocked(seen, "filter", why, changes.system_call(word), what)
        if seen.name in ("mknod", "mknodat"):
            return self._never(
                seen, "filter", "a jail makes no device nodes: name what it needs in `devices` in `[policy]`",
                f"{seen.name}: a device node",
            )
        rule = next(rule for rule in presets.rules() if seen.name in rule.calls)
        what = f"{seen.name}: {seen.arguments[rule.argument]:#x}"
        if seen.name == "clone":
            return self._never(seen, "filter", presets.groups()["namespace"].about, f"{seen.name}: a new namespace")
        return self._never(seen, "filter", rule.about, what)

    def _by_the_kernel(self, seen: CallSeen) -> Iterator[Blocked]:
        found = exhausted(seen, self._spec, self._lock, self._trace)
        if found is not None:
            yield self._limit(seen, found)
            return
        capability = capability_for(seen)
        if seen.name == "capset" and seen.error == "EPERM":
            # A process may keep what it has, and no more (capset(2)).
            wanted = [name for name in names(seen.arguments[1]) if name not in self._granted]
            for name in wanted:
                yield self._lacking(seen, name, f"capset to `{name}`")
            if wanted:
                return
        match seen.error:
            case "ENETUNREACH" if seen.name in ("connect", "sendto", "sendmsg"):
                if not self._spec.network.egress and self._spec.network.mode != "host":
                    why = "the jail has no way out: a private network with `egress` gives one"
                    yield self._blocked(seen, "network", why, changes.network(egress=True), tried=False)
            case _ if capability and capability not in self._granted:
                yield self._lacking(seen, capability)
            case _ if capability in HOST_ONLY:
                yield self._of_the_host(seen, capability)
            case _:
                return

    def _lacking(self, seen: CallSeen, capability: str, what: str = "") -> Blocked:
        """The kernel asks for a capability that the service does not have."""
        if seen.name in _SET_NAME:
            return self._never(seen, "capability", _NAME_IS_SET)
        if capability in EXCESSIVE:
            return self._never(seen, "capability", EXCESSIVE[capability], what)
        if capability in HOST_ONLY:
            return self._of_the_host(seen, capability, what)
        change = changes.capability(capability, found=self._lock.capabilities)
        return self._blocked(seen, "capability", f"it needs the capability `{capability}`", change, what)

    def _of_the_host(self, seen: CallSeen, capability: str, what: str = "") -> Blocked:
        cures = {
            "sys_resource": "; a spec sets limits in `[limits]`",
            "mknod": "; name devices in `devices` in `[policy]`",
        }
        reason = f"the kernel asks for `{capability}` over the whole host, which no jail has{cures.get(capability, '')}"
        return self._never(seen, "host", reason, what)

    def accesses(self, host: Callable[[str], os.stat_result | None]) -> Iterator[Blocked]:
        """Refusals that accesses to paths show."""
        for access in self._trace.accesses:
            if (access.path, access.operation, access.error) in self._failed:
                continue
            if access.path.startswith("/dev/"):
                yield from self._device(access, host)
            elif access.error == "ENOENT":
                yield from self._missing(access, host)
            elif access.error == "EROFS":
                yield from self._read_only(access)
            elif access.error == "EACCES" and (access.operation, access.path) not in self._denied:
                yield from self._denied_path(access)

    def sockets(self, of_the_host: Callable[[str], bool]) -> Iterator[Blocked]:
        """Abstract sockets of the host, in whose network the jail is though no trial is; `of_the_host` knows them."""
        if not self._spec.policy.landlock or self._spec.network.mode != "host":
            return
        for one in self._trace.sockets:
            if one.operation == "connect" and one.error and one.address.startswith("@") and of_the_host(one.address):
                change = changes.no_landlock()
                yield Blocked(Refusal(
                    what=f"connect to `{one.address}`", wall="landlock", call="connect", error=one.error,
                    reason="it is a socket outside of the jail, and Landlock lets no abstract name lead out of it",
                    lines=changes.lines(self._spec, change(self._spec)),
                ), change, tried=False)  # fmt: skip

    def _device(self, access: Access, host: Callable[[str], os.stat_result | None]) -> Iterator[Blocked]:
        if access.operation == "exec" and access.error == "EACCES" and access.path.startswith("/dev/shm/"):
            yield self._path(access, "files", "nothing in `/dev/shm` can be executed: `/tmp` is a place for that", None)
        if access.operation not in ("read", "write", "create") or access.error not in ("ENOENT", "EACCES"):
            return
        status = host(access.path)
        name = access.path.removeprefix("/dev/")
        if status is None or not (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            return
        what = f"the device `{access.path}`"
        if stat.S_ISBLK(status.st_mode) or name in _RAW:
            reason = "it is the host's disk, memory or log itself, past every wall"
            yield Blocked(Refusal(
                what=what, wall="device", error=access.error, path=escape(access.path), reason=reason, never=True
            ))  # fmt: skip
            return
        if access.error == "EACCES":
            mode = stat.S_IMODE(status.st_mode)
            reason = f"on the host it has mode {mode:04o} and is uid {status.st_uid}'s: the jail's root is nobody there"
            yield self._path(access, "device", reason, None, what)
            return
        yield self._path(access, "device", "the jail does not show it", changes.device(name), what)

    def _missing(self, access: Access, host: Callable[[str], os.stat_result | None]) -> Iterator[Blocked]:
        """A file or program that the host has."""
        if access.operation == "read" and access.path.startswith("/proc/"):
            yield from self._proc(access, host)
        wanted = access.operation in ("read", "exec") or access.path in self._read
        if not wanted or access.path.startswith(_OWN) or not access.path.startswith("/"):
            return
        status = host(access.path)
        if status is not None and stat.S_ISREG(status.st_mode):
            yield self._path(
                access, "missing", "the host has it, the jail does not", changes.include(access.path), tried=False
            )

    def _proc(self, access: Access, host: Callable[[str], os.stat_result | None]) -> Iterator[Blocked]:
        """What /proc has on the host, and of processes only the caller's own: those of others are not the jail's."""
        name = access.path.split("/")[2]
        own = name in _OWN_PROCESS
        if self._lock.proc == "full" or (own and self._lock.proc == "pid") or name.isdecimal():
            return
        if host(f"/proc/{name}") is not None:
            change = changes.proc("pid" if own else "full")
            reason = f"the jail has `proc = \"{self._lock.proc}\"`"
            yield self._path(access, "missing", reason, change, tried="/proc" in self._entries)

    def _read_only(self, access: Access) -> Iterator[Blocked]:
        path = access.path if access.operation == "mkdir" else os.path.dirname(access.path) or "/"
        if path == "/":
            reason = "nothing is written directly below `/`: choose another place"
            if self._spec.service.directory == "/":
                reason += ", or one to run it in, by `directory` in `[service]`"
            yield self._path(access, "read-only", reason, None)
            return
        mount = mount_of(path, self._spec)
        if mount is not None:
            reason = f"the mount `{mount.target}` is read-only: `writable = true` in its `[[mounts]]` opens it"
            found = self._path(access, "read-only", reason, None)
            yield Blocked(msgspec.structs.replace(found.refusal, never=False))
            return
        tmpfs = any(path == top or path.startswith(f"{top}/") for top in _SHORT_LIVED)
        wanted = Directory(kind="tmpfs" if tmpfs else "volume", owner=self._spec.service.user)
        entry = self._entries.get(path)
        reason = f"`{path}` is read-only"
        if path == "/etc" or path.startswith("/etc/"):
            reason += ": it holds configuration, which a service that was broken into should not change"
        change = changes.directory(path, wanted)
        yield self._path(access, "read-only", reason, change, tried=entry is not None and entry.type == "directory")

    def _denied_path(self, access: Access) -> Iterator[Blocked]:
        user, writing = self._spec.service.user, access.operation in _WRITING
        entry = self._entries.get(access.path)
        place = writable_place(access.path, self._spec, self._lock) if writing else None
        if writing and user == "root" and entry is not None and entry.uid == 0 and not entry.mode & stat.S_IWUSR:
            reason = f"its mode {entry.mode:04o} lets nobody write"
            mode = f"{entry.mode | stat.S_IWUSR:04o}"
            yield self._path(access, "files", reason, changes.mode(access.path, mode), tried=False)
            return
        if user != "root":
            if entry is not None and access.operation == "stat" and self._in_sight(access.path):
                reason = f"asked for a right (access(2)) that its mode {entry.mode:04o} does not give `{user}`"
                found = self._path(access, "files", reason, None)
                yield Blocked(msgspec.structs.replace(found.refusal, never=False))
            elif entry is not None and entry.type == "file" and not writing:
                reason = f"its mode {entry.mode:04o} lets uid {entry.uid} and gid {entry.gid} in, not `{user}`"
                yield self._path(access, "files", reason, changes.owner(access.path, user), tried=False)
            elif writing and place is None:
                yield from self._read_only(access)
            elif writing:
                yield self._by_modes(access, place)
            return
        capability = "dac_override" if writing else "dac_read_search"
        if {capability, "dac_override"} & set(self._granted):
            if self._spec.policy.landlock and writing and place is None and not access.path.startswith("/proc/"):
                yield self._path(access, "landlock", "Landlock refuses it", changes.no_landlock())
            else:
                yield self._by_modes(access, place)
            return
        change = changes.capability(capability, found=self._lock.capabilities)
        yield self._path(access, "files", f"it belongs to another user: that needs `{capability}`", change)

    def _by_modes(self, access: Access, place: Place | None) -> Blocked:
        """Mostly no line lifts it: the cure, if there is one, is where the file is."""
        change = handed_over(access, self._spec, place)
        found = self._path(access, "files", refused(self._spec.service.user, place), change, tried=False)
        if change is not None:
            return found
        return Blocked(msgspec.structs.replace(found.refusal, never=False))

    def _in_sight(self, path: str) -> bool:
        """Whether everybody may look the path up: stat(2) needs no right to what it leads to."""
        above = (self._entries.get(str(parent)) for parent in PurePosixPath(path).parents)
        return all(entry is None or entry.mode & stat.S_IXOTH for entry in above)

    def _blocked(
        self, seen: CallSeen, wall: Obstacle, reason: str, change: Change, what: str = "", *, tried: bool = True
    ) -> Blocked:
        refusal = Refusal(
            what=what or _call(seen), wall=wall, reason=reason, call=seen.name, error=seen.error,
            path=escape(seen.path), count=seen.count, lines=changes.lines(self._spec, change(self._spec)),
        )  # fmt: skip
        return Blocked(refusal, change, tried)

    def _never(self, seen: CallSeen, wall: Obstacle, reason: str, what: str = "") -> Blocked:
        return Blocked(Refusal(
            what=what or _call(seen), wall=wall, reason=reason, call=seen.name, error=seen.error,
            path=escape(seen.path), count=seen.count, never=True,
        ))  # fmt: skip

    def _limit(self, seen: CallSeen, found: Exhausted) -> Blocked:
        if found.change is not None:
            what = "" if seen.name else "a process"
            one = self._blocked(seen, "limit", found.reason, found.change, what)
            return dataclasses.replace(one, limit=found.limit)
        return Blocked(Refusal(
            what=_call(seen), wall="limit", reason=found.reason, call=seen.name, error=seen.error, count=seen.count
        ))  # fmt: skip

    def _path(
        self, access: Access, wall: Obstacle, reason: str, change: Change | None, what: str = "", *, tried: bool = True
    ) -> Blocked:
        return Blocked(
            Refusal(
                what=what or f"{access.operation} `{escape(access.path)}`", wall=wall, reason=reason,
                error=access.error, path=escape(access.path), never=change is None,
                lines=changes.lines(self._spec, change(self._spec)) if change is not None else (),
            ),
            change, tried,
        )  # fmt: skip


def _call(seen: CallSeen) -> str:
    return f"{seen.name} `{escape(seen.path)}`" if seen.path else seen.name
