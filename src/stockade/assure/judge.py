"""From what the probes report to what it means: the oracle outside has the last word. Tries nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from stockade.records.proof import Outcome, Probe, ProbeResult

from .canaries import Canaries
from .catalogue import LIMITS, row
from .session import Seen

__all__ = ["Control", "Outside", "judge"]

_MARKS = {"T1": b"\x01", "T2": b"\x02"}
_OWN_NETWORK = ("N2", "N3")
_TOPS = ("F1", "F2", "F3", "F5")

_OUTCOMES: dict[str, Outcome] = {
    "held": "held", "skipped": "not applicable", "absent": "not testable", "fault": "not testable",
    "unlimited": "not limited",
}  # fmt: skip

# errnos of what a kernel or a host does not have, seen where no wall stands.
_ABSENT = frozenset({
    "ENOSYS", "ENOENT", "ENODEV", "ENXIO", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EOPNOTSUPP",
    "ENETUNREACH", "EHOSTUNREACH", "ENETDOWN",
})  # fmt: skip
_ERRNO = re.compile(r"\bE[A-Z0-9]{3,}\b")


@dataclass(frozen=True)
class Outside:
    """What was seen from outside of one run: the network it is in, and whose names and ids it has."""

    network: str
    namespaces: dict[str, bool]     # by kind: whether it is the host's own
    uid: int                        # as the host counts
    jail_root: tuple[int, int]      # device and inode


@dataclass
class Control:
    """The same probes without walls. `complete`: with all of root's rights, so what fails there fails anywhere."""

    complete: bool
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, seen: Seen) -> None:
        """Take the results of a run in."""
        for name, result in seen.results.items():
            self.results.setdefault(name, []).append(result)

    def why_not(self, name: str) -> str:
        """Why a probe cannot show anything on this host; "" when it can."""
        given = self.results.get(name, [])
        tried = [result for result in given if result["outcome"] in ("held", "absent")]
        if not tried or any(result["outcome"] in ("reached", "unlimited", "fault") for result in given):
            return ""
        words = set(_ERRNO.findall(" ".join(result["detail"] for result in tried)))
        if (self.complete and row(name).plain) or (words and words <= _ABSENT):
            return f"without walls it fails as well: {tried[0]['detail']}"
        return ""


def judge(
    seen: Seen, *, outside: Outside, canaries: Canaries, control: Control | None, names: tuple[str, ...]
) -> tuple[ProbeResult, ...]:  # fmt: skip
    """Each probe's result. Those of `names` that never reported are not testable."""
    return tuple(_one(row(name), seen, outside, canaries, control) for name in names)


def _one(
    probe: Probe, seen: Seen, outside: Outside, canaries: Canaries, control: Control | None
) -> ProbeResult:
    def result(outcome: Outcome, detail: str) -> ProbeResult:
        return ProbeResult(id=probe.id, title=probe.title, outcome=outcome, detail=detail)

    report = seen.results.get(probe.id)
    if outside.network not in probe.networks:
        return result("not applicable", f"the spec gives the service the network `{outside.network}`")
    if report is None:
        return result("not testable", "the run ended before it")
    if report["outcome"] == "reached":
        contained = _contained(probe, report, seen, outside, canaries)
        return result("held", contained) if contained else result("escaped", _how(report, outside, probe))
    if report["outcome"] == "held" and control is not None and probe.id not in LIMITS:
        why = control.why_not(probe.id)
        if why:
            return result("not testable", why)
    return result(_OUTCOMES[report["outcome"]], report["detail"])


def _how(report: dict[str, Any], outside: Outside, probe: Probe) -> str:
    if probe.id != "I1":
        return str(report["detail"])
    seen = {"it is the host's uid 0": outside.uid == 0, "it has the host's own name": outside.namespaces["uts"]}
    return "; ".join(what for what, is_so in seen.items() if is_so)


def _contained(probe: Probe, report: dict[str, Any], seen: Seen, outside: Outside, canaries: Canaries) -> str:
    """Why something that got somewhere is contained all the same; "" for an escape."""
    evidence = report["evidence"]
    found = canaries.named(evidence.get("marks", []))
    if probe.id in _MARKS and _MARKS[probe.id] not in seen.pushed:
        return "what was pushed went to a terminal of the jail's own"
    if probe.id in _OWN_NETWORK and not outside.namespaces["net"]:
        return f"{report['detail']}, in a network of the jail's own"
    if probe.id == "I1":
        if outside.uid != 0 and not outside.namespaces["uts"]:
            return f"uid {outside.uid} of the host; its own host name, `{evidence['nodename']}`"
        return ""
    if probe.id in _TOPS and tuple(evidence["top"]) == outside.jail_root and not found:
        return "the top is the jail's own root"
    if probe.id in ("F4", "F7") and ("top" in evidence or "tops" in evidence):
        return ""
    if probe.canaries and not found & set(probe.canaries):
        return f"{report['detail']}, and what was read stands in no canary"
    return ""
