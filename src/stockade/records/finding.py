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
