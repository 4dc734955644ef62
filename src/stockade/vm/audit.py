"""Look a guest's system over, from its disk alone: what the paper asks of a machine before it serves anybody."""

from __future__ import annotations

import re
import shlex
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stockade.kernel.crypt import crypt
from stockade.records.guest import GuestFinding

from .ext4 import FileSystem, Node

__all__ = ["audit", "listening"]

#: Tried against every hash: what images are handed out with.
_DEFAULT_PASSWORDS = ("", "root", "toor", "password", "admin", "debian", "changeme", "123456", "uml", "ubuntu", "user")
_LOCKED = ("*", "!", "x")
#: Programs that Debian ships setuid and that a server without people working on it does without, and the way back.
_TOOLS = (
    "gcc",
    "cc",
    "make",
    "gdb",
    "strace",
    "tcpdump",
    "nmap",
    "telnet",
    "ftp",
    "nc.traditional",
    "nc.openbsd",
    "socat",
)
_BASE_SERVICES = frozenset({
    "getty@tty1.service", "remote-fs.target", "e2scrub_reap.service", "systemd-pstore.service", "fstrim.timer",
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "procps", "hwclock.sh",
})  # fmt: skip
_UNIT_PLACES = ("/etc/systemd/system", "/lib/systemd/system", "/usr/lib/systemd/system")
_USER = re.compile(r"^User=(\S+)", re.MULTILINE)


def audit(image: Path, *, keep: Sequence[str] = ()) -> list[GuestFinding]:
    """Every finding, the gravest first. `keep` names the services that are wanted."""
    with FileSystem(image) as system:
        nodes = dict(system.walk())
        checks: tuple[Callable[[FileSystem, dict[str, Node], Sequence[str]], Iterator[GuestFinding]], ...] = (
            _accounts, _services, _inetd, _setuid, _writable, _ssh, _tools, _packages,
        )  # fmt: skip
        found = [finding for check in checks for finding in check(system, nodes, keep)]
    order = {"high": 0, "medium": 1, "low": 2}
    return sorted(found, key=lambda finding: (order[finding.severity], finding.code, finding.subject))


def _fields(system: FileSystem, path: str, count: int) -> list[list[str]]:
    lines = [line.split(":") for line in system.text(path).splitlines()]
    return [line for line in lines if len(line) >= count]


def _accounts(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    hashes = {line[0]: line[1] for line in _fields(system, "/etc/shadow", 2)}
    for line in _fields(system, "/etc/passwd", 7):
        name, password, uid = line[0], line[1], line[2]
        if uid == "0" and name != "root":
            yield GuestFinding(code="second-root", severity="high", subject=name, seen=f"account `{name}` has uid 0",
                               remedy=f"userdel -f {shlex.quote(name)}")  # fmt: skip
        secret = hashes.get(name, "") if password == "x" else password
        if secret == "":
            yield GuestFinding(code="empty-password", severity="high", subject=name,
                               seen=f"account `{name}` needs no password",
                               remedy=f"passwd -l {shlex.quote(name)}")  # fmt: skip
        elif not secret.startswith(_LOCKED):
            known = next((word for word in (*_DEFAULT_PASSWORDS, name) if _matches(word, secret)), None)
            if known is not None:
                yield GuestFinding(code="default-password", severity="high", subject=name,
                                   seen=f"account `{name}` has a password that everybody tries first",
                                   remedy=f"passwd -l {shlex.quote(name)}")  # fmt: skip


def _matches(word: str, secret: str) -> bool:
    try:
        return crypt(word, secret) == secret
    except (OSError, ValueError):
        return False


def _services(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    enabled: dict[str, str] = {}
    for path, node in nodes.items():
        directory, _, name = path.rpartition("/")
        if node.type == "symlink" and re.fullmatch(r"/etc/systemd/system/[^/]+\.(wants|requires)", directory):
            enabled.setdefault(name, "systemd")
        match = re.fullmatch(r"/etc/rc[2-5]\.d/S\d\d(.+)", path)
        if match:
            enabled.setdefault(match[1], "sysv")
    wanted = {*keep, *(f"{name}.service" for name in keep), *_BASE_SERVICES}
    for name, manager in sorted(enabled.items()):
        bare = name.removesuffix(".service")
        if manager == "sysv" and f"{name}.service" in enabled:
            continue
        quoted = shlex.quote(bare if manager == "sysv" else name)
        remedy = f"update-rc.d {quoted} disable" if manager == "sysv" else f"systemctl disable {quoted}"
        if name not in wanted and bare not in wanted:
            yield GuestFinding(code="service", severity="medium", subject=name,
                               seen=f"`{name}` is started at boot ({manager}), unasked", remedy=remedy)  # fmt: skip
        if manager == "systemd" and name.endswith(".service") and name not in _BASE_SERVICES:
            text = next((found for place in _UNIT_PLACES if (found := system.text(f"{place}/{name}"))), "")
            user = _USER.search(text)
            if text and (user is None or user[1] in ("root", "0")):
                yield GuestFinding(code="service-as-root", severity="low", subject=name,
                                   seen=f"`{name}` starts as root")  # fmt: skip


def _inetd(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    for line in system.text("/etc/inetd.conf").splitlines():
        words = line.split()
        if len(words) >= 6 and not line.startswith("#") and words[0] not in keep:
            yield GuestFinding(code="inetd", severity="medium", subject=words[0],
                               seen=f"inetd listens for `{words[0]}` and runs `{words[5]}` as {words[4]}",
                               remedy=f"update-inetd --disable {shlex.quote(words[0])}")  # fmt: skip


def _setuid(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    for path, node in nodes.items():
        if node.type == "file" and node.mode & (stat.S_ISUID | stat.S_ISGID) and node.mode & 0o111:
            owned = bool(node.mode & stat.S_ISUID) and node.uid == 0
            yield GuestFinding(code="setuid", severity="medium" if owned else "low", subject=path,
                               seen=f"`{path}` runs with the rights of uid {node.uid}" if node.mode & stat.S_ISUID
                               else f"`{path}` runs with the rights of gid {node.gid}",
                               remedy=f"chmod u-s,g-s {shlex.quote(path)}")  # fmt: skip


def _writable(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    for path, node in nodes.items():
        if not node.mode & stat.S_IWOTH or node.type not in ("file", "directory"):
            continue
        if node.type == "directory" and node.mode & stat.S_ISVTX:
            continue
        yield GuestFinding(code="world-writable", severity="high" if node.type == "file" else "medium", subject=path,
                           seen=f"everybody may write to `{path}`",
                           remedy=f"chmod o-w {shlex.quote(path)}")  # fmt: skip


def _ssh(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    said: dict[str, str] = {}
    for path in sorted(path for path in nodes if re.fullmatch(r"/etc/ssh/sshd_config(\.d/[^/]+\.conf)?", path)):
        for line in system.text(path).splitlines():
            words = line.split()
            if len(words) >= 2 and not line.lstrip().startswith("#"):
                said.setdefault(words[0].lower(), words[1].lower())
    if "/etc/ssh/sshd_config" in nodes:
        for key, bad in (("permitrootlogin", "yes"), ("permitemptypasswords", "yes")):
            if said.get(key) == bad:
                drop = f"sed -i -E 's/^[[:space:]]*{key}[[:space:]].*/{key} no/I' /etc/ssh/sshd_config"
                yield GuestFinding(
                    code="sshd", severity="high", subject=key, seen=f"sshd has `{key} {bad}`", remedy=drop
                )


def _tools(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    owners: dict[str, str] | None = None
    for tool in _TOOLS:
        path = f"/usr/bin/{tool}"
        if path in nodes and tool not in keep:
            owners = _owners(system, nodes) if owners is None else owners
            package = owners.get(path) or owners.get(f"/bin/{tool}", "")
            yield GuestFinding(code="tool", severity="low", subject=path,
                               seen=f"`{path}` serves an intruder more than the service",
                               remedy=f"apt-get -y purge {package}" if package else f"rm {path}")  # fmt: skip


def _owners(system: FileSystem, nodes: dict[str, Node]) -> dict[str, str]:
    """Which package each file of the tools' directory came from, by dpkg's lists."""
    found: dict[str, str] = {}
    for path in nodes:
        match = re.fullmatch(r"/var/lib/dpkg/info/([^/:]+)(:[a-z0-9]+)?\.list", path)
        if match:
            for line in system.text(path).splitlines():
                if line.startswith(("/usr/bin/", "/bin/")):
                    found[line] = match[1]
    return found


def _packages(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    """Installed packages that were only brought in by others and that nothing needs any more."""
    automatic = {
        fields["Package"]
        for fields in _paragraphs(system.text("/var/lib/apt/extended_states"))
        if fields.get("Auto-Installed") == "1" and "Package" in fields
    }
    installed = {
        fields["Package"]: fields
        for fields in _paragraphs(system.text("/var/lib/dpkg/status"))
        if fields.get("Status", "").endswith(" installed") and "Package" in fields
    }
    provides: dict[str, set[str]] = {}
    for name, fields in installed.items():
        for word in (name, *_names(fields.get("Provides", ""))):
            provides.setdefault(word, set()).add(name)
    waiting = [
        name for name, fields in installed.items()
        if name not in automatic or fields.get("Essential") == "yes" or fields.get("Priority") == "required"
    ]  # fmt: skip
    needed = set(waiting)
    while waiting:
        fields = installed[waiting.pop()]
        for key in ("Depends", "Pre-Depends", "Recommends"):
            for word in _names(fields.get(key, "")):
                for name in provides.get(word, set()) - needed:
                    needed.add(name)
                    waiting.append(name)
    for name in sorted(installed.keys() - needed):
        yield GuestFinding(code="unused-package", severity="low", subject=name,
                           seen=f"package `{name}` came with another one that is gone",
                           remedy=f"apt-get -y purge {shlex.quote(name)}")  # fmt: skip


def _paragraphs(text: str) -> Iterator[dict[str, str]]:
    for paragraph in text.split("\n\n"):
        yield {
            key: value
            for key, separator, value in (line.partition(": ") for line in paragraph.splitlines())
            if separator and not key.startswith(" ")
        }


def _names(relation: str) -> list[str]:
    return [
        word.split("(")[0].split(":")[0].strip()
        for part in relation.split(",")
        for word in part.split("|")
        if word.strip()
    ]


def listening(tables: dict[str, str], published: Sequence[int]) -> list[GuestFinding]:
    """Ports that a running guest listens on and does not publish; `tables` are its /proc/net/tcp and so on, by name."""
    found = []
    for kind, text in sorted(tables.items()):
        state = "0A" if kind.startswith("tcp") else "07"
        for line in text.splitlines()[1:]:
            words = line.split()
            if len(words) < 8 or words[3] != state:
                continue
            address, _, port = words[1].rpartition(":")
            number = int(port, 16)
            local = address in ("0100007F", "00000000000000000000000001000000")
            if number in published or local:
                continue
            found.append(
                GuestFinding(code="listening", severity="medium", subject=f"{kind}/{number}",
                             seen=f"port {number} ({kind}) is open, of uid {words[7]}, and is not published")
            )  # fmt: skip
    return found
