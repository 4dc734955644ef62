"""The lock of a plan that was applied: to the bit the same for two builds. Reads no rootfs."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import msgspec

from stockade.records.closure import Closure, Evidence
from stockade.records.lock import Lock, LockedSpec, LockEntry
from stockade.records.spec import Spec
from stockade.records.text import escape

from .lock import encode_spec
from .operations import Applied, CopyFile, Operation
from .plan import Plan
from .tree import Node

__all__ = ["PackageOf", "make_lock"]

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


