"""No false alarm: the jail of every recipe, as it was built, has no finding that is not accepted with a reason."""

from __future__ import annotations

import json

import pytest
from jailer import Stockade, lacking
from test_recipes import PROGRAMS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", PROGRAMS)
def test_jail_of_a_recipe_has_no_finding(stockade: Stockade, name: str) -> None:
    reason = lacking(PROGRAMS[name])
    if reason:
        pytest.skip(reason)
    built = stockade.run("build", name)
    assert built.returncode == 0, built.stderr
    done = stockade.run("audit", name, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["counts"]) == (0, {})
    assert all(accepted["reason"] for accepted in report["accepted"])
    assert report["seconds"] <= 1
