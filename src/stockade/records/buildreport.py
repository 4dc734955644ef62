"""What `stockade build` reports with `--json`, and what all reports have in common; the others are in `report`."""

from __future__ import annotations

import msgspec

from .closure import Advice
from .proposal import Proposal

REPORT_VERSION = 1


class Report(msgspec.Struct, frozen=True, kw_only=True, tag_field="report"):
    """What all reports have in common. A field is only ever added; a version changes when one changes its meaning."""

    version: int = REPORT_VERSION


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """A round of building and trying inside, and the paths that it showed to be missing."""

    number: int
    added: tuple[str, ...]


class ExerciseLine(msgspec.Struct, frozen=True, kw_only=True):
    """An exercise and whether it passed inside."""

    name: str
    passed: bool
    seconds: float


class NewSecret(msgspec.Struct, frozen=True, kw_only=True):
    """A secret that this build generated. `value` is given here once; it is kept in the file `kept`."""

    name: str
    kind: str
    value: str
    kept: str


class BuildReport(Report, frozen=True, kw_only=True, tag="build"):
    """`stockade build`: what was made, how it was found and how long that took.

    `stages` has the seconds of each stage, which together are the whole time. `ends`: it is a command that ends by
    itself, not a service that stays.
    """

    name: str
    generation: int
    files: int
    bytes: int
    rounds: tuple[Round, ...]
    exercises: tuple[ExerciseLine, ...]
    stages: dict[str, float]
    advice: tuple[Advice, ...]
    new_secrets: tuple[NewSecret, ...]
    ends: bool = False
    proposal: Proposal | None = None
