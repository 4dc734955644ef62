"""Every probe is seen to be able to fail: behind a plain chroot it reports the escape that the catalogue says."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from proving_jail import found, make_rootfs, needs_root, state_of_host

from stockade.assure import peers, probetree
from stockade.assure.canaries import canaries
from stockade.assure.catalogue import catalogue
from stockade.kernel import libc, syscalls
from stockade.records.proof import ProbeRun

Runs = dict[str, ProbeRun]


def _no_path(*paths: str) -> Callable[[], bool]:
    return lambda: not any(os.path.exists(path) for path in paths)


def _no_call(*names: str) -> Callable[[], bool]:
    """Whether the kernel has none of these calls: bad arguments give some errno, a call that is absent ENOSYS."""

    def absent() -> bool:
        numbers = syscalls.numbers(os.uname().machine)
        errnos = []
        for name in names:
            libc.syscall(numbers[name], *[ctypes.c_long(-1)] * 4)
            errnos.append(ctypes.get_errno())
        return all(number == 38 for number in errnos)

    return absent


def _disk_closed() -> bool:
    disks = [path for path in Path("/dev").iterdir() if stat.S_ISBLK(path.stat().st_mode)]
    root = os.stat("/").st_dev
    for path in disks:
        if path.stat().st_rdev == root:
            try:
                os.close(os.open(path, os.O_RDONLY))
            except OSError:
                return True
    return False


DEBUG = ("/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/security")

# What a kernel or this host may lack: then nobody can escape that way, and the probe has to say so.
LACKING: dict[str, tuple[str, Callable[[], bool]]] = {
    "F8": ("the host lets nobody open its disk", _disk_closed),
    "F9": ("a kernel without /dev/mem", _no_path("/dev/mem")),
    "K2": ("a kernel without sysrq", _no_path("/proc/sysrq-trigger")),
    "K3": ("a kernel without uevent_helper", _no_path("/sys/kernel/uevent_helper")),
    "K4": ("no binfmt_misc is mounted", _no_path("/proc/sys/fs/binfmt_misc/register")),
    "K5": ("no cgroup of version 1 is mounted", _no_path("/sys/fs/cgroup/cpu/release_agent")),
    "K6": ("no cgroup of version 1 is mounted", _no_path("/sys/fs/cgroup/devices/devices.allow")),
    "K7": ("a kernel without modules", _no_call("init_module", "finit_module")),
    "K8": ("a kernel without kexec", _no_call("kexec_load")),
    "K9": ("a kernel without bpf", _no_call("bpf")),
    "K11": ("a kernel without io_uring", _no_call("io_uring_setup")),
    "K12": ("a kernel without userfaultfd", _no_call("userfaultfd")),
    "K13": ("a kernel without iopl, /dev/mem and kcore",
            lambda: _no_call("iopl")() and _no_path("/dev/mem", "/dev/port", "/proc/kcore")()),
    "K14": ("no debugfs or tracefs is mounted",
            lambda: not any(os.path.isdir(path) and os.listdir(path) for path in DEBUG)),
    "T7": ("no such service runs", _no_path("/run/dbus/system_bus_socket", "/run/docker.sock", "/run/systemd/private",
                                            "/tmp/.X11-unix/X0", "/run/containerd/containerd.sock")),
}  # fmt: skip

# A state in which there is nothing to show, by the run.
NOT_AS = {
    "root": {"V1": "already uid 0", "V2": "root has every capability"},
    "nobody": {"V7": "--userspec gives the groups up; see the test with setuid alone"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All probes behind a plain chroot, and behind one with every object inside, as root and as nobody."""
    needs_root()
    place = tmp_path_factory.mktemp("chroot")
    make_rootfs(place / "rootfs")
    before = state_of_host()
    tree = probetree.make(place / "tree", None)
    with canaries(place) as made:
        yield {
            f"{user}{'+' if populated else ''}": peers.run(
                peers.named(name), place / "rootfs", tree, made, populated=populated
            )[0]
            for user, name in (("root", "chroot"), ("nobody", "chroot-nobody"))
            for populated in (False, True)
        }
    assert state_of_host() == before, "the probes, run with root's own rights, left something behind"


def _escapes(run: ProbeRun, probe: str) -> None:
    result = found(run, probe)
    reason, is_lacking = LACKING.get(probe, ("", lambda: False))
    if is_lacking():
        assert result.outcome in ("held", "not testable", "not applicable")
        pytest.skip(f"cannot be shown here: {reason}")
    assert result.outcome in ("escaped", "not limited"), result


ROWS = catalogue().values()


@pytest.mark.parametrize("probe", [row.id for row in ROWS if row.plain in ("root", "any")])
def test_probe_reports_the_escape_of_root_from_a_plain_chroot(runs: Runs, probe: str) -> None:
    if probe in NOT_AS["root"]:
        pytest.skip(f"shown as nobody instead: {NOT_AS['root'][probe]}")
    _escapes(runs["root"], probe)


@pytest.mark.parametrize("probe", [row.id for row in ROWS if row.plain == "any"])
def test_probe_reports_the_escape_of_nobody_from_a_plain_chroot(runs: Runs, probe: str) -> None:
    if probe in NOT_AS["nobody"]:
        pytest.skip(f"shown otherwise: {NOT_AS['nobody'][probe]}")
    _escapes(runs["nobody"], probe)


@pytest.mark.parametrize("probe", [row.id for row in ROWS if row.plain == "object"])
def test_probe_reports_the_escape_when_the_object_is_inside(runs: Runs, probe: str) -> None:
    _escapes(runs["root+"], probe)


@pytest.mark.parametrize("probe", [row.id for row in ROWS if row.plain == "object" and row.id != "I3"])
def test_probe_finds_nothing_when_the_object_is_not_inside(runs: Runs, probe: str) -> None:
    """The environment is inside always: chroot(1) passes it on."""
    assert found(runs["root"], probe).outcome in ("held", "not testable")


@pytest.mark.parametrize("probe", [row.id for row in ROWS if row.plain == "root"])
def test_nobody_is_held_where_only_roots_rights_would_do(runs: Runs, probe: str) -> None:
    allowed = {"K10": "kernel.perf_event_paranoid lets users measure themselves"}
    outcome = found(runs["nobody"], probe).outcome
    assert outcome != "escaped" or probe in allowed


def test_every_row_has_a_probe_and_every_probe_a_row(runs: Runs) -> None:
    from stockade.assure.inside.runner import PROBES

    assert {*PROBES, "F19"} == set(catalogue())
    for run in runs.values():
        assert {result.id for result in run.results} == set(catalogue())


def test_no_probe_is_at_fault(runs: Runs) -> None:
    details = [result.detail for run in runs.values() for result in run.results]
    assert not [text for text in details if "Error" in text or "in time" in text or "it ended with" in text]


def test_setuid_alone_keeps_the_groups_and_the_probe_says_so(tmp_path: Path) -> None:
    needs_root()
    naive = msgspec.structs.replace(
        peers.named("chroot-nobody"), name="unshare", program="unshare",
        command=("unshare", "--root", "{root}", "--setuid", "65534"),
    )  # fmt: skip
    make_rootfs(tmp_path / "rootfs")
    tree = probetree.make(tmp_path / "tree", None)
    with canaries(tmp_path) as made:
        run, _ = peers.run(naive, tmp_path / "rootfs", tree, made)
    assert run.uid == 65534
    assert found(run, "V7").outcome == "escaped"
    assert "0 64177" in found(run, "V7").detail


def test_content_that_is_no_canarys_is_no_escape(tmp_path: Path) -> None:
    """The oracle: what was read inside has to be what only the outside knows."""
    needs_root()
    make_rootfs(tmp_path / "rootfs")
    tree = probetree.make(tmp_path / "tree", None)
    with canaries(tmp_path) as made:
        made.marks["abstract"] = made.marks["abstract"][:-4] + "0000"
        run, _ = peers.run(peers.named("chroot"), tmp_path / "rootfs", tree, made)
    assert found(run, "T4").outcome == "held"
    assert "stands in no canary" in found(run, "T4").detail
    assert found(run, "T5").outcome == "escaped"
