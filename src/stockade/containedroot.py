"""The root that a contained command sees: the host's /usr, an /etc with little in it, and the paths that were named."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import contain
from .contain.ids import FIRST
from .contain.installing import install
from .errors import HostError
from .kernel.beneath import Root
from .records.launch import Bind, IdRange, MakeDirectory, MakeFile, MountStep
from .records.lock import Lock, LockDirectory, LockedSpec
from .records.policy import CgroupPlan
from .records.spec import Account, Directory, Network, Service, Spec

if TYPE_CHECKING:
    from .contained import Options

__all__ = [
    "NAME", "NETWORKS", "NOBODY", "OVERFLOW", "REFUSED", "TOP_LEVEL", "home_of", "make", "parts", "user_of", "within",
]  # fmt: skip

NAME = "contain"

TOP_LEVEL = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_MOUNT_POINTS = ("dev", "proc", "run", "tmp", "usr", "var/tmp", "etc")

#: Of /etc: what programs of /usr need to run at all, and nothing that says much about the host.
_COPIED = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d/*", "nsswitch.conf", "host.conf", "gai.conf", "hosts", "localtime",
    "timezone", "services", "protocols", "rpc", "mime.types", "magic", "inputrc", "locale.alias", "papersize",
    "debian_version", "lsb-release",
)  # fmt: skip
_BOUND = (
    "alternatives", "ssl/certs", "ssl/openssl.cnf", "ca-certificates", "pki/tls/certs", "fonts", "java-*", "perl",
    "python3*", "php", "terminfo", "xdg", "emacs", "vim", "gitconfig", "crypto-policies",
)  # fmt: skip

_RESOLVER = "resolv.conf"
#: Of a caller without one that can be shown: below a directory that no named path covers.
_HOME = "/run/home"
#: What cannot be opened up.
REFUSED = ("/", "/proc", "/dev", "/sys", "/run", "/etc", "/var", "/boot", "/root")
#: A host id that no account has, just below those of jails; and the one for what a user namespace does not map.
NOBODY = FIRST - 1
OVERFLOW = 65534
# What a limit of the command's control groups is set by; without one of them it does not hold.
_LIMITING = {"memory": ("memory.max", "memory.limit_in_bytes"), "cpus": ("cpu.max", "cpu.cfs_quota_us")}


def parts() -> list[str]:
    """The paths of the host that every root is made of, /usr and the warden among them."""
    return ["/usr", contain.warden_path(), *_found((*_COPIED, _RESOLVER, *_BOUND))]


def home_of(uid: int) -> str:
    """The home of a user's account, or one below /run where that cannot be shown."""
    try:
        home = pwd.getpwuid(uid).pw_dir
    except KeyError:
        home = _HOME
    taken = home in REFUSED or any(within(home, f"/{top}") for top in (*TOP_LEVEL, "usr", "proc", "dev", "sys"))
    return home if os.path.isabs(home) and not taken else _HOME


def user_of(uid: int) -> str:
    """The name of a user's account, or one made up."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "nobody" if uid in (NOBODY, OVERFLOW) else f"u{uid}"


def make(directory: Path, options: Options, named: Sequence[tuple[str, bool]], uid: int, gid: int) -> None:
    """Make the root in `directory`, and the plan that starts a command in it. HostError for a limit not kept here."""
    home = home_of(uid)
    tops = tuple(dict.fromkeys(("/tmp", "/run", "/var/tmp", home)))
    steps: list[MountStep] = [Bind(source="/usr", target="/usr", submounts=True)]
    rootfs = directory / "rootfs"
    rootfs.mkdir(0o755)
    with Root.open(rootfs) as root:
        for name in (*_MOUNT_POINTS, home.lstrip("/")):
            root.makedirs(name)
        steps += _top_level(root)
        steps += _etc(root, rootfs, options, uid, gid)
        steps += _openings(root, named, tops, uid, gid)
    lock = Lock(
        spec=LockedSpec(name=NAME, sha256=""),
        architecture=os.uname().machine,
        directories=tuple(
            LockDirectory(path=path, mode=0o1777 if path.endswith("/tmp") else 0o700, uid=uid, gid=gid)
            for path in sorted(tops)
        ),
        devices=("full", "random", "urandom"),
        proc="full",
    )
    spec = Spec(
        name=NAME,
        service=Service(command=("/bin/sh",), user=str(uid), group=str(gid)),
        accounts=(Account(name="user", uid=uid),),
        directories={path: Directory() for path in tops},
        network=NETWORKS[options.network],
        limits=options.limits,
        policy=options.policy,
    )
    ids = IdRange(first=uid, first_gid=gid, count=1, kind="single")
    plan = install(spec, lock, generation=directory, ids=ids, extra=tuple(steps))
    if plan.cgroup is not None:
        _refuse_unlimited(plan.cgroup)


def _refuse_unlimited(groups: CgroupPlan) -> None:
    """HostError for a limit that was asked for and that nothing here would keep."""
    for missing in groups.not_limited:
        files = _LIMITING.get(missing.limit, ())
        if files and not any(step.path.endswith(files) for step in groups.make):
            raise HostError(
                f"`{missing.limit}` cannot be limited here: {missing.reason}",
                hint=missing.remedy or "leave it out; `stockade doctor` tells which limits this host keeps",
            )


NETWORKS = {
    "none": Network(),
    "host": Network(mode="host"),
    "egress": Network(mode="private", egress=True),
}


def _top_level(root: Root) -> Iterator[MountStep]:
    """/bin, /lib… as the host has them: links into /usr, or directories of their own."""
    for name in TOP_LEVEL:
        path = f"/{name}"
        if os.path.islink(path):
            root.symlinkat(os.readlink(path), name)
        elif os.path.isdir(path):
            root.mkdirat(name, 0o755)
            yield Bind(source=path, target=path, submounts=True)


def _etc(root: Root, rootfs: Path, options: Options, uid: int, gid: int) -> Iterator[MountStep]:
    user, home = user_of(uid), home_of(uid)
    files = {
        "passwd": f"root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n{user}:x:{uid}:{gid}::{home}:/bin/sh\n",
        "group": f"root:x:0:\n{user}:x:{gid}:\n" if gid else "root:x:0:\n",
        "hostname": f"{NAME}\n",
    }
    if options.network == "egress":
        files["resolv.conf"] = f"nameserver {contain.RESOLVER}\n"
    for name, text in files.items():
        _write(root, f"etc/{name}", text.encode())
    copied = (*_COPIED, *((_RESOLVER,) if options.network == "host" else ()))
    for path in _found(copied):
        if os.path.isfile(path):
            root.makedirs(os.path.dirname(path).lstrip("/"))
            _write(root, path.lstrip("/"), Path(path).read_bytes())
    for path in _found(_BOUND):
        _mount_point(root, path)
        yield Bind(source=os.path.realpath(path), target=path, submounts=True)


def _found(patterns: Sequence[str]) -> list[str]:
    """What is there of these names below /etc; of a link, what it leads to."""
    paths = {path for name in patterns for path in (glob.glob(f"/etc/{name}") if "*" in name else (f"/etc/{name}",))}
    return sorted(path for path in paths if os.path.exists(path))


def _write(root: Root, path: str, content: bytes) -> None:
    with open(root.create(path, 0o644), "wb") as file:
        file.write(content)


def _mount_point(root: Root, path: str) -> None:
    """A directory or a file at `path`, as the host has it."""
    if os.path.isdir(path):
        root.makedirs(path.lstrip("/"))
    else:
        root.makedirs(os.path.dirname(path).lstrip("/") or ".")
        with contextlib.suppress(FileExistsError):  # one that was written here, such as /etc/passwd
            os.close(root.create(path.lstrip("/"), 0o444))


def _openings(
    root: Root, named: Sequence[tuple[str, bool]], tops: Sequence[str], uid: int, gid: int
) -> Iterator[MountStep]:
    """Mounts of the named paths, each with a place to be mounted on."""
    covered = ["/usr"]
    for path, writable in named:
        top = next((top for top in tops if within(path, top)), None)
        if any(within(path, other) for other in covered):
            pass  # what covers it has the place
        elif top is not None and path != top:
            parts = path[len(top) :].strip("/").split("/")
            for count in range(1, len(parts)):
                yield MakeDirectory(path="/".join((top, *parts[:count])), mode=0o755, uid=uid, gid=gid)
            if os.path.isdir(path):
                yield MakeDirectory(path=path, mode=0o755, uid=uid, gid=gid)
            else:
                yield MakeFile(path=path)
        elif top is None:
            _mount_point(root, path)
        yield Bind(source=os.path.realpath(path), target=path, writable=writable, submounts=True)
        covered.append(path)


def within(path: str, top: str) -> bool:
    """Whether `path` is `top` or lies below it."""
    return path == top or path.startswith(f"{top.rstrip('/')}/")
