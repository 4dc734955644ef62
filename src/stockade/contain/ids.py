"""Host ids for jails: a range of its own per jail for root, the subordinate range for an ordinary user."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stockade import places
from stockade.errors import HostError, StateError
from stockade.kernel import userns
from stockade.records.launch import IdRange

__all__ = ["COUNT", "FIRST", "IdRange", "allocate", "for_jail", "of_caller"]

# Above what useradd(8) gives to users (100000 and up) and below 2^31, which some programs cannot take.
FIRST = 1879048192
COUNT = 65536
_END = 2147483648 - COUNT

_KEPT = re.compile(r"([0-9]{1,10}) ([0-9]{1,10})\n\Z")


def for_jail(name: str) -> IdRange:
    """The ids for the jail `name` as the caller may use them: `allocate` for root, else `of_caller`."""
    return allocate(name) if os.geteuid() == 0 else of_caller()


def of_caller(*, etc: Path = Path("/etc")) -> IdRange:
    """An ordinary user's subordinate range, or the one own id where there is none (`doctor` has the cure)."""
    found = userns.subordinate(etc=etc)
    if found is None:
        return IdRange(first=os.getuid(), first_gid=os.getgid(), count=1, kind="single")
    return IdRange(first=found.first_uid, first_gid=found.first_gid, count=found.count, kind="subid")


def allocate(name: str, *, etc: Path = Path("/etc")) -> IdRange:
    """Root's range for the jail `name`: the one it has, else the lowest that nobody else uses.

    It is kept in the jail's `ids`. Ranges of subuid(5) and subgid(5), accounts, groups and other jails are left alone.
    StateError for a kept range that is damaged, HostError when all are taken.
    """
    kept = places.jail(name) / "ids"
    with _alone():
        mine = _read(kept)
        if mine is not None:
            return mine
        taken = sorted([*_subordinate(etc), *_accounts(etc), *_other_jails()])
        first = _lowest_free(taken)
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = kept.with_name(".ids.new")
        fresh.write_text(f"{first} {COUNT}\n", encoding="ascii")
        fresh.replace(kept)
    return IdRange(first=first, first_gid=first, count=COUNT, kind="root-range")


@contextmanager
def _alone() -> Iterator[None]:
    places.state().mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(places.state() / "ids.lock", "a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> IdRange | None:
    try:
        match = _KEPT.match(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    if match is None or not FIRST <= int(match[1]) <= _END or int(match[2]) != COUNT:
        raise StateError(
            f"`{path}` does not hold a range of ids, that of jail `{path.parent.name}`",
            hint="put it back from a copy: what is in the jail's volumes belongs to that range; without volumes remove "
            f"it, and `stockade build {path.parent.name}` gives the jail another range",
        )
    return IdRange(first=int(match[1]), first_gid=int(match[1]), count=COUNT, kind="root-range")


def _lowest_free(taken: list[tuple[int, int]]) -> int:
    """First id of the lowest free range; `taken` are sorted pairs of first and last id."""
    first = FIRST
    for low, high in taken:
        if low < first + COUNT and high >= first:
            first = FIRST + (high - FIRST + COUNT) // COUNT * COUNT
    if first > _END:
        raise HostError(
            f"no {COUNT} ids are free between {FIRST} and {_END + COUNT - 1}",
            hint="`stockade rm` jails that are no longer needed, or shorten ranges in `/etc/subuid` and `/etc/subgid`",
        )
    return first


def _subordinate(etc: Path) -> Iterator[tuple[int, int]]:
    for file in ("subuid", "subgid"):
        for fields in _fields(etc / file):
            if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
                yield int(fields[1]), int(fields[1]) + int(fields[2]) - 1


def _accounts(etc: Path) -> Iterator[tuple[int, int]]:
    for file in ("passwd", "group"):
        for fields in _fields(etc / file):
            if len(fields) >= 3 and fields[2].isdecimal():
                yield int(fields[2]), int(fields[2])


def _other_jails() -> Iterator[tuple[int, int]]:
    for path in places.jails().glob("*/ids"):
        other = _read(path)
        if other is not None:
            yield other.first, other.first + other.count - 1


def _fields(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return []
    return [line.split(":") for line in text.splitlines()]
