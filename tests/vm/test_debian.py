"""A whole Debian system as a guest: made once, shared by these tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import image_file

from stockade import machines
from stockade.records.guest import Guest
from stockade.records.image import Image
from stockade.records.publish import Published
from stockade.vm import audit, changes, control, debian, images, store, trial
from stockade.vm.ext4 import FileSystem
from stockade.vm.start import stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bookworm(home: Path) -> Iterator[Image]:
    """Debian with nginx and sshd, and two programs that an audit is to find."""
    packages = ["nginx-light", "openssh-server", "netcat-openbsd", "tree"]
    yield debian.image_of_debian("bookworm", "bookworm", packages=packages)
    images.remove("bookworm", [])


@pytest.fixture
def web(bookworm: Image) -> Iterator[tuple[Guest, int]]:
    """A guest of it, stopped, and the port that leads to its nginx."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    machines.prepare(("jail", "vm"))
    guest = store.create(
        "web", bookworm, memory=256 << 20, walls=("jail", "vm"), network="publish",
        publish=(Published(address="127.0.0.1", port=port, target=80),),
    )  # fmt: skip
    yield guest, port
    machines.discard("web")


def answer(port: int, seconds: float = 20.0) -> float:
    """Seconds until nginx answers."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        done = subprocess.run(
            ["curl", "-sf", "-m", "3", "-o", "/dev/null", f"http://127.0.0.1:{port}/"], timeout=10, check=False
        )
        if done.returncode == 0:
            return time.monotonic() - began
        time.sleep(0.01)
    raise AssertionError("no answer")


def test_debian_guest_serves_and_keeps_owners_and_setuid(web: tuple[Guest, int]) -> None:
    guest, port = web
    machines.start_guest(guest.name).close()
    answer(port)
    _, text, _ = control.execute(guest.name, ["stat", "-c", "%U %a", "/usr/bin/passwd", "/var/www/html"])
    assert text.decode().splitlines() == ["root 4755", "root 755"]
    end = time.monotonic() + 15
    listening = 0
    while listening < 2 and time.monotonic() < end:  # sshd makes its keys first
        listening = int(control.execute(guest.name, ["sh", "-c", "grep -c ' 0A ' /proc/net/tcp"])[1])
    assert listening >= 2
    assert stop(guest.name)["cause"] == "halted"


def test_image_holds_no_key_and_each_guest_makes_its_own(bookworm: Image, web: tuple[Guest, int]) -> None:
    with FileSystem(image_file(bookworm)) as system:
        assert [path for path, _ in system.walk() if "ssh_host_" in path and path.endswith("key")] == []
    guest, _ = web
    machines.start_guest(guest.name).close()
    end = time.monotonic() + 10
    while control.execute(guest.name, ["test", "-e", "/etc/ssh/ssh_host_ed25519_key"])[0] and time.monotonic() < end:
        time.sleep(0.1)
    assert control.execute(guest.name, ["test", "-e", "/etc/ssh/ssh_host_ed25519_key"])[0] == 0


def test_own_reader_sees_what_the_kernel_sees(bookworm: Image) -> None:
    listed = subprocess.run(
        ["debugfs", "-R", "stat /usr/bin/passwd", str(image_file(bookworm))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    with FileSystem(image_file(bookworm)) as system:
        node = system.find("/usr/bin/passwd")
        assert node is not None
        assert f"Inode: {node.inode} " in listed
        assert f"Size: {node.size}" in listed
        assert oct(node.mode & 0o7777)[2:] in listed
        assert system.text("/etc/debian_version").startswith("12.")
        assert len(dict(system.walk())) > 5000
    assert "nginx-light" in changes.packages(image_file(bookworm))


def test_trial_of_a_package_shows_packages_and_files_and_can_be_kept(web: tuple[Guest, int]) -> None:
    guest, port = web
    report = trial.trial(
        guest.name, [["apt-get", "update"], ["apt-get", "-y", "--no-install-recommends", "install", "hello"]],
        exercises=["curl -sS -f -m 10 --retry 5 --retry-connrefused http://127.0.0.1:$PORT_80/"],
        inside=[["hello"]], commit=True, network="nat",
    )  # fmt: skip
    assert report.passed, [step for step in (*report.steps, *report.exercises) if step.status]
    assert [(change.package, change.before) for change in report.packages] == [("hello", "")]
    assert ("/usr/bin/hello", "added") in {(change.path, change.kind) for change in report.changes}
    assert report.committed
    machines.start_guest(guest.name).close()
    answer(port)
    assert control.execute(guest.name, ["hello"])[0] == 0


PLANTED = """
useradd -o -u 0 -M second; passwd -d second; echo root:toor | chpasswd
useradd -M third; passwd -d third; useradd -M fourth; echo fourth:fourth | chpasswd
cp /bin/dash /usr/local/bin/sh; chmod 4755 /usr/local/bin/sh
echo x > /etc/open; chmod 666 /etc/open
sed -i 's/^#\\?PermitRootLogin.*/PermitRootLogin yes/' /etc/ssh/sshd_config
echo 'PermitEmptyPasswords yes' > /etc/ssh/sshd_config.d/own.conf
printf '#!/bin/sh\n### BEGIN INIT INFO\n# Provides: planted\n' > /etc/init.d/planted
printf '# Required-Start:\n# Required-Stop:\n' >> /etc/init.d/planted
printf '# Default-Start: 2 3 4 5\n# Default-Stop: 0 1 6\n# Short-Description: planted\n' >> /etc/init.d/planted
printf '### END INIT INFO\nexit 0\n' >> /etc/init.d/planted
chmod 755 /etc/init.d/planted; update-rc.d planted defaults
printf '[Service]\nExecStart=/bin/true\n' > /etc/systemd/system/unit.service
mkdir -p /etc/systemd/system/multi-user.target.wants
ln -s ../unit.service /etc/systemd/system/multi-user.target.wants/unit.service
echo 'telnet stream tcp nowait root /usr/sbin/tcpd /usr/sbin/in.telnetd' > /etc/inetd.conf
apt-mark auto tree
"""
MENDED = {
    ("second-root", "second"), ("empty-password", "second"), ("empty-password", "third"), ("default-password", "root"),
    ("default-password", "fourth"), ("setuid", "/usr/local/bin/sh"), ("world-writable", "/etc/open"),
    ("sshd", "permitrootlogin"), ("sshd", "permitemptypasswords"), ("service", "planted"), ("service", "unit.service"),
    ("inetd", "telnet"), ("tool", "/usr/bin/nc.openbsd"), ("unused-package", "tree"),
}  # fmt: skip


def test_audit_finds_what_was_planted_and_mends_it_on_a_clone_first(web: tuple[Guest, int]) -> None:
    guest, port = web
    machines.start_guest(guest.name).close()
    status, out, err = control.execute(guest.name, ["sh", "-ec", PLANTED])
    assert status == 0, out + err
    stop(guest.name)

    def found() -> set[tuple[str, str]]:
        with changes.merged(
            store.disk(guest.name), image_file(images.load(guest.image)), Path(os.environ["STOCKADE_HOME"])
        ) as disk:
            return {(finding.code, finding.subject) for finding in audit.audit(disk, keep=["ssh", "nginx"])}

    def fix(*more: str) -> None:
        words = ["guest", "audit", guest.name, "--keep", "ssh", "--keep", "nginx", "--fix", *more]
        exercise = ["--exercise", "curl -sS -f -m 10 --retry 20 --retry-connrefused http://127.0.0.1:$PORT_80/"]
        done = subprocess.run(
            [sys.executable, "-m", "stockade", *words, *exercise], stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    before = found()
    assert before >= MENDED | {("service-as-root", "unit.service")}
    assert before.isdisjoint({("service", "ssh.service"), ("service", "nginx.service")})
    fix()
    assert found() == before, "that was on a clone"
    fix("--commit")
    assert {code for code, _ in found()} <= {"service-as-root"}
    machines.start_guest(guest.name).close()
    answer(port)
