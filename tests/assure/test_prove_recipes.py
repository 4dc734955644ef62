"""Every recipe's jail holds: built from its real service, and proven."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from proving_jail import needs_root, outcomes

from stockade import specfile, workflow
from stockade.assure.prove import prove

pytestmark = pytest.mark.slow

SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


# A machine's walls are probed with the guests' tests.
JAILS = [name for name in specfile.recipes() if "vm" not in specfile.load(specfile.recipe(name)).walls]


@pytest.mark.parametrize("name", JAILS)
def test_nothing_escapes_the_jail_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    needs_root()
    spec = specfile.load(specfile.recipe(name))
    program = spec.service.command[0]
    if shutil.which(program, path=SYSTEM_PATH) is None:
        pytest.skip(f"`{program}` is not installed: `stockade build {name}` says what brings it")
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    workflow.build(spec)
    proof = prove(name)
    assert outcomes(proof.runs, "escaped") == set()
    assert [difference for run in proof.runs for difference in run.differences] == []
    assert all(result.detail for run in proof.runs for result in run.of("not testable"))
    if proof.not_limited:
        pytest.skip(f"this host cannot limit everything, as `stockade doctor` tells: {proof.not_limited[0].reason}")
    assert outcomes(proof.runs, "not limited") == set()
    assert proof.findings == 0
