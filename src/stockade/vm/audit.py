"""Look a guest's system over, from its disk alone: what the paper asks of a machine before it serves anybody."""

from __future__ import annotations

import fnmatch
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stockade.errors import HostError
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
#: Hashes of crypt(5) whose cost is a system's default or less, by prefix.
_AFFORDABLE = re.compile(
    r"\$[156]\$(?!rounds=)|\$[56]\$rounds=[0-9]{1,6}\$|\$2[aby]\$0[0-9]\$|\$y\$j[./0-9]T\$|[./0-9A-Za-z]{13}$"
)
_USER = re.compile(r"^User=(\S*)", re.MULTILINE)
_DYNAMIC_USER = re.compile(r"^DynamicUser=(?i:yes|true|on|1)\s*$", re.MULTILINE)
_SYSTEMCTL = ("/usr/bin/systemctl", "/bin/systemctl")
_SSHD = "/etc/ssh/sshd_config"


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
    if not _AFFORDABLE.match(secret):
        return False  # its owner chose what it costs, up to hours and gigabytes
    try:
        return crypt(word, secret) == secret
    except (OSError, ValueError, HostError):
        return False


def _services(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    units: dict[str, list[str]] = {}
    scripts: set[str] = set()
    for path, node in nodes.items():
        directory, _, name = path.rpartition("/")
        if node.type == "symlink" and re.fullmatch(r"/etc/systemd/system/[^/]+\.(wants|requires)", directory):
            units.setdefault(name, []).append(path)
        match = re.fullmatch(r"/etc/rc[2-5]\.d/S\d\d(.+)", path)
        if match:
            scripts.add(match[1])
    wanted = {*keep, *(f"{name}.service" for name in keep), *_BASE_SERVICES}
    has_systemctl = any(path in nodes for path in _SYSTEMCTL)
    for name in sorted({*units, *(script for script in scripts if f"{script}.service" not in units)}):
        bare = name.removesuffix(".service")
        off = {}
        if name in units:
            off["systemd"] = ["systemctl", "disable", name] if has_systemctl else ["rm", *units[name]]
        if bare in scripts:
            off["sysv"] = ["update-rc.d", bare, "disable"]
        if name not in wanted and bare not in wanted:
            yield GuestFinding(code="service", severity="medium", subject=name,
                               seen=f"`{name}` is started at boot ({', '.join(off)}), unasked",
                               remedy=" && ".join(map(shlex.join, off.values())))  # fmt: skip
        is_service = name in units and name.endswith(".service") and name not in _BASE_SERVICES
        if is_service and _is_roots(system, nodes, name):
            yield GuestFinding(code="service-as-root", severity="low", subject=name, seen=f"`{name}` starts as root")


def _is_roots(system: FileSystem, nodes: dict[str, Node], unit: str) -> bool:
    """Whether a unit that is there names no user, in itself or in what is dropped in beside it (systemd.unit(5))."""
    text = next((found for place in _UNIT_PLACES if (found := system.text(f"{place}/{unit}"))), "")
    if not text:
        return False
    dropped = sorted(
        path for path in nodes for place in _UNIT_PLACES
        if path.startswith(f"{place}/{unit}.d/") and path.endswith(".conf")
    )  # fmt: skip
    text = "\n".join((text, *(system.text(path) for path in dropped)))
    users = _USER.findall(text)
    return not _DYNAMIC_USER.search(text) and (not users or users[-1] in ("", "root", "0"))


def _inetd(system: FileSystem, nodes: dict[str, Node], keep: Sequence[str]) -> Iterator[GuestFinding]:
    for line in system.text("/etc/inetd.conf").splitlines():
        words = line.split()
        if len(words) >= 6 and not line.startswith("#") and words[0] not in keep:
            yield GuestFinding(code="inetd", severity="medium", subject=words[0],
                               seen=f"inetd listens for `{words[0]}` and runs `{words[5]}` as {words[4]}",
                               remedy=_without(words[0], "/etc/inetd.conf"))  # fmt: skip


def _without(word: str, path: str) -> str:
    """The command that makes comments of the lines of a file that begin with a word."""
    pattern = re.sub(r"([^A-Za-z0-9_-])", r"\\\1", word)
    return shlex.join(["sed", "-i", f"s/^[[:space:]]*{pattern}[[:space:]]/#&/", path])


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
    said: dict[str, tuple[str, str]] = {}
    for path, key, value in _sshd_lines(system, nodes, _SSHD):
        said.setdefault(key, (value, path))
    for key in ("permitrootlogin", "permitemptypasswords"):
        value, path = said.get(key, ("", ""))
        if value == "yes":
            drop = ["sed", "-i", "-E", f"s/^[[:space:]]*{key}[[:space:]].*/{key} no/I", path]
            yield GuestFinding(code="sshd", severity="high", subject=key, seen=f"sshd has `{key} yes`",
                               remedy=shlex.join(drop))  # fmt: skip


def _sshd_lines(system: FileSystem, nodes: dict[str, Node], path: str) -> Iterator[tuple[str, str, str]]:
    """File, keyword and value in the order of sshd_config(5), where the first value holds; none with a condition."""
    for line in system.text(path).splitlines():
        words = line.replace("=", " ", 1).split()
        if len(words) < 2 or words[0].startswith("#"):
            continue
        key = words[0].lower()
        if key == "match":
            return
        if key == "include" and path == _SSHD:
            for pattern in words[1:]:
                wanted = pattern if pattern.startswith("/") else f"/etc/ssh/{pattern}"
                for included in sorted(fnmatch.filter(nodes, wanted)):
                    yield from _sshd_lines(system, nodes, included)
        yield path, key, words[1].strip('"').lower()


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
            if not re.fullmatch(r"[0-9A-F]{4}", port):
                continue
            number = int(port, 16)
            # In the host's byte order, here the little-endian: ::1, 127.0.0.0/8, and that as an IPv6 address.
            local = address == "00000000000000000000000001000000" or (
                address.endswith("7F") and (len(address) == 8 or address.startswith("0000000000000000FFFF0000"))
            )
            if number in published or local:
                continue
            found.append(
                GuestFinding(code="listening", severity="medium", subject=f"{kind}/{number}",
                             seen=f"port {number} ({kind}) is open, of uid {words[7]}, and is not published")
            )  # fmt: skip
    return found
