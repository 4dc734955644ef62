"""What a check yields."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Mend", "Seen"]


class Mend(NamedTuple):
    """How a finding is mended.

    mode: the permission bits `bits` are taken from the file with that device and inode number. capabilities: the
    file's are removed. user, group: the account `name` is removed from the files of accounts.
    """

    kind: Literal["mode", "capabilities", "user", "group"]
    bits: int = 0
    name: str = ""
    identity: tuple[int, int] = (0, 0)


class Seen(NamedTuple):
    """A rule's code, the path (as `os.fsdecode` gives it, "" for none), what was seen there, and what mends it."""

    code: str
    path: str
    message: str
    mend: Mend | None = None
