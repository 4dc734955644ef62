"""Find shells, interpreters, compilers and other programs that help an intruder and that the service never used."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from stockade.records.closure import Evidence

from .catalogue import lists
from .seen import Seen
from .subject import Subject
from .tree import Node

__all__ = ["kind", "program"]

# An access that shows use begins with one of these; "looked at by …" does not.
_USE = ("executed", "read")
_USED_KINDS = frozenset({"interpreter", "shebang", "needed", "dlopen"})


@functools.cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple(
        (code, re.compile("|".join(f"(?:{name})" for name in names)))
        for code, names in lists()["programs"]["names"].items()
    )


@functools.lru_cache(maxsize=4096)
def kind(name: str) -> str | None:
    """The rule that a program of that name falls under, None for none."""
    return next((code for code, pattern in _patterns() if pattern.fullmatch(name)), None)


def program(node: Node, subject: Subject) -> Iterator[Seen]:
    """Whether the file `node` is such a program, executable, and (as far as that is known) was never used."""
    if not node.status.st_mode & 0o111:
        return
    code = kind(node.name)
    if code is None or _is_part(node.path):
        return
    entry = subject.entries.get(node.path)
    if entry is None:
        yield Seen(code, node.path, "present and executable")
    elif not any(_shows_use(found) for found in entry.evidence):
        because = "; ".join(dict.fromkeys(f"{found.kind}: {found.detail}".rstrip(": ") for found in entry.evidence))
        yield Seen(code, node.path, f"there because of {because or 'nothing that is known'}; never seen used")


def _is_part(path: str) -> bool:
    return path.startswith(tuple(lists()["programs"]["within"])) and path.split("/")[-2] not in ("bin", "sbin")


def _shows_use(evidence: Evidence) -> bool:
    if evidence.kind == "access":
        return evidence.detail.startswith(_USE)
    return evidence.kind in _USED_KINDS or evidence == Evidence(kind="spec", detail="the command")
