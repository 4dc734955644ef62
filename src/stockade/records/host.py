"""What a host offers: the result of an examination."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal[
    "present",
    "limited",  # there, but not in full: `cost` says what is lost
    "absent",
    "not needed",  # this caller does without
]


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that Stockade uses.

    `purpose` says what for, `seen` what was found when it was tried, `cost` what is lost by its
    absence ("" when nothing is), `cure` the command or Debian package that brings it.
    """

    name: str
    purpose: str
    state: State
    seen: str
    required: bool = False
    cost: str = ""
    cure: str = ""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was examined, as the user `user` sees it."""

    kernel: str
    architecture: str
    system: str
    user: str
    features: tuple[Feature, ...]

    @property
    def missing(self) -> tuple[Feature, ...]:
        """What is required and absent."""
        return tuple(feature for feature in self.features if feature.required and feature.state == "absent")
