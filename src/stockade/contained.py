"""`contain`: one command now, behind a jail's walls, over the host's own /usr. Needs no jail and keeps none.

What the command sees is a small root: /usr read-only, an /etc with little in it, a home, /tmp and /run of its own,
and the paths that were named. It is made once for each set of options and kept below the runtime directory.
"""

from __future__ import annotations

import glob
import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from . import contain, places
from .contain import runfiles
from .contain.ids import FIRST
from .contain.installing import install
from .errors import NotFoundError, UsageError, WallError
from .kernel.beneath import Root
from .records.launch import Bind, IdRange, MakeDirectory, MakeFile, MountStep
from .records.lock import Lock, LockDirectory, LockedSpec
from .records.spec import Account, Directory, Limits, Network, Policy, Service, Spec

__all__ = ["Options", "prepare", "start"]

NAME = "contain"

_TOP_LEVEL = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
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

_REFUSED = ("/", "/proc", "/dev", "/sys", "/run", "/etc", "/var", "/boot", "/root")
# Of host ids that no account has: just below those of jails.
_NOBODY = FIRST - 1
_KEPT = 32


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a contained command may see and use.

    `read` and `write` are paths of the host, seen at their own place. `network`: none, host, or egress (out, but
    neither to the host nor to link-local addresses). Sizes as in a spec.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    network: str = "none"
    limits: Limits = Limits()
    policy: Policy = Policy(capabilities=())


def start(
    command: Sequence[str],
    options: Options,
    *,
    environment: Mapping[str, str] | None = None,
    directory: str | None = None,
    terminal: bool = False,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    gate: bool = False,
) -> contain.Running:
    """Start `command` behind the walls. Its working directory is the caller's where that can be seen, else its home.

    UsageError for a path that cannot be opened up, WallError when a launch step failed.
    """
    if not command:
        raise UsageError("no command was given", hint="put it after `--`")
    generation = prepare(options)
    named = tuple(os.path.abspath(path) for path in (*options.read, *options.write))
    if directory is None:
        here = os.getcwd()
        visible = any(_within(here, path) for path in (*named, "/usr"))
        directory = here if visible else _home(_identity(options)[0])
    try:
        return contain.launch_generation(
            generation, name=NAME, argv=command, environment=environment, terminal=terminal, stdin=stdin,
            stdout=stdout, stderr=stderr, directory=directory, gate=gate,
        )  # fmt: skip
    except WallError as error:
        if error.exit_code in (126, 127):
            error.hint = f"below `/usr` everything is in sight; `read` opens up what `{command[0]}` needs beside it"
        raise


def prepare(options: Options) -> Path:
    """The directory with root and plan for `options`, made where it is not there yet."""
    named = tuple(_named(options))
    uid, gid = _identity(options)
    base = places.run() / f".{NAME}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    runfiles.private(base)
    ready = base / _digest(options, named, uid)
    if (ready / "plan").exists():
        os.utime(ready)
        return ready
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=base))
    try:
        _make(fresh, options, named, uid, gid)
        os.rename(fresh, ready)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        if not (ready / "plan").exists():  # else somebody else was faster
            raise
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _forget_old(base)
    return ready


def _named(options: Options) -> Iterator[tuple[str, bool]]:
    """Absolute path and writability of what the caller named, outer before inner."""
    found = {os.path.abspath(path): False for path in options.read}
    found.update((os.path.abspath(path), True) for path in options.write)
    for path, writable in sorted(found.items()):
        if path in _REFUSED or any(_within(path, top) for top in ("/proc", "/dev", "/sys")):
            raise UsageError(f"`{path}` cannot be opened up", hint="name the directory or file below it that is needed")
        if not os.path.exists(path):
            raise NotFoundError(f"`{path}` does not exist", hint="make it first, or leave it out")
        yield path, writable


def _identity(options: Options) -> tuple[int, int]:
    """Host ids of the command: the caller's; for root those of the first written path's owner, or nobody's."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for path in options.write:
        status = os.stat(path)
        if status.st_uid == 0:
            raise UsageError(
                f"`{path}` belongs to root, and no process behind the walls is root of the host",
                hint=f"`chown` it to the user that is to write there, or run `{NAME}` as that user",
            )
        return status.st_uid, status.st_gid
    return _NOBODY, _NOBODY


def _home(uid: int) -> str:
    try:
        home = pwd.getpwuid(uid).pw_dir
    except KeyError:
        home = "/tmp/home"
    return home if os.path.isabs(home) and home not in _REFUSED else "/tmp/home"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "nobody" if uid == _NOBODY else f"u{uid}"


def _digest(options: Options, named: Sequence[tuple[str, bool]], uid: int) -> str:
    """Names what is kept: options, who, and the state of the host's libraries and of what was named."""
    kinds = [(path, writable, os.path.isdir(path)) for path, writable in named]
    cache = os.stat("/etc/ld.so.cache").st_mtime_ns if os.path.exists("/etc/ld.so.cache") else 0
    text = msgspec.json.encode((options, kinds, uid, cache, os.stat("/usr").st_ino))
    return hashlib.sha256(text).hexdigest()[:32]


def _make(directory: Path, options: Options, named: Sequence[tuple[str, bool]], uid: int, gid: int) -> None:
    home = _home(uid)
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
        network=_NETWORKS[options.network],
        limits=options.limits,
        policy=options.policy,
    )
    ids = IdRange(first=uid, first_gid=gid, count=1, kind="single")
    install(spec, lock, generation=directory, ids=ids, extra=tuple(steps))


_NETWORKS = {
    "none": Network(),
    "host": Network(mode="host"),
    "egress": Network(mode="private", egress=True),
}


def _top_level(root: Root) -> Iterator[MountStep]:
    """/bin, /lib… as the host has them: links into /usr, or directories of their own."""
    for name in _TOP_LEVEL:
        path = f"/{name}"
        if os.path.islink(path):
            root.symlinkat(os.readlink(path), name)
        elif os.path.isdir(path):
            root.mkdirat(name, 0o755)
            yield Bind(source=path, target=path, submounts=True)


def _etc(root: Root, rootfs: Path, options: Options, uid: int, gid: int) -> Iterator[MountStep]:
    user, home = _user(uid), _home(uid)
    files = {
        "passwd": f"root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n{user}:x:{uid}:{gid}::{home}:/bin/sh\n",
        "group": f"root:x:0:\n{user}:x:{gid}:\n" if gid else "root:x:0:\n",
        "hostname": f"{NAME}\n",
    }
    if options.network == "egress":
        files["resolv.conf"] = f"nameserver {contain.RESOLVER}\n"
    for name, text in files.items():
        _write(root, f"etc/{name}", text.encode())
    copied = (*_COPIED, *(("resolv.conf",) if options.network == "host" else ()))
    for path in _found(copied):
        if os.path.isfile(path):
            root.makedirs(os.path.dirname(path).lstrip("/"))
            _write(root, path.lstrip("/"), Path(path).read_bytes())
    for path in _found(_BOUND):
        _mount_point(root, path)
        yield Bind(source=os.path.realpath(path), target=path, submounts=True)


def _found(patterns: Sequence[str]) -> list[str]:
    return sorted({path for pattern in patterns for path in glob.glob(f"/etc/{pattern}")})


def _write(root: Root, path: str, content: bytes) -> None:
    with open(root.create(path, 0o644), "wb") as file:
        file.write(content)


def _mount_point(root: Root, path: str) -> None:
    """A directory or an empty file at `path`, as the host has it."""
    if os.path.isdir(path):
        root.makedirs(path.lstrip("/"))
    else:
        root.makedirs(os.path.dirname(path).lstrip("/") or ".")
        os.close(root.create(path.lstrip("/"), 0o444))


def _openings(
    root: Root, named: Sequence[tuple[str, bool]], tops: Sequence[str], uid: int, gid: int
) -> Iterator[MountStep]:
    """Mounts of the named paths, each with a place to be mounted on."""
    covered = ["/usr"]
    for path, writable in named:
        top = next((top for top in tops if _within(path, top)), None)
        if any(_within(path, other) for other in covered):
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


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top.rstrip('/')}/")


def _forget_old(base: Path) -> None:
    """Keep the roots that were used last; one that is in use is not among the oldest, or is made again."""
    made = [entry for entry in os.scandir(base) if stat.S_ISDIR(entry.stat(follow_symlinks=False).st_mode)]
    for entry in sorted(made, key=lambda entry: entry.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(entry.path, ignore_errors=True)
