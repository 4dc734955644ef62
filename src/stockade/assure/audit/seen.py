"""What a check yields."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Seen"]


class Seen(NamedTuple):
    """A rule's code, the path (as `os.fsdecode` gives it, "" for none) and what was seen there."""

    code: str
    path: str
    message: str
