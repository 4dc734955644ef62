"""The scope of a guest's jail where systemd makes it: the names that systemd and the plan have are the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import NewGuest
from machine import needs_uml

from stockade import machines
from stockade.kernel import cgroups
from stockade.records.policy import CgroupLayout
from stockade.vm import kernels, store, walls

BASE = "/sys/fs/cgroup/system.slice"
LAYOUT = CgroupLayout(
    version=2, controllers=dict.fromkeys(("memory", "pids"), BASE), base=BASE, enable=True, manager="system"
)  # fmt: skip


def test_each_start_has_a_scope_of_another_name_in_which_the_plan_has_its_groups(
    new_guest: NewGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_uml()
    machines.prepare(("jail", "vm"))
    guest = new_guest(walls=("jail", "vm"))
    monkeypatch.setattr(cgroups, "layout", lambda: LAYOUT)
    seen = set()
    for _ in range(2):
        orders = walls.around(guest, kernels.find(), store.machine(guest.name)).orders
        (unit,) = (word for word in orders["wrapper"] if word.startswith("--unit="))
        match = re.fullmatch(rf"--unit=stockade-guest-{guest.name}-(\d+)\.scope", unit)
        assert match
        assert [match[1].encode() in bytes.fromhex(record) for record in orders["records"]] == [True]
        plan = Path(orders["plan"]).read_bytes()
        assert f"{BASE}/stockade-guest-{guest.name}-{{instance}}.scope/jail".encode() in plan
        seen.add(match[1])
    assert len(seen) == 2
