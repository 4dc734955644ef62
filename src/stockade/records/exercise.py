"""What came of an exercise."""

from __future__ import annotations

import msgspec


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one command ended. `status` is 128 + n after signal n, and None if its time ran out."""

    status: int | None
    stdout: bytes = b""
    stderr: bytes = b""


class ExerciseResult(msgspec.Struct, frozen=True, kw_only=True):
    """One exercise, judged. `reason` says why it did not pass."""

    name: str
    passed: bool
    status: int | None = None
    seconds: float = 0.0
    stdout: str = ""
    stderr: str = ""
    reason: str = ""
