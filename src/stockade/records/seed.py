"""What Stockade itself writes, into the observation view and identically into a rootfs."""

from __future__ import annotations

from typing import Literal

import msgspec


class Seed(msgspec.Struct, frozen=True, kw_only=True):
    """One generated path. `mode`, `uid` and `gid` are final; a symlink has only a `target`.

    `secret` content is generated per jail: it stands in a lock without digest and size.
    `reason` says what asked for it and becomes evidence.
    """

    path: str
    content: bytes = b""
    mode: int = 0o777
    uid: int = 0
    gid: int = 0
    secret: bool = False
    type: Literal["file", "directory", "symlink"] = "file"
    target: str = ""
    reason: str = ""
