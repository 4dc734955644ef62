"""Each rule of the guest's audit, with a system that breaks it and one that nearly does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NewGuest, busybox_tree
from machine import free_port, needs, until

from stockade import machines
from stockade.cli.incidents import _listening
from stockade.kernel.crypt import crypt
from stockade.records.guest import GuestFinding
from stockade.records.publish import Published
from stockade.vm import audit, control, filesystem
from stockade.vm.start import Started

Plant = Callable[[Path], object]
Start = Callable[[str], Started]
SHA512 = "$6$salt"


def write(path: str, text: str, mode: int = 0o644) -> Plant:
    def plant(root: Path) -> None:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)

    return plant


def append(path: str, text: str) -> Plant:
    return lambda root: write(path, (root / path).read_text() + text)(root)


def link(path: str, target: str) -> Plant:
    def plant(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)

    return plant


def directory(path: str, mode: int) -> Plant:
    def plant(root: Path) -> None:
        (root / path).mkdir(parents=True)
        (root / path).chmod(mode)

    return plant


def account(name: str, uid: int, secret: str) -> tuple[Plant, ...]:
    return (
        append("etc/passwd", f"{name}:x:{uid}:{uid}::/:/bin/sh\n"),
        append("etc/shadow", f"{name}:{secret}:19000::::::\n"),
    )


WANTS = "etc/systemd/system/multi-user.target.wants"
UNIT = "usr/lib/systemd/system/planted.service"
DROPPED = "etc/systemd/system/planted.service.d/a.conf"


def unit(text: str = "", name: str = "planted.service") -> tuple[Plant, ...]:
    return (
        write(f"usr/lib/systemd/system/{name}", f"[Service]\nExecStart=/bin/true\n{text}"),
        link(f"{WANTS}/{name}", f"/usr/lib/systemd/system/{name}"),
    )


def package(name: str, *lines: str, status: str = "install ok installed") -> str:
    return "\n".join((f"Package: {name}", f"Status: {status}", "Version: 1", *lines)) + "\n\n"


def packages(*paragraphs: str, automatic: tuple[str, ...] = ()) -> tuple[Plant, ...]:
    states = "".join(f"Package: {name}\nAuto-Installed: 1\n\n" for name in automatic)
    return (
        write("var/lib/dpkg/status", "".join(paragraphs)),
        write("var/lib/apt/extended_states", states),
    )


#: Code, subject, what breaks the rule.
BROKEN: list[tuple[str, str, tuple[Plant, ...]]] = [
    ("second-root", "toor", account("toor", 0, "*")),
    ("empty-password", "guest", account("guest", 1000, "")),
    ("empty-password", "old", (append("etc/passwd", "old::1001:1001::/:/bin/sh\n"),)),
    ("default-password", "admin", account("admin", 1000, crypt("changeme", SHA512))),
    ("default-password", "pi", account("pi", 1000, crypt("pi", SHA512))),
    ("service", "planted.service", unit()),
    ("service", "planted.socket", unit(name="planted.socket")),
    ("service", "planted", (link("etc/rc2.d/S01planted", "../init.d/planted"),)),
    ("service", "planted", (link("etc/rc5.d/S20planted", "../init.d/planted"),)),
    ("service-as-root", "planted.service", unit()),
    ("service-as-root", "planted.service", unit("User=root\n")),
    ("service-as-root", "planted.service", unit("User=www\nUser=\n")),
    ("service-as-root", "planted.service", (*unit("User=www\n"), write(f"{UNIT}.d/a.conf", "[Service]\nUser=0\n"))),
    ("inetd", "telnet", (write("etc/inetd.conf", "telnet stream tcp nowait root /usr/sbin/telnetd telnetd\n"),)),
    ("setuid", "/bin/lifted", (write("bin/lifted", "x", 0o4755),)),
    ("setuid", "/bin/grouped", (write("bin/grouped", "x", 0o2755),)),
    ("world-writable", "/etc/open", (write("etc/open", "x", 0o666),)),
    ("world-writable", "/var/open", (directory("var/open", 0o777),)),
    ("sshd", "permitrootlogin", (write("etc/ssh/sshd_config", "PermitRootLogin yes\n"),)),
    ("sshd", "permitemptypasswords", (write("etc/ssh/sshd_config", "# x\npermitemptypasswords=YES\n"),)),
    ("sshd", "permitrootlogin", (
        write("etc/ssh/sshd_config", "Include /etc/ssh/sshd_config.d/*.conf\nPermitRootLogin no\n"),
        write("etc/ssh/sshd_config.d/cloud.conf", "PermitRootLogin yes\n"),
    )),
    ("tool", "/usr/bin/gdb", (write("usr/bin/gdb", "x", 0o755),)),
    ("unused-package", "left", packages(package("left"), automatic=("left",))),
    ("unused-package", "lower", packages(
        package("upper", "Depends: lower", status="deinstall ok config-files"), package("lower"), automatic=("lower",)
    )),
]  # fmt: skip

#: Code, subject, what nearly breaks the rule; the last are services to keep.
SOUND: list[tuple[str, tuple[Plant, ...], tuple[str, ...]]] = [
    ("second-root", account("other", 1000, "*"), ()),
    ("empty-password", account("locked", 1000, "!"), ()),
    ("default-password", account("careful", 1000, crypt("correct horse", SHA512)), ()),
    ("default-password", account("locked", 1000, "!" + crypt("changeme", SHA512)), ()),
    ("service", unit(), ("planted",)),
    ("service", unit(name="getty@tty1.service"), ()),
    ("service", (link("etc/rc2.d/K01planted", "../init.d/planted"),), ()),
    ("service", (write(UNIT, "[Service]\n"),), ()),
    ("service-as-root", unit("User=www\n"), ()),
    ("service-as-root", unit("DynamicUser=yes\n"), ()),
    ("service-as-root", (*unit(), write(DROPPED, "[Service]\nUser=www\n")), ()),
    ("service-as-root", (link(f"{WANTS}/gone.service", "/usr/lib/systemd/system/gone.service"),), ()),
    ("inetd", (write("etc/inetd.conf", "#telnet stream tcp nowait root /usr/sbin/telnetd telnetd\n"),), ()),
    ("inetd", (write("etc/inetd.conf", "telnet stream tcp nowait root /usr/sbin/telnetd telnetd\n"),), ("telnet",)),
    ("setuid", (write("bin/plain", "x", 0o755), write("bin/inert", "x", 0o4644)), ()),
    ("world-writable", (directory("var/sticky", 0o1777), link("etc/link", "/nowhere")), ()),
    ("sshd", (write("etc/ssh/sshd_config", "PermitRootLogin prohibit-password\n#PermitEmptyPasswords yes\n"),), ()),
    ("sshd", (write("etc/ssh/sshd_config", "PermitRootLogin no\nPermitRootLogin yes\n"),), ()),
    ("sshd", (write("etc/ssh/sshd_config", "Match Address 192.0.2.1\n  PermitRootLogin yes\n"),), ()),
    ("sshd", (
        write("etc/ssh/sshd_config", "Include sshd_config.d/*.conf\nPermitRootLogin yes\n"),
        write("etc/ssh/sshd_config.d/own.conf", "PermitRootLogin no\n"),
    ), ()),
    ("tool", (write("usr/bin/gdb", "x", 0o755),), ("gdb",)),
    ("tool", (write("usr/bin/nginx", "x", 0o755),), ()),
    ("unused-package", packages(package("wanted")), ()),
    ("unused-package", packages(package("upper", "Depends: lower (>= 1), x | y"), package("lower"),
                                automatic=("lower",)), ()),
    ("unused-package", packages(package("upper", "Recommends: virtual:any"), package("real", "Provides: virtual (= 2)"),
                                automatic=("real",)), ()),
    ("unused-package", packages(package("basis", "Essential: yes"), automatic=("basis",)), ()),
]  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system without findings."""
    needs(("mke2fs", "e2fsprogs"))
    root: Path = busybox_tree(tmp_path_factory.mktemp("clean") / "root")
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755)
    (root / "tmp").chmod(0o1777)
    return root


def found(clean: Path, place: Path, plants: tuple[Plant, ...], keep: tuple[str, ...] = ()) -> list[GuestFinding]:
    root = place / "root"
    shutil.copytree(clean, root, symlinks=True)
    for plant in plants:
        plant(root)
    filesystem.make(root, place / "disk", name="audited")
    return audit.audit(place / "disk", keep=keep)


def test_sound_system_has_no_findings(clean: Path, tmp_path: Path) -> None:
    assert found(clean, tmp_path, ()) == []


@pytest.mark.parametrize(
    ("code", "subject", "plants"), BROKEN, ids=[f"{code}-{subject}" for code, subject, _ in BROKEN]
)
def test_rule_finds_what_breaks_it(
    clean: Path, tmp_path: Path, code: str, subject: str, plants: tuple[Plant, ...]
) -> None:
    findings = found(clean, tmp_path, plants)
    assert (code, subject) in {(finding.code, finding.subject) for finding in findings}
    (finding,) = (one for one in findings if one.code == code)
    assert finding.severity in ("high", "medium", "low")
    assert finding.remedy or code == "service-as-root", "everything but that can be mended by a command"


@pytest.mark.parametrize(("code", "plants", "keep"), SOUND)
def test_rule_leaves_alone_what_nearly_breaks_it(
    clean: Path, tmp_path: Path, code: str, plants: tuple[Plant, ...], keep: tuple[str, ...]
) -> None:
    assert code not in {finding.code for finding in found(clean, tmp_path, plants, keep)}


def test_every_rule_is_in_both_tables() -> None:
    source = Path(audit.__file__).read_text()
    codes = {part.split('"')[0] for part in source.split('code="')[1:]} - {"listening"}
    assert {code for code, _, _ in BROKEN} == {code for code, _, _ in SOUND} == codes


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        ((), "rm /etc/systemd/system/multi-user.target.wants/planted.service"),
        ((write("usr/bin/systemctl", "x", 0o755),), "systemctl disable planted.service"),
        ((link("etc/rc3.d/S01planted", "../init.d/planted"),),
         "rm /etc/systemd/system/multi-user.target.wants/planted.service && update-rc.d planted disable"),
    ],
)  # fmt: skip
def test_remedy_of_a_service_is_of_the_managers_that_there_are(
    clean: Path, tmp_path: Path, files: tuple[Plant, ...], remedy: str
) -> None:
    (finding,) = (one for one in found(clean, tmp_path, (*unit(), *files)) if one.code == "service")
    assert finding.remedy == remedy


def test_the_gravest_findings_come_first(clean: Path, tmp_path: Path) -> None:
    plants = (*account("toor", 0, ""), *unit(), write("usr/bin/gdb", "x", 0o755))
    severities = [finding.severity for finding in found(clean, tmp_path, plants)]
    assert severities == sorted(severities, key=["high", "medium", "low"].index)
    assert len(set(severities)) == 3


def test_open_port_of_a_running_guest_is_found_unless_it_is_published_or_local(
    new_guest: NewGuest, start: Start
) -> None:
    needs(("slirp4netns", "slirp4netns"))
    name = new_guest(network="publish", publish=(Published(address="127.0.0.1", port=free_port(), target=80),)).name
    assert _listening(name, [80]) == [], "it does not run"
    start(name)
    script = "httpd -p 80 -h /srv; httpd -p 127.0.0.1:81 -h /srv; httpd -p 127.9.9.9:82 -h /srv; httpd -p 8081 -h /srv"
    assert control.execute(name, ["sh", "-c", script])[0] == 0
    assert until(lambda: len(_listening(name, [])) == 2)
    assert [finding.subject for finding in _listening(name, [80])] == ["tcp6/8081"]
    assert {finding.subject for finding in _listening(name, [])} == {"tcp6/80", "tcp6/8081"}


def test_remedies_of_files_are_carried_out_on_a_clone_first_and_kept_when_asked(
    clean: Path, tmp_path: Path, new_guest: NewGuest
) -> None:
    """What needs no program of Debian's; the rest is in test_debian.py."""
    from stockade.records.image import Image
    from stockade.vm import images, staging, store

    root = tmp_path / "root"
    shutil.copytree(clean, root, symlinks=True)
    for plant in (
        *unit(),
        write("bin/lifted", "x", 0o4755),
        write("etc/open", "x", 0o666),
        write("etc/inetd.conf", "telnet stream tcp nowait root /usr/sbin/telnetd telnetd\nssh stream tcp x y z\n"),
        write("etc/ssh/sshd_config", "PermitRootLogin yes\nPort 22\n"),
        write("usr/bin/gdb", "x", 0o755),
    ):
        plant(root)
    image = staging.image_of("unsafe", root, Image(name="unsafe", sha256="", size=0, mtime=0, origin="directory"))
    store.create("unsafe", image, memory=64 << 20, walls=("vm",))
    try:
        codes = {"service", "setuid", "world-writable", "inetd", "sshd", "tool"}
        assert codes <= {finding.code for finding in _audited("unsafe")}
        environment = ["--keep", "ssh"]
        assert _cli("guest", "audit", "unsafe", *environment, "--fix") == 0
        assert codes <= {finding.code for finding in _audited("unsafe")}, "that was on a clone"
        assert _cli("guest", "audit", "unsafe", *environment, "--fix", "--commit") == 0
        assert {finding.code for finding in _audited("unsafe", "ssh")} <= {"service-as-root"}
        machines.start_guest("unsafe").close()
        kept = control.execute("unsafe", ["cat", "/etc/ssh/sshd_config", "/etc/inetd.conf"])[1].decode()
        assert kept.splitlines() == [
            "permitrootlogin no", "Port 22", "#telnet stream tcp nowait root /usr/sbin/telnetd telnetd",
            "ssh stream tcp x y z",
        ]  # fmt: skip
    finally:
        machines.discard("unsafe")
        images.remove("unsafe", [])


def _audited(name: str, *keep: str) -> list[GuestFinding]:
    from stockade.vm import changes, images, store

    with changes.merged(store.disk(name), images.file(store.load(name).image), store.machine(name).parent) as disk:
        return audit.audit(disk, keep=keep)


def _cli(*words: str) -> int:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "stockade", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.returncode if done.returncode == 0 else pytest.fail(done.stdout + done.stderr)
