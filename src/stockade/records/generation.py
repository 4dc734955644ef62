"""What a build gives: a generation of a jail, and the ids of its service."""

from __future__ import annotations

from pathlib import Path

import msgspec

from .lock import Lock
from .proposal import Proposal

#: In a generation's directory: names of the exercises that passed inside before it became current.
EXERCISES = "exercises.json"

#: In a generation's directory: the policy that was enough for them, as `records.proposal.Proposal`.
PROPOSAL = "proposal.json"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Ids with which a service runs, as numbers that its jail sees."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One built state of a jail, in `path`.

    `unresolved` holds the symlinks whose target is neither in the rootfs nor made at launch.
    """

    number: int
    path: Path
    lock: Lock
    unresolved: tuple[str, ...] = ()

    @property
    def rootfs(self) -> Path:
        """The tree that becomes `/`."""
        return self.path / "rootfs"

    def proposal(self) -> Proposal | None:
        """The policy that the build found to be enough; None where the build did not try it."""
        try:
            return msgspec.json.decode((self.path / PROPOSAL).read_bytes(), type=Proposal)
        except FileNotFoundError:
            return None
