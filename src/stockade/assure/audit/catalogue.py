"""The rules of an audit and the lists that they go by, as data."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from stockade.records.finding import Finding, Severity

__all__ = ["Rule", "Scoring", "lists", "rule", "rules", "scoring"]

_DIRECTORY = Path(__file__).parents[1]


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule: see the head of `rules.toml` for what its fields mean."""

    code: str
    severity: Severity
    title: str
    remedy: str
    source: str
    reason: bool = False
    fix: bool = False
    needs: str = ""

    def finding(self, path: str, message: str) -> Finding:
        """The finding that `message` (what was seen) at the escaped `path` breaks this rule."""
        return Finding(
            code=self.code, severity=self.severity, path=path, message=message, remedy=self.remedy, source=self.source
        )


class Scoring(msgspec.Struct, frozen=True, kw_only=True):
    """How findings become one number."""

    half: float
    weights: dict[Severity, float]

    def points(self, counts: Mapping[str, int]) -> float:
        """Points of findings, counted by rule: each rule its severity's weight, times 1 + log2 of the count."""
        return sum(
            self.weights[rules()[code].severity] * (1 + math.log2(count)) for code, count in counts.items() if count
        )

    def score(self, counts: Mapping[str, int]) -> float:
        """100 for nothing found, half of it at `half` points, towards 0 without end."""
        return round(100 / (1 + self.points(counts) / self.half), 1)


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads((_DIRECTORY / "rules.toml").read_text(encoding="utf-8"))


@functools.cache
def lists() -> dict[str, Any]:
    """The lists of `lists.toml`."""
    return tomllib.loads((_DIRECTORY / "lists.toml").read_text(encoding="utf-8"))


@functools.cache
def rules() -> dict[str, Rule]:
    """Every rule by its code, in the order of the file."""
    return {code: msgspec.convert({"code": code, **entry}, Rule) for code, entry in _table()["rules"].items()}


def rule(code: str) -> Rule | None:
    """The rule with that code, None where there is none."""
    return rules().get(code)


@functools.cache
def scoring() -> Scoring:
    """The weights of the score."""
    return msgspec.convert(_table()["score"], Scoring)
