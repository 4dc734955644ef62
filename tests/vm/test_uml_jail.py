"""The jail around UML: the calls it allows, what can be executed in it, and its memory limit, exceeded for real."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from conftest import NewGuest
from guest_processes import of_guest, wait_gone
from machine import until

from stockade import machines, places
from stockade.errors import StateError
from stockade.kernel import cgroup_plan, cgroups, presets
from stockade.records.spec import Spec
from stockade.vm import calls, control, kernels, manage, walls

SMALL = "24M"


def selected() -> presets.Selection:
    """What the filter of a guest's jail allows."""
    wanted = walls.specification(kernels.find()).policy.syscalls
    return presets.select(wanted.preset, wanted.add, wanted.remove, allow_ptrace=True)


def test_uml_is_allowed_the_calls_of_its_list_ptrace_and_no_other() -> None:
    allowed = {word for word in calls.allowed() if ":" not in word}
    assert selected().calls == allowed | {"ptrace"}
    assert len(allowed) < 80
    assert not selected().netlink


@pytest.mark.parametrize(
    "call",
    ("execveat", "mount", "setns", "unshare", "process_vm_readv", "process_vm_writev", "io_uring_setup", "bpf",
     "chroot", "memfd_create", "setresuid", "shmget", "keyctl", "modify_ldt", "symlink", "link", "chmod", "rename"),
)  # fmt: skip
def test_call_that_uml_does_not_make_is_refused(call: str) -> None:
    assert selected().answer(call, ()) != ""


@pytest.mark.parametrize(("family", "refused"), [(1, False), (2, True), (10, True), (16, True), (17, True), (40, True)])
def test_uml_makes_unix_sockets_alone(family: int, refused: bool) -> None:
    assert bool(selected().answer("socket", (family, 1, 0))) == refused


def test_the_calls_of_uml_are_fewer_than_the_probes_are_tried_with() -> None:
    assert selected().calls < presets.select("default", allow_ptrace=True).calls


def test_nothing_can_be_executed_where_uml_writes_but_in_its_memory(new_guest: NewGuest) -> None:
    guest = new_guest(walls=("jail", "vm"))
    machines.start_guest(guest.name).close()
    pid = control.request(guest.name, "status")["processes"][-1]
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    options = {fields[1]: fields[3].split(",") for fields in mounts if "rw" in fields[3].split(",")}
    writable = {place: words for place, words in options.items() if may_write(f"/proc/{pid}/root{place}", guest.uid)}
    assert "/vm" in writable
    assert {place for place, options in writable.items() if "noexec" not in options} <= {"/tmp"}


def may_write(path: str, uid: int) -> bool:
    """Whether a user without capabilities may make files in a directory."""
    status = os.stat(path)
    return bool(status.st_mode & (0o200 if status.st_uid == uid else 0o002))


def memory_can_be_limited() -> bool:
    wanted = walls.specification(kernels.find()).limits
    plan = cgroup_plan.plan(wanted, cgroups.layout(), "test", disk=None, accounting=False)
    return "memory" not in {missing.limit for missing in plan.not_limited}


@pytest.fixture
def small_jail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jail around UML holds less memory than the guest believes to have; its tmpfs would hold all of it."""
    if not memory_can_be_limited():
        pytest.skip("this host gives its caller no memory controller: `stockade doctor` tells why")
    made = walls.specification

    def small(kernel: kernels.Kernel, *, memory: int = 0) -> Spec:
        spec = made(kernel, memory=memory)
        return msgspec.structs.replace(spec, limits=msgspec.structs.replace(spec.limits, memory=SMALL))

    monkeypatch.setattr(walls, "specification", small)


def groups_of(name: str) -> list[str]:
    """Control groups of the host that are named after the guest."""
    found = []
    for top, directories, _ in os.walk("/sys/fs/cgroup"):
        found += [f"{top}/{directory}" for directory in directories if f"stockade-guest-{name}-" in directory]
    return found


def test_guest_whose_process_goes_over_its_memory_limit_ends_with_that_cause_and_leaves_nothing(
    small_jail: None, new_guest: NewGuest
) -> None:
    guest = new_guest(walls=("jail", "vm"))
    machines.start_guest(guest.name).close()
    assert groups_of(guest.name)
    pids = of_guest(guest.name)
    with contextlib.suppress(StateError):  # it ends while the command runs
        control.execute(guest.name, ["dd", "if=/dev/zero", "of=/dev/shm/all", "bs=1M", "count=48"])
    assert until(lambda: not control.is_running(guest.name), seconds=20)
    assert wait_gone(pids) == []
    assert until(lambda: manage.state(guest.name).cause != "")
    state = manage.state(guest.name)
    assert (state.state, state.cause) == ("stopped", "memory")
    assert state.fault == f"its process went over the memory limit of the jail around it, {SMALL}"
    assert state.fault in (places.guest(guest.name) / "console.log").read_text()
    assert groups_of(guest.name) == []
    listed = subprocess.run(
        [sys.executable, "-m", "stockade", "guest", "list"], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "stopped: memory" in listed.stdout
    assert state.fault in listed.stderr


def test_guest_within_its_memory_limit_goes_on(new_guest: NewGuest) -> None:
    guest = new_guest(walls=("jail", "vm"))
    machines.start_guest(guest.name).close()
    status, _, _ = control.execute(guest.name, ["dd", "if=/dev/zero", "of=/dev/shm/some", "bs=1M", "count=20"])
    assert status == 0
    assert manage.state(guest.name).state == "running"
