"""Whether the size of a volume can be limited here, and what to say where it cannot. Makes nothing."""

from __future__ import annotations

from stockade.kernel import loop
from stockade.records.launch import IdRange
from stockade.records.lock import Lock
from stockade.records.policy import NotLimited
from stockade.records.text import unescape

__all__ = ["lacking", "not_limited"]


def lacking(ids: IdRange) -> str:
    """Why a volume of a jail with `ids` cannot have a size of its own here; "" where it can."""
    return loop.lacking(root=ids.kind == "root-range")


def not_limited(lock: Lock, ids: IdRange, *, asked: bool = False) -> tuple[NotLimited, ...]:
    """The volumes of `lock` whose size nothing limits because this host, or this caller, has no means to.

    `asked`: only those that the spec gives a size.
    """
    volumes = [found for found in lock.directories if found.volume and (found.size or not asked)]
    reason = lacking(ids) if volumes else ""
    if not reason:
        return ()
    return tuple(
        NotLimited(limit=f"size of the volume `{unescape(found.path)}`", reason=reason, remedy=loop.REMEDIES[reason])
        for found in volumes
    )
