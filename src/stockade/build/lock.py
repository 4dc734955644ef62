"""The lock as JSON, and what can be told from one. Reads no rootfs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from stockade.errors import NotFoundError, StateError
from stockade.records.closure import Closure, Entry, WorkDirectory
from stockade.records.lock import LOCK_VERSION, Lock, LockDirectory, LockEntry
from stockade.records.spec import Spec
from stockade.records.text import escape, unescape

__all__ = ["closure_of", "encode", "encode_spec", "is_generated", "read_lock"]


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
