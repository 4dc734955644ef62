"""Read a closure: its numbers, and the chain of evidence for one path. Looks at nothing but the record."""

from __future__ import annotations

import posixpath
from collections import Counter, deque

import msgspec

from ..errors import ResolveError
from ..records.closure import Closure, Entry, Evidence

__all__ = ["Step", "Summary", "chain", "summary"]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One link of a chain: `path` is in the closure because of `evidence`."""

    path: str
    evidence: Evidence


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A closure in numbers. `size_bytes` counts files once; `setuid` are those with a setuid or setgid bit on the host.

    `evidence` counts entries by each kind of evidence they have, `left_out` false positives by reason.
    """

    entries: int
    files: int
    directories: int
    symlinks: int
    size_bytes: int
    programs: tuple[str, ...]
    libraries: int
    setuid: tuple[str, ...]
    tmpfs: int
    state: int
    devices: tuple[str, ...]
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    evidence: dict[str, int]
    left_out: dict[str, int]
    advice: dict[str, int]


def summary(closure: Closure) -> Summary:
    """The numbers of a closure."""
    types = Counter(entry.type for entry in closure.entries)
    files = [entry for entry in closure.entries if entry.type == "file"]
    kinds = Counter(kind for entry in closure.entries for kind in {evidence.kind for evidence in entry.evidence})
    return Summary(
        entries=len(closure.entries),
        files=types["file"],
        directories=types["directory"],
        symlinks=types["symlink"],
        size_bytes=sum(entry.size for entry in files),
        programs=tuple(entry.path for entry in files if _is_program(entry)),
        libraries=sum(1 for entry in files if any(evidence.kind == "needed" for evidence in entry.evidence)),
        setuid=tuple(entry.path for entry in files if entry.mode & 0o6000),
        tmpfs=len(closure.tmpfs),
        state=len(closure.state),
        devices=closure.devices,
        uids=closure.uids,
        gids=closure.gids,
        evidence=dict(sorted(kinds.items())),
        left_out=dict(sorted(Counter(positive.reason for positive in closure.false_positives).items())),
        advice=dict(sorted(Counter(advice.code for advice in closure.advice).items())),
    )


def _is_program(entry: Entry) -> bool:
    """Something that is started, not merely readable with an executable mode."""
    return entry.mode & 0o111 != 0 and any(
        evidence.kind in ("shebang", "account")
        or (evidence.kind == "access" and evidence.detail.startswith("executed"))
        or (evidence.kind == "spec" and ("command" in evidence.detail or "program" in evidence.detail))
        or (evidence.kind == "gap" and "exec failed" in evidence.detail)
        for evidence in entry.evidence
    )


def chain(closure: Closure, path: str) -> tuple[Step, ...]:
    """The shortest chain of evidence from `path` back to what it began with, first `path` itself.

    `path` may lead through symlinks of the closure. Raises ResolveError when the closure does not have it.
    """
    entries = {entry.path: entry for entry in closure.entries}
    start = _canonical(entries, path)
    if start is None:
        raise _unknown(closure, path)
    before: dict[str, Step] = {}
    reached = {start}
    queue = deque([start])
    last = start
    while queue:
        current = queue.popleft()
        last = current
        evidences = sorted(entries[current].evidence, key=lambda item: (item.because != "", item))
        if evidences and not evidences[0].because:
            return _steps(before, current, evidences[0])
        for evidence in evidences:
            following = _canonical(entries, evidence.because)
            if following is None:
                return _steps(before, current, evidence)
            if following not in reached:
                reached.add(following)
                before[following] = Step(path=current, evidence=evidence)
                queue.append(following)
    return _steps(before, last, None)


def _steps(before: dict[str, Step], current: str, evidence: Evidence | None) -> tuple[Step, ...]:
    steps = [Step(path=current, evidence=evidence)] if evidence is not None else []
    while current in before:
        steps.append(before[current])
        current = before[current].path
    return tuple(reversed(steps))


def _canonical(entries: dict[str, Entry], path: str) -> str | None:
    """The entry that `path` names, following the closure's own symlinks in directories."""
    if path in entries:
        return path
    current, pending, links = "", path.split("/")[::-1], 0
    while pending:
        name = pending.pop()
        if name in ("", "."):
            continue
        if name == "..":
            current = posixpath.dirname(current).rstrip("/")
            continue
        current = f"{current}/{name}"
        entry = entries.get(current)
        if entry is None:
            return None
        if entry.type == "symlink" and entry.target is not None and any(pending):
            links += 1
            if links > 40:
                return None
            pending.extend(reversed(entry.target.split("/")))
            current = "" if entry.target.startswith("/") else posixpath.dirname(current).rstrip("/")
    return current or None


def _unknown(closure: Closure, path: str) -> ResolveError:
    reasons = sorted({positive.reason for positive in closure.false_positives if positive.path == path})
    if reasons:
        return ResolveError(f"`{path}` is not in the jail: {', '.join(reasons)}", hint="`files.include` takes it in")
    import difflib  # only for a path that is wrong

    near = difflib.get_close_matches(path, [entry.path for entry in closure.entries], n=1)
    hint = f"did you mean `{near[0]}`?" if near else "nothing that was observed needs it; `files.include` takes it in"
    return ResolveError(f"`{path}` is not in the jail", hint=hint)
