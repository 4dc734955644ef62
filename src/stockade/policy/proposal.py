"""The narrowest policy for what a run behind the walls did, in a spec's own words. Runs nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..kernel import presets
from ..kernel.syscalls import numbers
from ..records import publish
from ..records.lock import Lock, LockDirectory
from ..records.proposal import Missed, Proposal
from ..records.spec import Directory, Policy, Spec
from ..records.text import unescape
from ..records.trace import CallSeen, Trace
from . import changes
from .blocked import blocked, selection

__all__ = ["propose"]

_WRITING = frozenset({"write", "create", "truncate", "mkdir", "mknod", "unlink", "chmod", "chown", "bind"})
#: Part of every jail's /dev, whatever the policy says.
_ALWAYS = frozenset({"tty", "ptmx", "pts", "shm", "fd", "stdin", "stdout", "stderr", "console", "mqueue", "log"})
_LOOPBACK = "127.0.0.1"
_NETLINK = 16  # AF_NETLINK


def propose(
    trace: Trace, spec: Spec, lock: Lock, *, names: Mapping[int, str], missed: Mapping[str, Sequence[str]] = {},
    outside: Trace | None = None,
) -> Proposal:  # fmt: skip
    """The policy that is enough for the run of `trace`, in which everything worked in the jail of `spec` and `lock`.

    `names` are the jail's users by uid. `missed` are calls that were refused in runs without a capability that the
    exercises do not need. What failed `outside` too is left out of `refused`.
    """
    now = selection(spec, lock)
    used = [seen for seen in trace.calls if now is None or not now.answer(seen.name, seen.arguments)]
    preset, words = _narrowest(used, chroot="sys_chroot" in lock.capabilities)
    allowed = presets.select(preset, words, chroot="sys_chroot" in lock.capabilities)
    made = {seen.name for seen in used if seen.name}
    written = _written(trace, lock)
    devices = tuple(sorted(_devices(trace) - set(spec.policy.devices)))
    ports = tuple(sorted(_ports(trace)))
    wanted = [changes.preset(preset) if preset != spec.policy.syscalls.preset else None]
    wanted += [changes.system_call(word) for word in words if word not in spec.policy.syscalls.add]
    wanted += [changes.capabilities(lock.capabilities) if spec.policy.capabilities == "auto" else None]
    wanted += [changes.device(name) for name in devices]
    wanted += [
        changes.directory(path, _directory(found, names))
        for path, found in written.items()
        if path not in spec.directories
    ]
    wanted += [changes.publish(f"{_LOOPBACK}:{port}:{name}") for port, name in _unpublished(ports, spec)]
    after = spec
    for change in wanted:
        after = change(after) if change is not None else after
    lines = changes.lines(spec, after)
    return Proposal(
        preset=preset,
        preset_now=spec.policy.syscalls.preset,
        add=tuple(words),
        used=len(made),
        unused=len((allowed.calls & set(numbers(lock.architecture))) - made),
        capabilities=lock.capabilities if spec.policy.capabilities == "auto" else spec.policy.capabilities,
        missed=tuple(Missed(capability=name, calls=tuple(calls)) for name, calls in missed.items() if calls),
        refused=tuple(dict.fromkeys(one.refusal.what for one in blocked(trace, spec, lock, outside=outside))),
        devices=tuple(sorted(_devices(trace) - set(Policy().devices))),
        written={path: "volume" if found.volume else "tmpfs" for path, found in written.items()},
        ports=ports,
        lines=lines,
        toml=changes.toml(lines),
    )


def _narrowest(used: Sequence[CallSeen], *, chroot: bool) -> tuple[str, list[str]]:
    """The narrowest preset with the fewest words to add, and these words."""
    best: tuple[str, list[str]] | None = None
    for name in presets.presets():
        words = _beyond(presets.select(name, chroot=chroot), used)
        if best is None or len(words) < len(best[1]):
            best = name, words
    assert best is not None
    return best


def _beyond(allowed: presets.Selection, used: Sequence[CallSeen]) -> list[str]:
    """Words for what was used and `allowed` refuses."""
    found: set[str] = set()
    for seen in used:
        if seen.name not in presets.group_of() or not allowed.answer(seen.name, seen.arguments):
            continue
        if seen.name not in allowed.calls:
            found.add(seen.name)
        elif seen.name in ("socket", "socketpair"):
            family, protocol = seen.arguments[0], seen.arguments[2]
            found.add(presets.word_of("families", family) if family not in allowed.families else "")
            found.add(presets.word_of("netlink", protocol) if family == _NETLINK else "")
    usable = presets.words(add=True)
    return sorted(word for word in found if word in usable)


def _devices(trace: Trace) -> set[str]:
    opened = {
        access.path.removeprefix("/dev/")
        for access in trace.accesses
        if access.path.startswith("/dev/") and not access.error and access.operation in ("read", "write", "create")
    }
    return {name for name in opened if name.partition("/")[0] not in _ALWAYS}


def _written(trace: Trace, lock: Lock) -> dict[str, LockDirectory]:
    """The writable directories that were written to, the outermost of each kind."""
    known = {unescape(found.path): found for found in lock.directories}
    used: dict[str, LockDirectory] = {}
    for access in trace.accesses:
        if access.operation not in _WRITING or access.error:
            continue
        for above in _above(access.path):
            if above in known:
                used[above] = known[above]
                break
    return {
        path: found
        for path, found in sorted(used.items())
        if found.volume or not any(above in known and not known[above].volume for above in list(_above(path))[1:])
    }


def _above(path: str) -> Iterator[str]:
    while path != "/":
        yield path
        path = os.path.dirname(path)


def _directory(found: LockDirectory, names: Mapping[int, str]) -> Directory:
    return Directory(
        kind="volume" if found.volume else "tmpfs", owner=names.get(found.uid, str(found.uid)), mode=f"{found.mode:04o}"
    )


def _ports(trace: Trace) -> set[str]:
    """`PORT/tcp` for every port listened on; `PORT/udp` for one that was bound to more often than listened on."""
    listening, bound = Counter[tuple[str, str, int]](), Counter[tuple[str, str, int]]()
    for found in trace.sockets:
        if found.family in ("inet", "inet6") and found.port and not found.error and found.operation != "connect":
            counted = listening if found.operation == "listen" else bound
            counted[found.family, found.address, found.port] += 1
    udp = {port for _, _, port in bound - listening}
    return {f"{port}/tcp" for _, _, port in listening} | {f"{port}/udp" for port in udp}


def _unpublished(ports: Sequence[str], spec: Spec) -> Iterator[tuple[int, str]]:
    """Outer port, and inner port with its protocol, of what no `publish` names yet; nothing on the host's network."""
    if spec.network.mode == "host":
        return
    named = {(found.target, found.protocol) for found in map(publish.parse, spec.network.publish)}
    for port in ports:
        number, _, protocol = port.partition("/")
        if (int(number), protocol) not in named:
            yield int(number), number if protocol == "tcp" else port
