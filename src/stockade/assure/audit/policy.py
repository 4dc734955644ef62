"""Compare what a jail is allowed with what it was seen to need."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from stockade.kernel import presets
from stockade.records.finding import Unchecked
from stockade.records.lock import Lock
from stockade.records.spec import Spec
from stockade.records.text import unescape
from stockade.records.trace import Trace
from stockade.resolve.capabilities import candidates

from .catalogue import lists
from .seen import Seen
from .subject import Subject

__all__ = ["policy"]

# Capabilities whose need a trace shows; of others it says nothing.
_SHOWN = frozenset({"setuid", "setgid", "kill", "chown", "fowner", "sys_chroot"})
_PROC_OF_PROCESS = re.compile(r"/proc/(?:self|thread-self|[0-9]+)(?:/.*)?|/proc/?")


def policy(subject: Subject) -> Iterator[Seen | Unchecked]:
    """Every difference between the policy of a jail and its need, and what cannot be told."""
    spec, lock = subject.spec, subject.lock
    assert spec is not None
    assert lock is not None
    yield from _walls(spec)
    yield from _user(spec, lock)
    yield from _capabilities(spec, lock, subject.trace)
    yield from _syscalls(spec, subject.trace)
    yield from _devices_and_proc(spec, lock, subject.trace)
    yield from _network(spec, subject.trace)
    yield from _mounts(spec)
    yield from _limits(spec)
    if spec.walls == ("jail",):
        yield from _volumes(lock, subject.unlimited)


def _walls(spec: Spec) -> Iterator[Seen]:
    if spec.walls == ("chroot",):
        yield Seen("WALL-CHROOT", "", 'walls = ["chroot"]')
    if not spec.policy.landlock and "jail" in spec.walls:
        yield Seen("LANDLOCK-OFF", "", "policy.landlock = false")


def _granted(spec: Spec, lock: Lock) -> tuple[str, ...]:
    return lock.capabilities if spec.policy.capabilities == "auto" else spec.policy.capabilities


def _user(spec: Spec, lock: Lock) -> Iterator[Seen]:
    if spec.service.user.partition(":")[0] in ("root", "0") and not _granted(spec, lock):
        yield Seen("ROOT-SERVICE", "", "service.user is root, and no capability is needed")


def _capabilities(spec: Spec, lock: Lock, trace: Trace | None) -> Iterator[Seen | Unchecked]:
    for name in _granted(spec, lock):
        if name in lists()["capabilities"]["broad"]:
            yield Seen("CAPABILITY-BROAD", "", f"policy.capabilities has `{name}`")
    named = spec.policy.capabilities
    if named == "auto" or not named:
        return
    if "net_bind_service" in named and spec.network.mode != "host":
        yield Seen("CAPABILITY-UNUSED", "", "`net_bind_service`: in a network of its own every port is the service's")
    if trace is None:
        yield Unchecked(code="CAPABILITY-UNUSED", reason="the jail was built without observation")
        return
    seen = candidates(trace)
    for name in named:
        if name in _SHOWN and name not in seen:
            yield Seen("CAPABILITY-UNUSED", "", f"`{name}`: nothing in the observed run needs it")
    silent = [f"`{name}`" for name in named if name not in _SHOWN and name != "net_bind_service"]
    if silent:
        yield Unchecked(code="CAPABILITY-UNUSED", reason=f"no trace shows whether {', '.join(silent)} is needed")


def _syscalls(spec: Spec, trace: Trace | None) -> Iterator[Seen | Unchecked]:
    chosen = spec.policy.syscalls
    if chosen.preset == "none":
        yield Seen("SYSCALL-UNFILTERED", "", 'policy.syscalls.preset = "none"')
        return
    if not chosen.add:
        return
    if trace is None or not trace.syscalls:
        yield Unchecked(code="SYSCALL-UNUSED", reason="the names of all system calls were not recorded at the build")
        return
    base = presets.select(chosen.preset).calls
    for word in chosen.add:
        if ":" in word:
            continue
        calls = set(presets.groups()[word[1:]].calls) if word.startswith("@") else {word}
        if not calls & set(trace.syscalls):
            yield Seen("SYSCALL-UNUSED", "", f"policy.syscalls.add has `{word}`")
        elif calls <= base:
            yield Seen("SYSCALL-UNUSED", "", f"policy.syscalls.add has `{word}`, which `{chosen.preset}` allows anyway")


def _devices_and_proc(spec: Spec, lock: Lock, trace: Trace | None) -> Iterator[Seen | Unchecked]:
    for name in dict.fromkeys((*lock.devices, *spec.policy.devices)):
        if name.partition("/")[0] not in lists()["devices"]["granted"]:
            yield Seen("DEVICE-GRANTED", "", f"`/dev/{name}`")
    if lock.proc != "full":
        return
    if trace is None:
        yield Unchecked(code="PROC-WIDE", reason="the jail was built without observation")
    elif not any(
        access.path.startswith("/proc/") and not _PROC_OF_PROCESS.fullmatch(access.path) for access in trace.accesses
    ):
        yield Seen("PROC-WIDE", "", f'policy.proc = "{spec.policy.proc}"')


def _network(spec: Spec, trace: Trace | None) -> Iterator[Seen | Unchecked]:
    if spec.network.mode == "host":
        yield Seen("NETWORK-HOST", "", 'network.mode = "host"')
    if not spec.network.egress:
        return
    if trace is None:
        yield Unchecked(code="EGRESS-UNUSED", reason="the jail was built without observation")
    elif not any(found.operation == "connect" and _outside(found.address) for found in trace.sockets):
        yield Seen("EGRESS-UNUSED", "", "network.egress = true")


def _outside(address: str) -> bool:
    try:
        return not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _mounts(spec: Spec) -> Iterator[Seen]:
    known = lists()["host"]
    for mount in spec.mounts:
        source = mount.source.rstrip("/") or "/"
        below = any(source == place or source.startswith(f"{place}/") for place in known["never_below"])
        if source in known["never"] or below:
            yield Seen("MOUNT-SENSITIVE", mount.target, f"the host's `{source}`")
        if mount.writable:
            yield Seen("MOUNT-WRITABLE", mount.target, f"the host's `{source}`")


def _limits(spec: Spec) -> Iterator[Seen]:
    if not {"jail", "chroot"} & set(spec.walls):
        return
    if spec.limits.memory is None:
        yield Seen("LIMIT-MEMORY", "", "limits.memory is not set")
    if spec.limits.processes is None:
        yield Seen("LIMIT-PROCESSES", "", "limits.processes is not set")


def _volumes(lock: Lock, unlimited: str) -> Iterator[Seen | Unchecked]:
    volumes = [found for found in lock.directories if found.volume]
    if volumes and unlimited:
        yield Unchecked(code="LIMIT-VOLUME", reason=unlimited)
        return
    for found in volumes:
        if not found.size:
            yield Seen("LIMIT-VOLUME", unescape(found.path), f"the volume `{found.volume}` has no `size`")
