"""The page that compares is whole, and made from what was run."""

from __future__ import annotations

from pathlib import Path

from stockade.assure.catalogue import catalogue
from stockade.assure.peers import peers
from stockade.cli.peers_page import page
from stockade.records.proof import ProbeResult, ProbeRun, Proof, Skipped
from stockade.records.report import ProofReport

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _run(walls: str, outcome: str, *, command: str = "") -> ProbeRun:
    results = tuple(
        ProbeResult(id=row.id, title=row.title, outcome=outcome, detail="because")  # type: ignore[arg-type]
        for row in catalogue().values()
    )
    return ProbeRun(
        walls=walls, command=command, version="1.0", user="root", uid=0, network="host", seconds=1.0, results=results
    )


def _page(*runs: ProbeRun) -> str:
    proof = Proof(
        name="nginx", generation=1, kernel="6.1", system="Debian", user="root", time="2030-01-02T03:04:05+00:00",
        runs=runs,
        peers=(_run("chroot", "escaped", command="chroot ROOT COMMAND"),),
        skipped=(Skipped(what="nspawn", reason="not installed"),),
    )  # fmt: skip
    return page(ProofReport(proof=proof, escapes=0, findings=0, seconds=1.0))


def test_worst_of_all_runs_of_the_jail_is_shown() -> None:
    text = _page(_run("jail", "held"), _run("jail", "escaped"), _run("jail", "not testable"))
    assert "| F1 | chroot into a subdirectory, climb `..` | **escaped** | **escaped** |" in text
    assert f"| escaped | {len(catalogue())} | {len(catalogue())} |" in text


def test_command_version_date_kernel_and_what_was_not_tried_are_told() -> None:
    text = _page(_run("jail", "not testable"))
    assert "2030-01-02, Debian, Linux 6.1." in text
    assert "| chroot | `chroot ROOT COMMAND`, as root | 1.0 | chroot(1) |" in text
    assert "| nspawn | not tried: not installed | | |" in text
    assert "- F1: because" in text


def test_shipped_page_has_every_probe_and_the_calls_that_are_made_now() -> None:
    text = (DOCS / "peers.md").read_text(encoding="utf-8")
    for code, row in catalogue().items():
        assert f"| {code} | {row.title} |" in text, "a probe has changed: make the page again, as it says"
    for peer in peers().values():
        if f"| {peer.name} | not tried" not in text:
            assert f"| {peer.name} | `{' '.join(peer.command).format(root='ROOT')} COMMAND`" in text
