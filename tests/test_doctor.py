"""`doctor` tells what is so: each state is compared with the host by other means, or with a host made to lack it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from stockade import doctor
from stockade.doctor import kernel, programs
from stockade.doctor.attempt import attempt
from stockade.records.host import Feature, Host
from stockade.vm import kernels


def features() -> dict[str, Feature]:
    return {feature.name: feature for feature in doctor.examine().features}


def test_every_absent_feature_has_its_cost_and_its_cure() -> None:
    for feature in doctor.examine().features:
        assert feature.purpose
        assert feature.seen
        if feature.state in ("absent", "limited"):
            assert feature.cost
            assert feature.cure
        else:
            assert (feature.cost, feature.cure) == ("", "")


def test_examination_leaves_no_process_no_mount_and_no_descriptor() -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    descriptors = sorted(os.listdir("/proc/self/fd"))
    doctor.examine()
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_examination_takes_less_than_two_seconds() -> None:
    started = time.monotonic()
    doctor.examine()
    assert time.monotonic() - started < 2


def test_user_namespaces_are_as_unshare_finds_them() -> None:
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "true"], capture_output=True, timeout=20, check=False
    )
    assert (features()["user namespaces"].state == "present") == (done.returncode == 0)


def test_program_that_is_not_on_the_path_is_absent_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_PATH", str(tmp_path))
    found = {feature.name: feature for feature in programs.features()}
    assert found["strace"].state == "absent"
    assert found["strace"].required
    assert found["strace"].cure == "`apt-get install strace`"
    assert found["strace"] in Host(
        kernel="", architecture="", system="", user="", features=tuple(found.values())
    ).missing  # fmt: skip


def test_version_of_strace_is_the_one_it_tells() -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace: `apt-get install strace`")
    told = subprocess.run(["strace", "-V"], capture_output=True, text=True, timeout=20, check=True).stdout.split()[3]
    assert features()["strace"].seen.endswith(f" {told}")


def _kernel(path: Path, version: str) -> str:
    """A program that says it is a UML kernel of that version."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


def test_kernels_for_guests_are_named_with_the_one_that_is_used_first(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked as nobody: below a directory that everybody may enter.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        top = Path(directory)
        top.chmod(0o755)
        older, newer = _kernel(top / "a/linux", "6.9.1"), _kernel(top / "b/linux", "6.12.3")
        _kernel(top / "c/linux", "no version")
        (top / "modules/6.9.1").mkdir(parents=True)
        monkeypatch.setattr(kernels, "_PATTERNS", (f"{top}/*/linux",))
        monkeypatch.setattr(kernels, "MODULE_ROOTS", (f"{top}/modules",))
        monkeypatch.setenv("STOCKADE_HOME", f"{top}/home")
        found = [feature for feature in programs.features() if feature.purpose == "the wall `vm`"]
        assert [(feature.name, feature.state, feature.seen) for feature in found] == [
            ("linux.uml", "present", f"{newer} 6.12.3, no modules"),
            ("kernel 6.9.1", "present", f"{older} 6.9.1, modules in {top}/modules/6.9.1; used with `--kernel`"),
        ]
        assert kernels.find().path == newer
        shutil.rmtree(top / "home")
        list(programs.features())
        assert not (top / "home").exists()  # doctor changes nothing


def test_host_without_a_kernel_for_guests_is_told_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PATTERNS", ())
    (lacking,) = (feature for feature in programs.features() if feature.name == "linux.uml")
    assert (lacking.state, lacking.seen, lacking.cost) == ("absent", "not installed", "no `vm` among the walls")
    assert lacking.cure.startswith("`apt-get install user-mode-linux`")


def _unified(root: Path, *, user: str = "", systemd: bool = True) -> str:
    """A host with control groups of version 2; `user` are the controllers that user 1000 has, "" without a manager."""
    files = {
        "proc/self/mountinfo": "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu io memory pids\n",
    }
    if systemd:
        files["run/systemd/system/marker"] = ""
    if user:
        files["run/user/1000/systemd/private"] = ""
        own = "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"
        files[f"{own}/cgroup.controllers"] = f"{user}\n"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return str(root)


def test_limits_on_a_host_of_systemd_are_those_of_the_scopes_that_a_launch_would_ask_for(tmp_path: Path) -> None:
    root = _unified(tmp_path / "root")
    found = kernel._cgroups(root, 0)
    assert (found.state, found.seen) == ("present", "version 2, in scopes of systemd's, with memory, pids, cpu")
    lacking = kernel._cgroups(root, 1000)
    assert (lacking.state, lacking.cure) == ("absent", "`loginctl enable-linger` starts the user's systemd")
    whole = kernel._cgroups(_unified(tmp_path / "whole", user="cpu memory pids"), 1000)
    assert (whole.state, whole.cost) == ("present", "")
    part = kernel._cgroups(_unified(tmp_path / "part", user="memory pids"), 1000)
    assert (part.state, part.cost) == ("limited", "not limited: cpu")
    assert "systemctl edit user@.service" in part.cure


def test_host_without_user_namespaces_is_told_the_sysctl() -> None:
    """In a user namespace of its own whose limit is zero, a process is on such a host."""
    if features()["user namespaces"].state != "present":
        pytest.skip("this host has no user namespaces to take away: see `stockade doctor`")
    code = (
        "from stockade.doctor.kernel import _user_namespaces as look; f = look(); print(f.state); print(f.required);"
        "print(f.cure)"
    )
    script = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c '{code}'"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["absent", "True", "as root: `sysctl -w user.max_user_namespaces=15000`"]


def test_proc_that_is_partly_hidden_is_found_and_explained() -> None:
    """As in a container: something is mounted over a part of /proc, so the kernel gives no fresh one."""
    if os.geteuid() != 0:
        pytest.skip("hiding a part of /proc needs root")
    code = "from stockade.doctor.kernel import _fresh_proc as look; f = look(); print(f.state, f.seen); print(f.cure)"
    script = f"mount -t tmpfs none /proc/tty && exec {sys.executable} -c '{code}'"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    state, cure = done.stdout.splitlines()
    assert state == "absent EPERM (operation not permitted)"
    assert "unmasked /proc" in cure


def test_file_system_without_idmapped_mounts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("idmapped mounts are root's: run the tests as root")
    monkeypatch.setenv("STOCKADE_HOME", "/proc")
    lacking = kernel._idmapped()
    assert (lacking.state, lacking.seen) == ("absent", "EINVAL (invalid argument)")
    assert lacking.required


def test_attempt_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stockade.doctor.attempt._ATTEMPT_SECONDS", 0.2)

    def hang() -> str:
        time.sleep(30)
        return ""

    started = time.monotonic()
    assert attempt(hang).code == errno.ETIMEDOUT
    assert time.monotonic() - started < 5


def test_attempt_passes_on_the_errno() -> None:
    def fail() -> str:
        raise PermissionError(errno.EACCES, "no")

    assert attempt(fail) == (errno.EACCES, "EACCES (permission denied)")
