"""Ways out of a machine: none with its walls, and a wall that is taken away is missed by the probe that guards it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from proving_jail import found, make_jail, needs_root, outcomes

from stockade import machineproof, machines, places
from stockade.assure import probetree, request
from stockade.assure.canaries import VARIABLE, Canaries, canaries
from stockade.assure.catalogue import machine_catalogue
from stockade.assure.inside import machine
from stockade.assure.inside.world import World
from stockade.assure.judge import Outside, judge
from stockade.assure.request import NAMESPACES
from stockade.assure.session import Terminal, conduct, messages
from stockade.errors import UsageError
from stockade.kernel import syscalls, userns
from stockade.machineproof.bench import TREE, bench
from stockade.machineproof.inside import Inside
from stockade.records.launch import LaunchPlan
from stockade.records.proof import ProbeRun, Proof
from stockade.records.report import CertificateReport, ProofReport
from stockade.vm import control, images, kernels, start, store

SOURCE = Path(__file__).resolve().parents[2] / "src"
UID = 64124
OUT = set(machine_catalogue())
FULL = ("jail", "vm", "jail")
replace = msgspec.structs.replace

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    needs_root()
    needs_uml()
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    assert store.names() == []
    assert [name for name in images.names() if name.startswith("prove-")] == []
    assert not list(places.jails().glob("*/.prove-*"))


def needs_uml() -> None:
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    for program, package in (("linux.uml", "user-mode-linux"), ("mke2fs", "e2fsprogs"), ("slirp4netns", "slirp4netns"),
                             ("pasta", "passt"), ("strace", "strace")):  # fmt: skip
        if shutil.which(program, path=path) is None:
            pytest.skip(f"`apt-get install {package}`: machines need `{program}`")


def stockade(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stockade", *words], env=os.environ | {"PYTHONPATH": str(SOURCE)}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip


def at(proof: Proof, place: str) -> tuple[ProbeRun, ...]:
    return tuple(run for run in proof.runs if run.place == place)


def test_nothing_escapes_a_machine_from_any_of_its_places(home: Path) -> None:
    make_jail(walls=FULL, network={"mode": "private"})
    certificate = home / "certificate.json"
    done = stockade("prove", "test", "--json", "--certificate", str(certificate))
    assert done.returncode in (0, 1), done.stderr
    report = msgspec.json.decode(done.stdout, type=ProofReport)
    proof = report.proof
    assert (report.escapes, proof.escapes, outcomes(proof.runs, "escaped")) == (0, 0, set())
    assert done.returncode == (1 if report.findings else 0)
    assert {(run.place, run.user) for run in proof.runs} == {
        ("service", "www"), ("service", "root"), ("guest", "root"), ("machine", "uml"), ("machine", "root"),
    }  # fmt: skip
    assert {run.walls for run in proof.runs} == {"jail,vm,jail"}
    assert {run.network for run in at(proof, "guest")} == {"none", "publish", "nat"}
    assert outcomes(at(proof, "guest"), "held") == OUT
    for probe in ("G2", "G3"):
        assert "ENXIO" in found(at(proof, "guest")[0], probe).detail, "no driver is behind the node"
    assert {"F1", "F4", "F8", "P1", "P2", "P3", "P5", "V1", "V2", "V5", "K12", "T5", "I1"} <= held(at(proof, "service"))
    assert OUT - {"G4"} <= held(at(proof, "service"))
    assert {"F1", "P1", "P2", "P3", "P5", "V1", "K9", "N1", "T4", "T5", "I3"} <= held(at(proof, "machine"))
    for run in proof.runs:
        assert run.differences == ()
        assert all(result.detail for result in run.results)
    assert "size of the directory of the machine's process" in {missing.limit for missing in proof.not_limited}
    kept = stockade("verify-certificate", str(certificate), "--json")
    assert (kept.returncode, msgspec.json.decode(kept.stdout, type=CertificateReport).valid) == (0, True)
    lock = places.jail("uml") / "current" / "lock.json"
    lock.write_bytes(lock.read_bytes() + b"\n")
    gone = stockade("verify-certificate", str(certificate), "--json")
    changed = msgspec.json.decode(gone.stdout, type=CertificateReport).changed
    assert (gone.returncode, [change.what for change in changed]) == (1, ["machine"])


def held(runs: tuple[ProbeRun, ...]) -> set[str]:
    """Probes that held in each of the runs in which they could be tried."""
    return outcomes(runs, "held") - outcomes(runs, "escaped") - outcomes(runs, "not testable")


def test_walls_of_a_machine_that_no_jail_surrounds_are_tried_and_what_is_not_is_told(home: Path) -> None:
    make_jail()
    proof = machineproof.prove("test", ("vm",), networks=("none",))
    assert proof.escapes == 0
    assert {(run.place, run.user) for run in proof.runs} == {("service", "www"), ("guest", "root")}
    assert [skipped.what for skipped in proof.skipped] == ["the place of the machine's process"]
    assert proof.machine is not None
    assert (proof.machine.jail, proof.machine.lock) == ("", "")


def test_the_jail_alone_can_be_proved_where_a_machine_is_among_the_walls(home: Path) -> None:
    make_jail(walls=FULL)
    done = stockade("prove", "test", "--walls", "jail", "--json")
    proof = msgspec.json.decode(done.stdout, type=ProofReport).proof
    assert {(run.walls, run.place) for run in proof.runs} == {("jail", "jail")}


def test_walls_that_no_machine_has_are_refused(home: Path) -> None:
    make_jail()
    with pytest.raises(UsageError, match="`vm,vm` are no walls for a guest"):
        machineproof.prove("test", ("vm", "vm"))
    done = stockade("prove", "test", "--walls", "moat")
    assert (done.returncode, "`moat` are no walls that can be tried" in done.stderr) == (2, True)


def weaker(plan: LaunchPlan) -> LaunchPlan:
    kept = tuple(kind for kind in plan.namespaces if kind not in ("pid", "ipc"))
    return replace(plan, seccomp=(), landlock=None, namespaces=kept)


def test_walls_taken_from_the_jail_in_the_machine_are_missed(home: Path) -> None:
    make_jail(walls=FULL, proc="none")  # proc is only mounted in a pid namespace of one's own
    only = {"P5", "T5", "V6"}
    proof = machineproof.prove(
        "test", FULL, networks=("none",), places=("service",), changes={"service": weaker}, only=only
    )
    assert outcomes(proof.runs, "escaped") == only


def test_walls_taken_from_the_jail_around_the_machine_are_missed(home: Path) -> None:
    make_jail(walls=FULL)

    def open_plan(plan: LaunchPlan) -> LaunchPlan:
        kept = tuple(kind for kind in plan.namespaces if kind not in ("pid", "net", "ipc"))
        return replace(
            plan, seccomp=(), landlock=None, namespaces=kept, loopback=False,
            sysctls=tuple(pair for pair in plan.sysctls if "/net/" not in pair[0]),
        )  # fmt: skip

    proof = machineproof.prove("test", FULL, places=("machine",), changes={"machine": open_plan})
    assert {run.place for run in proof.runs} == {"machine"}
    assert {"P5", "N1", "T5", "K10"} <= outcomes(proof.runs, "escaped")


@pytest.fixture
def hostfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that have hostfs."""
    kept = tuple((since, tuple(call for call in calls if call != "init_hostfs"))
                 for since, calls in kernels.SKIPPED_CALLS)  # fmt: skip
    monkeypatch.setattr(kernels, "SKIPPED_CALLS", kept)


@pytest.mark.parametrize(("walls", "outcome"), [(("vm",), "escaped"), (("jail", "vm"), "held")], ids=["vm", "jail,vm"])
def test_hostfs_is_a_way_out_where_no_jail_stands_around_the_machine(
    home: Path, hostfs: None, walls: tuple[str, ...], outcome: str
) -> None:
    make_jail()
    proof = machineproof.prove("test", walls, networks=("none",), places=("guest",), only=("G1",))
    result = found(at(proof, "guest")[0], "G1")
    assert (result.outcome, "hostfs can be mounted" in result.detail) == (outcome, True)


@pytest.mark.parametrize(
    ("probe", "word", "instead"),
    [("G2", "root=/dev/ubda", "root=/dev/ubda ubd1=other"), ("G4", "ubd0=disk.cow,base", "ubd0=base")],
)
def test_disk_that_is_not_the_machines_own_is_missed(
    home: Path, monkeypatch: pytest.MonkeyPatch, probe: str, word: str, instead: str
) -> None:
    make_jail()
    made = start.commandline.words

    def words(*arguments: Any, **options: Any) -> list[str]:
        # Another disk, and the image itself as one that the guest's user may write to.
        for name in store.names():
            (store.machine(name) / "other").write_bytes(bytes(1 << 20))
            (store.machine(name) / "other").chmod(0o666)
            (store.machine(name) / "base").chmod(0o666)
        return [part for one in made(*arguments, **options) for part in (instead.split() if one == word else [one])]

    monkeypatch.setattr(start.commandline, "words", words)
    proof = machineproof.prove("test", ("vm",), networks=("none",), places=("guest",), only=(probe,))
    assert outcomes(at(proof, "guest"), "escaped") == {probe}


def test_secret_of_the_host_in_the_machines_memory_and_a_route_out_are_missed(home: Path, tmp_path: Path) -> None:
    make_jail()
    machines.prepare(("jail",))
    with (
        bench("test", ("jail", "vm"), memory=128 << 20) as place,
        canaries(tmp_path) as made,
        place.booted("nat", made),
    ):
        environment = {VARIABLE: made.marks["environment"]}
        waiting = [*place.tree.command(TREE), "-I", "-S", "-c", "import sys; sys.stdin.read()"]
        with control.Session(place.guest.name, waiting, environment=environment) as session:
            only = {"G6", "G9"}
            run = Inside(place, made, walls="jail,vm", network="publish", tell=lambda _: None, only=only).root()
            session.end_input()
    assert outcomes((run,), "escaped") == only


def on_the_host(tmp_path: Path, made: Canaries, names: tuple[str, ...]) -> ProbeRun:
    """Those probes of a machine where none stands: as root of the host itself. They open and never write."""
    tree = probetree.make(tmp_path / "tree", userns.Single(uid=0, gid=0))
    request.write(tree, made, place=str(tree.path), probes=names)
    reader, writer = os.openpty()
    process = subprocess.Popen(tree.run(str(tree.path)), stdin=writer, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        told = messages(process.stdout.fileno())
        seen = conduct(told, Terminal(reader, writer), at_ready=lambda _: None, answer=lambda _: "")
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
        os.close(reader)
        os.close(writer)
    outside = Outside(network="none", namespaces=dict.fromkeys(NAMESPACES, True), uid=0, jail_root=(0, 0))
    results = judge(seen, outside=outside, canaries=made, control=None, names=names)
    return ProbeRun(walls="none", user="root", uid=0, network="none", seconds=0, results=results)


def test_host_is_reached_where_no_machine_stands(tmp_path: Path) -> None:
    needs_root()
    with canaries(tmp_path) as made:
        run = on_the_host(tmp_path, made, ("G3", "G7", "G8", "G10"))
    assert {"G7", "G8", "G10"} <= outcomes((run,), "escaped")
    disk = request._disk()
    if disk is not None and os.access(f"/dev/block/{disk[0]}:{disk[1]}", os.R_OK):
        assert found(run, "G3").outcome == "escaped"


def test_call_that_only_another_kernel_has_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (6, 5):
        pytest.skip("this kernel has none of the calls that the probe tries: run on Linux 6.5 or later")
    architecture = syscalls.host_architecture()
    told = {"canary": {}, "tree": "", "architecture": architecture, "numbers": syscalls.numbers(architecture),
            "host_release": os.uname().release}  # fmt: skip
    system = os.uname()
    older = os.uname_result((system.sysname, system.nodename, "6.1.0", system.version, system.machine))
    monkeypatch.setattr(os, "uname", lambda: older)
    result = machine.calls_of_the_host(World(told))
    assert result["outcome"] == "reached"


def test_what_a_killed_proof_leaves_ends_with_it_and_is_swept_by_the_next(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_jail(walls=FULL)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    process = subprocess.Popen(
        [sys.executable, "-m", "stockade", "prove", "test"], env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert until(lambda: any(control.is_running(name) for name in store.names()))
    finally:
        process.kill()
        process.wait(10)
    (left,) = store.names()
    assert left in images.names()
    assert until(lambda: not control.is_running(left))
    machineproof.prove("test", ("vm",), networks=("none",), places=("guest",), only=("G1",))
    assert left not in (*store.names(), *images.names())
    assert list((tmp_path / "tmp").glob("stockade-prove-*-*")) == []


def until(condition: Callable[[], bool], *, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


_AS_USER = """
import json
from proving_jail import make_jail, outcomes
from stockade import machineproof
from stockade.assure.catalogue import machine_catalogue
make_jail(walls=("jail", "vm", "jail"))
only = {*machine_catalogue(), "F1", "F4", "F8", "P1", "P5", "V1", "V2", "T5", "K12", "I1"}
proof = machineproof.prove("test", ("jail", "vm", "jail"), networks=("publish",), only=only)
print(json.dumps({
    "escaped": sorted(outcomes(proof.runs, "escaped")),
    "differences": [found.message for run in proof.runs for found in run.differences],
    "places": sorted({(run.place, run.user) for run in proof.runs}),
    "uids": sorted({run.uid for run in proof.runs}),
    "held": sorted(outcomes(proof.runs, "held")),
}))
"""


def test_nothing_escapes_the_machine_of_an_ordinary_user() -> None:
    needs_root()
    needs_uml()
    with tempfile.TemporaryDirectory(prefix="stockade-prove-user-") as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "own").mkdir()
        os.chown(place / "own", UID, UID)
        done = subprocess.run(
            ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all", sys.executable, "-c",
             _AS_USER],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(place / "own"),
                 "STOCKADE_HOME": str(place / "own/home"), "PYTHONDONTWRITEBYTECODE": "1",
                 "PYTHONPATH": f"{SOURCE}:{Path(__file__).resolve().parent}"},
            cwd="/", capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        proof = json.loads(done.stdout)
        assert (proof["escaped"], proof["differences"]) == ([], [])
        assert proof["places"] == [["guest", "root"], ["machine", "uml"], ["service", "root"], ["service", "www"]]
        assert proof["uids"] == [UID]
        assert {*OUT, "F1", "P1", "P5", "V1", "V2", "T5"} <= {*proof["held"]}
        left = [path.name for path in (place / "own/home/state").glob("*/prove-*")]
        assert left == []
