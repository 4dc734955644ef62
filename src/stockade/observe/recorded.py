"""What a run of strace has left to read."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Recorded"]


@dataclass(frozen=True)
class Recorded:
    """One run of strace: its files are PREFIX.PID in the directory.

    `pid` is the first process as strace numbers it, `skip` how many programs it executed before the
    service's own (what set it up), `directory` where the service began.
    """

    prefix: str
    pid: int
    skip: int = 0
    directory: str = "/"
