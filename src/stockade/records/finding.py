"""The result of a check: of an audit, a probe, or a comparison of a running process with its policy."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["critical", "high", "medium", "low"]


class Finding(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One thing that is wrong.

    `code` names the rule, `path` where it was seen (escaped by `records.text.escape`, "" where it is no file's),
    `message` says what was seen, `remedy` what to do, `source` where the rule comes from.
    """

    code: str
    severity: Severity
    path: str = ""
    message: str
    remedy: str = ""
    source: str = ""


class Accepted(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A finding that is there on purpose: why, and whether the spec (`files.reasons`) or a baseline says so."""

    finding: Finding
    reason: str
    by: Literal["spec", "baseline"]


class Unchecked(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A rule that could not be checked, and why."""

    code: str
    reason: str


class Mending(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One change that mends a finding: whether it was made, and if not, why."""

    code: str
    path: str
    change: str
    done: bool = False
    failed: str = ""
