"""Take one wall away, and the probes that guard it report the escape; with all of them nothing does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from proving_jail import LIMITS, found, make_jail, needs_root, outcomes, state_of_host

from stockade import contain, places
from stockade.assure.catalogue import catalogue
from stockade.assure.prove import prove
from stockade.errors import StateError, WallError
from stockade.kernel import loop
from stockade.kernel.capabilities import mask
from stockade.records.launch import Bind, Filesystem, LaunchPlan, ReadOnly
from stockade.records.proof import Proof

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).resolve().parents[2] / "warden"
Change = Callable[[LaunchPlan], LaunchPlan]

replace = msgspec.structs.replace


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    needs_root()
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    assert not list(places.jails().glob("*/.prove-*")), "a proof left its directory"
    assert contain.running() == ()


def test_nothing_escapes_a_jail_with_all_its_walls(home: Path) -> None:
    make_jail(limits=LIMITS)
    before = state_of_host()
    proof = prove("test")
    assert state_of_host() == before
    assert outcomes(proof.runs, "escaped") == set()
    assert [difference for run in proof.runs for difference in run.differences] == []
    assert outcomes(proof.runs, "not limited") == set()
    assert proof.findings == 0
    assert {(run.user, run.network) for run in proof.runs} == {
        (user, network) for user in ("www", "root") for network in ("none", "private", "host")
    }
    assert all(result.detail for run in proof.runs for result in run.results)
    assert outcomes(proof.runs, "held") >= set(catalogue()) - outcomes(proof.runs, "not testable") - {"V10"}


def test_probes_run_with_the_host_ids_of_the_jail(home: Path) -> None:
    make_jail()
    first = contain.for_jail("test").first
    assert {(run.user, run.uid) for run in prove("test").runs} == {("www", first + 33), ("root", first)}


def _without_namespace(name: str) -> Change:
    return lambda plan: replace(
        plan, namespaces=tuple(kind for kind in plan.namespaces if kind != name),
        loopback=plan.loopback and name != "net",
        sysctls=tuple(pair for pair in plan.sysctls if name != "net" or "/net/" not in pair[0]),
    )  # fmt: skip


def _unfiltered(plan: LaunchPlan) -> LaunchPlan:
    return replace(plan, seccomp=())


def _unmasked(plan: LaunchPlan) -> LaunchPlan:
    return replace(plan, mounts=tuple(
        step for step in plan.mounts
        if not (isinstance(step, (Bind, Filesystem)) and step.target.startswith("/proc/"))
        and not (isinstance(step, ReadOnly) and step.path.startswith("/proc/"))
    ))  # fmt: skip


def _unrestricted(plan: LaunchPlan) -> LaunchPlan:
    """Without what no_new_privs itself makes possible."""
    return replace(plan, seccomp=(), landlock=None)


def _with_chroot(plan: LaunchPlan) -> LaunchPlan:
    return replace(_unrestricted(plan), capabilities=mask(["sys_chroot"]))


def _more(plan: LaunchPlan) -> LaunchPlan:
    """Every capability in the jail's own user namespace, and no filter: root inside as a container has it at worst."""
    return replace(plan, seccomp=(), landlock=None, capabilities=(1 << 41) - 1)


@dataclass(frozen=True)
class Wall:
    """A change that takes it away, and the probes that have to report it."""

    change: Change
    report: frozenset[str]
    proc: str = "full"


WALLS = {
    "seccomp": Wall(_unfiltered, frozenset({"V6", "V8", "V9", "K10", "K11", "K12", "K16", "K17"})),
    "the limit on user namespaces": Wall(
        lambda plan: replace(plan, seccomp=(), sysctls=()), frozenset({"V5"})
    ),
    "the pid namespace": Wall(_without_namespace("pid"), frozenset({"P5"}), proc="none"),
    "the ipc namespace, and Landlock": Wall(
        lambda plan: replace(_without_namespace("ipc")(plan), landlock=None), frozenset({"T5", "T6"})
    ),
    "the network namespace": Wall(_without_namespace("net"), frozenset({"N1", "N4", "N5"})),
    "Landlock, with the host's network": Wall(
        lambda plan: replace(_without_namespace("net")(plan), landlock=None), frozenset({"T4"})
    ),
    "the masks over proc": Wall(_unmasked, frozenset({"I4"})),
    "capabilities and filter": Wall(_more, frozenset({"F6", "F11", "F12", "F13", "F17", "K15"})),
    "control groups and rlimits": Wall(
        lambda plan: replace(plan, cgroup=None, limits=()), frozenset({"R1", "R2", "R4"})
    ),
    "the size of each tmpfs": Wall(
        lambda plan: replace(plan, mounts=tuple(
            replace(step, options=("mode=1777",)) if isinstance(step, Filesystem) and step.target == "/tmp" else step
            for step in plan.mounts
        )),
        frozenset({"R3"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WALLS)
def test_probes_report_a_wall_that_is_taken_away(home: Path, name: str) -> None:
    make_jail(limits=LIMITS, proc=WALLS[name].proc)
    proof = prove("test", networks=["private"], change=WALLS[name].change)
    reported = outcomes(proof.runs, "escaped") | outcomes(proof.runs, "not limited")
    lacking = outcomes(proof.runs, "not testable")
    assert reported >= WALLS[name].report - lacking
    assert WALLS[name].report - lacking, f"nothing here can show that {name} is missing"
    assert proof.findings > 0


@pytest.mark.parametrize(("name", "step"), [("user", "id map"), ("uts", "hostname")])
def test_a_launch_without_this_namespace_is_refused(home: Path, name: str, step: str) -> None:
    """No plan can take these walls away: the warden only maps ids of the jail's, and only names the jail's host."""
    make_jail()
    with pytest.raises(WallError, match=f"launch step `{step}` failed"):
        prove("test", networks=["private"], change=_without_namespace(name))


@dataclass(frozen=True)
class Missing:
    """A step of the warden: edits (file, what goes, what comes instead), and the probes that have to report it."""

    edits: tuple[tuple[str, str, str], ...]
    report: frozenset[str]
    change: Change = _unfiltered
    differences: frozenset[str] = frozenset()


_KEEP_DIRECTORIES = """#include <sys/stat.h>
int sys_close_range(unsigned first, unsigned last)
{
    struct stat status;
    for (unsigned fd = first; fd <= last && fd < 256; fd++)
        if (fstat((int)fd, &status) == 0 && !S_ISDIR(status.st_mode))
            close((int)fd);
    return 0;
}
int sys_close_range_as_it_was(unsigned first, unsigned last);
int sys_close_range_as_it_was(unsigned first, unsigned last)
"""

STEPS = {
    "no_new_privs": Missing(
        (("service.c", 'if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)\n        fail("no_new_privs", "");', ""),),
        frozenset({"V1", "V3"}), _unrestricted, frozenset({"truth-no-new-privs"}),
    ),
    "closing descriptors": Missing(
        (("sys.c", "int sys_close_range(unsigned first, unsigned last)\n", _KEEP_DIRECTORIES),),
        frozenset({"F4"}), _unrestricted, frozenset({"truth-descriptors"}),
    ),
    "giving groups up": Missing(
        (("service.c", "supplementary_groups(plan);", ";"), ("service.c", "setgroups(0, NULL) != 0", "false")),
        frozenset({"V7"}), differences=frozenset({"truth-groups"}),
    ),
    "the bounding set": Missing(
        (("service.c", "bounding_limit(settings->capabilities);", "(void)bounding_limit;"),),
        frozenset({"V3"}), differences=frozenset({"truth-capabilities"}),
    ),
    "a session of its own": Missing(
        (("service.c", 'if (setsid() < 0)\n        fail("setsid", "");', ""),), frozenset({"T1", "T2"}),
    ),
    "detaching the old root": Missing(
        (("mounts.c", 'if (sys_umount2(".", UMOUNT_DETACH) != 0)\n        fail("umount", "old root");', ""),),
        frozenset({"F1", "F2", "F3", "F5"}), _with_chroot,
    ),
    "refusing symlinks": Missing(
        (("mounts.c", "(record->a & TREE_OWN) != 0 ? RESOLVE_NO_SYMLINKS : 0;", "0;"),), frozenset({"F19"}),
    ),
    "a clean environment": Missing(
        (("service.c", "execute(argv, variables);", "(void)variables;\n    execute(argv, environ);"),
         ("main.c", "sys_execveat(copy, argv, nothing);", "(void)nothing;\n    sys_execveat(copy, argv, environ);"),
         ("main.c", " && environ[0] == NULL", "")),
        frozenset({"I3"}), differences=frozenset({"truth-environment"}),
    ),
}  # fmt: skip


def _warden_without(step: Missing, place: Path) -> Path:
    """The warden, compiled without one of its steps."""
    if shutil.which("gcc") is None or shutil.which("make") is None:
        pytest.skip("`apt-get install gcc make`: a warden without this step has to be compiled")
    shutil.copytree(SOURCES, place)
    for file, text, instead in step.edits:
        source = (place / file).read_text()
        assert source.count(text) == 1, f"the step is written otherwise in {file} now: change this test"
        (place / file).write_text(source.replace(text, instead))
    made = subprocess.run(
        ["make", "-C", place, "-j2", f"OUTPUT={place}/out", "CFLAGS=-std=c11 -O0 -static -fno-pie"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return place / "out"


@pytest.mark.parametrize("name", STEPS)
def test_probes_report_a_step_that_the_warden_leaves_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    step = STEPS[name]
    make_jail()
    warden = _warden_without(step, tmp_path / "warden")
    for module in ("stockade.contain", "stockade.contain.spawn", "stockade.contain.network"):
        __import__(module)
        if hasattr(sys.modules[module], "warden_path"):
            monkeypatch.setattr(sys.modules[module], "warden_path", lambda: str(warden))
    proof = prove("test", networks=["private"], change=step.change)
    assert outcomes(proof.runs, "escaped") >= step.report
    assert {found.code for run in proof.runs for found in run.differences} >= step.differences


def test_with_every_step_the_same_plans_are_held(home: Path) -> None:
    """What the warden's own steps hold back, they hold back without the filter too."""
    make_jail()
    for change in {step.change for step in STEPS.values()}:
        proof = prove("test", networks=["private"], change=change)
        guarded = frozenset().union(*(step.report for step in STEPS.values() if step.change is change))
        assert guarded
        assert not outcomes(proof.runs, "escaped") & guarded
        assert not [difference for run in proof.runs for difference in run.differences]


def test_egress_reaches_neither_the_host_nor_a_metadata_service(home: Path) -> None:
    if shutil.which("pasta") is None:
        pytest.skip("`apt-get install passt`: egress needs pasta")
    make_jail(network={"mode": "private", "egress": True})
    proof = prove("test", networks=["private"])
    assert outcomes(proof.runs, "escaped") == set()
    for run in proof.runs[:2]:
        assert {found(run, probe).outcome for probe in ("N1", "N4", "N5")} == {"held"}


def test_walls_that_are_no_jail_are_refused(home: Path) -> None:
    make_jail(walls=["chroot"])
    with pytest.raises(StateError, match="`test` has the walls chroot, and these probes are for a jail by itself"):
        prove("test")


def test_limits_that_are_not_set_are_findings(home: Path) -> None:
    make_jail(volume=True)
    proof: Proof = prove("test", networks=["none"])
    assert outcomes(proof.runs, "not limited") == {"R1", "R2", "R3", "R4"}
    assert proof.escapes == 0
    assert proof.findings == 4
    assert "the volume /srv has no limit" in found(proof.runs[-1], "R3").detail


def test_volume_with_a_size_is_tried_and_holds(home: Path) -> None:
    if loop.lacking():
        pytest.skip(f"{loop.lacking()}: `stockade doctor` has the cure")
    make_jail(limits=LIMITS, volume=True, size=1 << 30)
    proof: Proof = prove("test", networks=["none"])
    result = found(proof.runs[-1], "R3")
    assert result.outcome == "held"
    assert "/srv, bytes: ENOSPC" in result.detail and "/srv, inodes: ENOSPC" in result.detail
    assert (proof.findings, proof.not_limited) == (0, ())


def test_volume_that_the_host_cannot_limit_is_told_and_no_finding(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CONTROL", "/nonexistent")
    make_jail(limits=LIMITS, volume=True, size=1 << 30)
    proof: Proof = prove("test", networks=["none"])
    assert outcomes(proof.runs, "not limited") == set()
    (missing,) = proof.not_limited
    assert missing.limit == "size of the volume `/srv`" and missing.reason and missing.remedy


def test_volumes_of_the_jail_are_not_touched(home: Path) -> None:
    make_jail(volume=True)
    volume = places.jail("test") / "volumes" / "srv"
    prove("test", networks=["none"])
    assert not volume.exists()
    with contain.launch("test", argv=["/bin/busybox", "true"]) as first:
        assert first.wait(20) == 0
    (volume / "kept").write_text("mine")
    before = (volume.stat().st_mtime_ns, os.listdir(volume))
    prove("test", networks=["none"])
    assert (volume.stat().st_mtime_ns, os.listdir(volume)) == before


def test_a_proof_beside_the_running_jail_disturbs_neither(home: Path) -> None:
    make_jail(service={"command": ["/bin/busybox", "sleep", "100"], "user": "www"})
    with contain.launch("test") as running:
        assert prove("test", networks=["none"]).escapes == 0
        assert os.path.exists(f"/proc/{running.pid}")


def test_what_a_killed_proof_left_is_removed_by_the_next(home: Path) -> None:
    make_jail()
    code = "import os; from stockade.assure import prove as p\np._PROBES\nfrom stockade.assure.walls import workplace\n"
    code += "with workplace('test') as place: os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], timeout=30, check=False)
    assert done.returncode == -9
    assert len(list(places.jail("test").glob(".prove-*"))) == 1
    prove("test", networks=["none"])
