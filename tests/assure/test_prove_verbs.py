"""`prove` and `verify-certificate` as their users call them; the certificate; canaries; the truth after the exec."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from proving_jail import LIMITS, make_jail, needs_root

from stockade import contain, places
from stockade.assure import truth
from stockade.assure.canaries import Canaries, canaries
from stockade.assure.walls import workplace
from stockade.kernel import libc
from stockade.records.launch import Bind, Filesystem, LaunchPlan
from stockade.records.policy import ResourceLimit
from stockade.records.proof import Certificate
from stockade.records.report import CertificateReport, ProofReport

SOURCE = Path(__file__).resolve().parents[2] / "src"
replace = msgspec.structs.replace


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    needs_root()
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    assert not list(places.jails().glob("*/.prove-*"))


def stockade(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stockade", *words], env=os.environ | {"PYTHONPATH": str(SOURCE)}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def test_proof_without_findings_ends_with_0_and_says_so(home: Path) -> None:
    make_jail(limits=LIMITS)
    done = stockade("prove", "test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "test: 0 escapes, 0 limits not set"
    assert "next: `stockade prove test --certificate FILE` keeps this" in done.stderr


def test_limit_that_is_not_set_ends_with_1_and_names_it(home: Path) -> None:
    make_jail(limits=LIMITS | {"memory": None})
    done = stockade("prove", "test")
    assert done.returncode == 1
    assert "not limited: R2 memory until refused: memory: no limit is set" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "test: 0 escapes, 1 limits not set"


def test_json_is_the_report_of_the_schema_and_nothing_else(home: Path) -> None:
    make_jail(limits=LIMITS)
    done = stockade("prove", "test", "--json")
    report = msgspec.json.decode(done.stdout, type=ProofReport)
    assert (report.version, report.escapes, report.findings) == (1, 0, 0)
    assert json.loads(done.stdout)["report"] == "prove"
    assert {run.walls for run in report.proof.runs} == {"jail"}
    for run in report.proof.runs:
        assert all(result.detail for result in run.of("not testable")), "each has its reason"


def test_comparison_shows_each_programs_command_line_and_version(home: Path) -> None:
    make_jail(limits=LIMITS)
    done = stockade("prove", "test", "--against", "chroot,chroot-nobody")
    assert done.returncode == 0, "the jail holds: what others do is no finding of its"
    lines = done.stdout.splitlines()
    version = subprocess.run(["chroot", "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    assert f"chroot: {version.splitlines()[0]}: chroot ROOT COMMAND" in lines
    assert any(line.startswith("chroot-nobody: ") and "--userspec=65534:65534 ROOT COMMAND" in line for line in lines)
    row = next(line for line in lines if line.startswith("F1 "))
    assert row.split()[:4] == ["F1", "held", "ESCAPED", "held"]


def test_program_that_is_not_installed_is_told_and_not_counted(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stockade.assure import peers
    from stockade.assure.prove import prove

    make_jail()
    absent = replace(peers.named("nspawn"), program="no-such-program")
    monkeypatch.setattr(peers, "named", lambda name: absent)
    proof = prove("test", networks=["none"], against=["nspawn"])
    assert proof.peers == ()
    assert [(one.what, one.reason) for one in proof.skipped] == [
        ("nspawn", "not installed: `apt-get install systemd-container`")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prove", "absent"], "error: there is no jail `absent`"),
        (["prove", "test", "--against", "docker"], "error: `docker` is not among the programs to compare with"),
        (["verify-certificate", "/nonexistent"], "error: there is no certificate `/nonexistent`"),
        (["verify-certificate", "/etc/passwd"], "error: `/etc/passwd` is no certificate: "),
    ],
)
def test_wrong_name_is_one_error_and_a_hint(home: Path, words: list[str], message: str) -> None:
    make_jail()
    done = stockade(*words)
    assert done.returncode == 1
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if not line.endswith("…")]
    assert said[0].startswith(message)
    assert said[1].startswith("hint: ")
    assert len(said) == 2


@pytest.fixture
def certified(home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A generation and its certificate."""
    generation = make_jail(limits=LIMITS)
    (generation / "exercises.json").write_text('["serves"]')
    path = tmp_path / "certificate.json"
    assert stockade("prove", "test", "--certificate", str(path)).returncode == 0
    return generation, path


def test_certificate_says_what_was_shown(certified: tuple[Path, Path]) -> None:
    certificate = msgspec.json.decode(certified[1].read_bytes(), type=Certificate)
    assert certificate.exercises == ("serves",)
    assert certificate.proof.name == "test"
    assert certificate.proof.kernel == f"{os.uname().release} {os.uname().machine}"
    assert certificate.proof.escapes == 0
    assert len({certificate.lock, certificate.rootfs, certificate.plan, certificate.spec}) == 4
    assert certificate.audit, "the audit of a bare busybox jail finds the shell"


def test_certificate_of_an_unchanged_jail_is_valid(certified: tuple[Path, Path]) -> None:
    done = stockade("verify-certificate", str(certified[1]))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("still describes `test`\n")


def _append(name: str) -> Callable[[Path], None]:
    def change(generation: Path) -> None:
        with open(generation / name, "ab") as file:
            file.write(b" ")

    return change


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file's content": (lambda generation: (generation / "rootfs/etc/group").write_text("x"), "rootfs"),
    "a file's mode": (lambda generation: (generation / "rootfs/etc/group").chmod(0o666), "rootfs"),
    "a directory's owner": (lambda generation: os.chown(generation / "rootfs/srv", 1, 1), "rootfs"),
    "a new fifo": (lambda generation: os.mkfifo(generation / "rootfs/fifo"), "rootfs"),
    "a symlink": (lambda generation: (generation / "rootfs/link").symlink_to("/etc"), "rootfs"),
    "the lock": (_append("lock.json"), "lock"),
    "the policy": (_append("plan"), "plan"),
    "the spec": (_append("spec.json"), "spec"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_certificate_does_not_outlive_a_change(certified: tuple[Path, Path], what: str) -> None:
    generation, path = certified
    change, part = CHANGES[what]
    change(generation)
    done = stockade("verify-certificate", str(path), "--json")
    report = msgspec.json.decode(done.stdout, type=CertificateReport)
    assert done.returncode == 1
    assert not report.valid
    assert [changed.what for changed in report.changed] == [part]


def test_another_kernel_is_told_and_does_not_make_it_invalid(certified: tuple[Path, Path]) -> None:
    path = certified[1]
    certificate = msgspec.json.decode(path.read_bytes(), type=Certificate)
    older = replace(certificate, proof=replace(certificate.proof, kernel="5.10.0 x86_64"))
    path.write_bytes(msgspec.json.encode(older))
    done = stockade("verify-certificate", str(path))
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith("kernel has changed: 5.10.0 x86_64 then, ")


def test_canaries_are_there_and_gone_afterwards(tmp_path: Path) -> None:
    def open_queue(made: Canaries) -> int:
        ctypes.set_errno(0)
        queue = libc.function("mq_open", ctypes.c_char_p, ctypes.c_int)
        number = queue(b"/" + made.told["queue"].encode(), os.O_RDONLY)
        if number >= 0:
            os.close(number)
        return ctypes.get_errno() if number < 0 else 0

    def segment(made: Canaries) -> bool:
        shmget = libc.function("shmget", ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
        return shmget(made.told["shm_key"], 0, 0) >= 0

    def greeting(family: int, address: object) -> bytes:
        with socket.socket(family, socket.SOCK_STREAM) as link:
            link.connect(address)
            return link.recv(100)

    with canaries(tmp_path) as made:
        assert greeting(socket.AF_UNIX, "\0" + made.told["abstract"]).decode() == made.marks["abstract"]
        assert greeting(socket.AF_INET, ("127.0.0.1", made.told["port4"])).decode() == made.marks["loopback"]
        assert segment(made) and open_queue(made) == 0
        assert Path(made.told["file"]).read_text() == made.marks["file"]
        assert not set(made.marks.values()) & {str(value) for value in made.told.values()}, "probes know no content"
    assert not segment(made) and open_queue(made) == errno.ENOENT
    assert not os.path.exists(f"/proc/{made.told['pid']}")
    assert not made.directory.exists()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConnectionRefusedError):
        greeting(socket.AF_UNIX, "\0" + made.told["abstract"])


OTHER_POLICIES: dict[str, tuple[Callable[[LaunchPlan], LaunchPlan], str]] = {
    "another uid": (lambda plan: replace(plan, uid=34), "truth-ids"),
    "another gid": (lambda plan: replace(plan, gid=34), "truth-ids"),
    "another group": (lambda plan: replace(plan, groups=()), "truth-groups"),
    "a capability": (lambda plan: replace(plan, capabilities=1), "truth-capabilities"),
    "no filter": (lambda plan: replace(plan, seccomp=()), "truth-seccomp"),
    "the host's network": (
        lambda plan: replace(plan, namespaces=tuple(kind for kind in plan.namespaces if kind != "net")),
        "truth-namespaces",
    ),
    "another environment": (lambda plan: replace(plan, environment=()), "truth-environment"),
    "a limit": (
        lambda plan: replace(plan, limits=(ResourceLimit(name="nofile", resource=7, soft=17, hard=17),)),
        "truth-limits",
    ),
    "a mount more": (
        lambda plan: replace(plan, mounts=(*plan.mounts, Bind(source="/etc", target="/srv"))), "truth-mounts",
    ),
    "a mount less": (
        lambda plan: replace(plan, mounts=tuple(
            step for step in plan.mounts if not (isinstance(step, Filesystem) and step.target == "/tmp")
        )),
        "truth-mounts",
    ),
    "a read-only mount": (
        lambda plan: replace(plan, mounts=tuple(
            replace(step, writable=False) if isinstance(step, Filesystem) and step.target == "/tmp" else step
            for step in plan.mounts
        )),
        "truth-mounts",
    ),
}  # fmt: skip


def test_a_running_service_is_what_its_plan_says(home: Path) -> None:
    make_jail(service={"command": ["/bin/busybox", "sleep", "60"], "user": "www"})
    with workplace("test") as place:
        plan = place.plan(place.spec)
    with contain.launch("test", stdin=subprocess.DEVNULL) as running:
        assert truth.differences(plan, running.pid) == ()
        for what, (change, code) in OTHER_POLICIES.items():
            assert {found.code for found in truth.differences(change(plan), running.pid)} == {code}, what
        assert [found.code for found in truth.differences(plan, running.pid, descriptors=frozenset({0, 1}))] == [
            "truth-descriptors"
        ]
