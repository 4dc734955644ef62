"""The lock: what a rootfs holds, to the bit the same for two builds. Reads no rootfs."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from stockade.errors import NotFoundError, StateError
from stockade.records.closure import Closure, Entry, Evidence, WorkDirectory
from stockade.records.lock import LOCK_VERSION, Lock, LockDirectory, LockedSpec, LockEntry
from stockade.records.spec import Spec
from stockade.records.text import escape, unescape

from .operations import Applied, CopyFile, Operation
from .plan import Plan
from .tree import Node

__all__ = ["PackageOf", "closure_of", "encode", "encode_spec", "is_generated", "make_lock", "read_lock"]

#: Package and version that a host path belongs to.
PackageOf: TypeAlias = Callable[[str], tuple[str, str] | None]


def make_lock(
    plan: Plan,
    applied: Sequence[Applied],
    closure: Closure,
    spec: Spec,
    *,
    package_of: PackageOf,
    capabilities: Collection[str],
) -> Lock:
    """The lock of a plan that was applied; `applied` stands in the order of the plan's operations.

    `capabilities` are those found to be needed; what the spec says of capabilities and syslog wins.
    """
    named = spec.policy.capabilities
    entries = [
        _entry(operation, node, result, package_of)
        for operation, node, result in zip(plan.operations, plan.nodes, applied, strict=True)
    ]
    return Lock(
        spec=LockedSpec(name=spec.name, sha256=hashlib.sha256(encode_spec(spec)).hexdigest()),
        architecture=os.uname().machine,
        entries=tuple(sorted(entries, key=lambda entry: entry.path)),
        directories=plan.directories,
        devices=tuple(sorted({*spec.policy.devices, *closure.devices})),
        proc=plan.proc,
        syslog=closure.syslog if spec.service.syslog is None else spec.service.syslog,
        capabilities=tuple(sorted(capabilities if named == "auto" else named)),
        uids=tuple(sorted(closure.uids)),
        gids=tuple(sorted(closure.gids)),
        false_positives=tuple(sorted(Counter(found.reason for found in closure.false_positives).items())),
    )


def _entry(operation: Operation, node: Node, result: Applied, package_of: PackageOf) -> LockEntry:
    copied = operation.source if isinstance(operation, CopyFile) else None
    package = package_of(copied) if copied is not None else None
    return LockEntry(
        path=escape(node.path),
        type=node.type,
        mode=operation.mode,
        uid=operation.uid,
        gid=operation.gid,
        size=0 if node.secret else result.size,
        mtime=result.mtime,
        sha256="" if node.secret else result.sha256,
        target=escape(node.target),
        secret=node.secret,
        capabilities=operation.capabilities.hex() if isinstance(operation, CopyFile) else "",
        source=escape(copied) if copied is not None and copied != node.path else "",
        package=package[0] if package else "",
        package_version=package[1] if package else "",
        evidence=tuple(_portable(found) for found in node.evidence),
    )


def _portable(found: Evidence) -> Evidence:
    detail, because = escape(found.detail), escape(found.because)
    if detail == found.detail and because == found.because:
        return found
    return msgspec.structs.replace(found, detail=detail, because=because)


def encode(lock: Lock) -> bytes:
    """Canonical JSON of a lock: fields in a fixed order, entries sorted, indented so that it diffs well."""
    return msgspec.json.format(msgspec.json.encode(lock, order="deterministic"), indent=1) + b"\n"


def encode_spec(spec: Spec) -> bytes:
    """Canonical JSON of a spec with every default filled in."""
    return msgspec.json.format(msgspec.json.encode(_whole(spec), order="deterministic"), indent=1) + b"\n"


def _whole(value: object) -> Any:
    if isinstance(value, msgspec.Struct):
        return {name: _whole(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {escape(key): _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return value


def read_lock(path: Path) -> Lock:
    """The lock in a file. NotFoundError when there is none, StateError when it is damaged or of another version."""
    try:
        lock = msgspec.json.decode(path.read_bytes(), type=Lock)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no lock `{path}`", hint="`stockade build` makes one") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateError(f"the lock `{path}` is damaged: {error}", hint="`stockade build` makes a new one") from error
    if lock.version != LOCK_VERSION:
        raise StateError(
            f"the lock `{path}` has version {lock.version}, and this Stockade reads {LOCK_VERSION}",
            hint="`stockade build` makes a new one",
        )
    return lock


def closure_of(lock: Lock) -> Closure:
    """The closure that gives `lock` again: what was copied and linked; what was generated is generated anew."""
    entries = [
        Entry(
            path=unescape(entry.path),
            type=entry.type,
            source=None if is_generated(entry) else unescape(entry.source or entry.path),
            target=unescape(entry.target) or None,
            mode=entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            size=entry.size,
            evidence=tuple(
                msgspec.structs.replace(found, detail=unescape(found.detail), because=unescape(found.because))
                for found in entry.evidence
            ),
        )
        for entry in lock.entries
    ]
    return Closure(
        entries=tuple(entries),
        tmpfs=_work(found for found in lock.directories if not found.volume),
        state=_work(found for found in lock.directories if found.volume),
        devices=lock.devices,
        proc=lock.proc != "none",
        proc_subset=lock.proc != "full",
        uids=lock.uids,
        gids=lock.gids,
        syslog=lock.syslog,
    )


def is_generated(entry: LockEntry) -> bool:
    """Whether a locked file was written by Stockade, not copied."""
    return entry.type == "file" and (entry.secret or any(found.kind == "generated" for found in entry.evidence))


def _work(directories: Iterable[LockDirectory]) -> tuple[WorkDirectory, ...]:
    return tuple(
        WorkDirectory(path=unescape(found.path), mode=found.mode, uid=found.uid, gid=found.gid)
        for found in directories
    )
