"""Take findings in: accepted or open, all of them counted, listed up to a bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from stockade.records.finding import Accepted, Finding
from stockade.records.text import escape

from .baseline import Baseline
from .catalogue import rules
from .seen import Mend, Seen

__all__ = ["LISTED", "Ledger", "Proposal"]

#: Findings of one rule that are listed; the others are only counted, so that memory stays bounded.
LISTED = 500
_MENDED = 100_000


class Proposal(NamedTuple):
    """A change that would mend the finding `code` at `path` (as `os.fsdecode` gives it)."""

    code: str
    path: str
    mend: Mend


class Ledger:
    """Findings of one audit. `reasons` are those of the spec's `files.reasons`, by path."""

    def __init__(self, reasons: Mapping[str, str], baseline: Baseline) -> None:
        self.open: list[Finding] = []
        self.accepted: list[Accepted] = []
        self.proposals: list[Proposal] = []
        self.counts: Counter[str] = Counter()
        self.accepted_counts: Counter[str] = Counter()
        self._reasons = reasons
        self._baseline = baseline

    def take(self, seen: Iterable[Seen]) -> None:
        """Judge each thing that a check saw."""
        for code, path, message, mend in seen:
            rule = rules()[code]
            finding = rule.finding(escape(path), _portable(message))
            if rule.reason and path in self._reasons:
                self._accept(Accepted(finding=finding, reason=self._reasons[path], by="spec"))
                continue
            reason = self._baseline.accepts(finding)
            if reason is not None:
                self._accept(Accepted(finding=finding, reason=reason, by="baseline"))
                continue
            self.counts[code] += 1
            if mend is not None and len(self.proposals) < _MENDED:
                self.proposals.append(Proposal(code, path, mend))
            if self.counts[code] <= LISTED:
                self.open.append(finding)

    def _accept(self, accepted: Accepted) -> None:
        code = accepted.finding.code
        self.accepted_counts[code] += 1
        if self.accepted_counts[code] <= LISTED:
            self.accepted.append(accepted)

    def close(self) -> None:
        """Take in what is wrong with the baseline itself."""
        self.take(self._baseline.remains())


def _portable(message: str) -> str:
    """`message` as Unicode: each byte that is no text as `\\xNN`."""
    return message.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
