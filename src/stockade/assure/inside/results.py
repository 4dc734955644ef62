"""What an attempt gave, in the words that the judge outside understands. Tries nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["MARK", "Result", "absent", "held", "reached", "skipped", "unlimited", "worst"]

#: Every canary's content starts like this: the program inside knows no more of it.
MARK = "stockade-canary:"

Result = dict[str, Any]

_ORDER = ("reached", "unlimited", "held", "absent", "skipped")


def reached(what: str, **evidence: object) -> Result:
    """The attempt got somewhere; `evidence` is for the judge."""
    return {"outcome": "reached", "detail": what, "evidence": evidence}


def held(stopped_by: str, **evidence: object) -> Result:
    """The attempt was stopped."""
    return {"outcome": "held", "detail": stopped_by, "evidence": evidence}


def absent(why: str) -> Result:
    """This kernel or jail has no such thing to try."""
    return {"outcome": "absent", "detail": why, "evidence": {}}


def skipped(why: str) -> Result:
    """The attempt makes no sense in this state."""
    return {"outcome": "skipped", "detail": why, "evidence": {}}


def unlimited(why: str) -> Result:
    """No limit is set."""
    return {"outcome": "unlimited", "detail": why, "evidence": {}}


def worst(results: Iterable[Result]) -> Result:
    """One result for several attempts: the worst outcome, what each of that outcome gave, and all evidence."""
    given = list(results)
    if not given:
        return skipped("nothing to try")
    outcome = min((result["outcome"] for result in given), key=_ORDER.index)
    evidence: dict[str, Any] = {}
    for result in given:
        if result["outcome"] == outcome:
            for name, value in result["evidence"].items():
                joined = isinstance(value, list) and isinstance(evidence.get(name), list)
                evidence[name] = evidence[name] + value if joined else value
    details = dict.fromkeys(result["detail"] for result in given if result["outcome"] == outcome)
    return {"outcome": outcome, "detail": "; ".join(details), "evidence": evidence}
