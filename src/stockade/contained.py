"""`contain`: one command now, behind a jail's walls, over the host's own /usr. Needs no jail and keeps none.

What the command sees is a small root: /usr read-only, an /etc with little in it, a home, /tmp and /run of its own,
and the paths that were named. It is made once for each set of options and kept below the runtime directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from . import contain, places
from .contain import runfiles
from .containedroot import NAME, NETWORKS, NOBODY, OVERFLOW, REFUSED, TOP_LEVEL, home_of, make, parts, user_of, within
from .errors import HostError, NotFoundError, StateError, UsageError, WallError
from .records.spec import Limits, Policy

__all__ = ["NETWORKS", "Options", "prepared", "start"]

_KEPT = 32
_OLD = ".old-"
_ATTEMPTS = 20


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
    """Start `command` behind the walls. Its working directory is `directory`, as the caller would name it.

    Without one it is the caller's where that, or a named path below it, can be seen, else its home.
    UsageError for a path that cannot be opened up, WallError when a launch step failed.
    """
    try:
        with prepared(options) as generation:
            return contain.launch_generation(
                generation, name=NAME, argv=command, environment=environment, terminal=terminal, stdin=stdin,
                stdout=stdout, stderr=stderr, gate=gate,
                directory=_absolute(directory) if directory else _directory(options),
            )  # fmt: skip
    except WallError as error:
        if error.exit_code == 127:
            error.hint = f"below `/usr` everything is in sight; `read` opens up what else `{command[0]}` is or needs"
        raise


def _directory(options: Options) -> str:
    with contextlib.suppress(FileNotFoundError):  # it may have been removed
        here = os.getcwd()
        named = [_absolute(path) for path in (*options.read, *options.write)]
        if any(within(here, path) for path in (*named, "/usr")):
            return here
        if here != "/" and any(within(path, here) for path in named):
            return here
    return home_of(_identity(options)[0])


@contextlib.contextmanager
def prepared(options: Options) -> Iterator[Path]:
    """The directory with root and plan for `options`, made where it is not there yet.

    Nobody removes it within the block, nor as long as a command runs from it.
    """
    named = tuple(_named(options))
    uid, gid = _identity(options)
    base = places.run() / f".{NAME}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    runfiles.private(base)
    ready = base / _digest(options, named, uid, gid)
    for _ in range(_ATTEMPTS):
        held = _lock(ready, fcntl.LOCK_SH)
        if held is None:
            _make_aside(base, ready, options, named, uid, gid)
            continue
        try:
            os.utime(ready)
            yield ready
        finally:
            os.close(held)
        return
    raise StateError(f"`{ready}` comes and goes", hint="something else removes what is below it: try again")


def _lock(directory: Path, kind: int) -> int | None:
    """A descriptor that holds `directory` (flock(2)), as each command run from it does; None where it is not to be had.

    LOCK_SH keeps it from being removed, LOCK_EX is for who removes it.
    """
    path = places.use(directory)
    try:
        held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(held, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), os.stat(path)):
            return held
    os.close(held)
    return None


def _make_aside(
    base: Path, ready: Path, options: Options, named: Sequence[tuple[str, bool]], uid: int, gid: int
) -> None:
    """Make the directory under another name and rename it to `ready`, unless somebody else was faster."""
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=base))
    held = os.open(places.use(fresh), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
        make(fresh, options, named, uid, gid)
        os.rename(fresh, ready)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if not (isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST) and ready.exists()):
            raise
    finally:
        os.close(held)
    _forget_old(base)


def _named(options: Options) -> Iterator[tuple[str, bool]]:
    """Absolute path and writability of what the caller named, outer before inner."""
    found = {_place(path): False for path in options.read}
    found.update((_place(path), True) for path in options.write)
    for path, writable in sorted(found.items()):
        real = os.path.realpath(path)
        if _refused(path) or _refused(real):
            led = f" leads to `{real}`, which" if real != path else ""
            raise UsageError(
                f"`{path}`{led} cannot be opened up", hint="name the directory or file below it that is needed"
            )
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"`{path}` does not exist", hint="make it first, or leave it out") from None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            hint = "name only what the caller can reach itself"
            raise UsageError(f"`{path}` cannot be opened up: {reason}", hint=hint) from None
        yield path, writable


def _refused(path: str) -> bool:
    return path in REFUSED or any(within(path, top) for top in ("/proc", "/dev", "/sys"))


def _place(path: str) -> str:
    """Where a named path is seen: below /usr for what lies below a link of the host's to there, such as /lib."""
    if not path:
        raise UsageError("a path to open up is empty", hint="name the file or directory; `.` is the working directory")
    place = _absolute(path)
    top = place[: place.find("/", 1)] if "/" in place[1:] else ""
    return os.path.realpath(top) + place[len(top) :] if top[1:] in TOP_LEVEL else place


def _absolute(path: str) -> str:
    """`path` as seen from the caller's working directory."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise NotFoundError(
            f"`{path}` is nowhere: the working directory has been removed",
            hint="change to another, or begin it with `/`",
        ) from None


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
        return status.st_uid, status.st_gid or _group(status.st_uid)
    return _nobody()


def _group(uid: int) -> int:
    """The user's own group, for one whose path is left to root's; never root's itself."""
    try:
        return pwd.getpwuid(uid).pw_gid or uid
    except KeyError:
        return uid


def _nobody() -> tuple[int, int]:
    """Ids that no account has; in a user namespace that lacks them, such as a rootless container's, nobody's there."""
    for number in (NOBODY, OVERFLOW):
        if all(_mapped(number, kind) for kind in ("uid", "gid")):
            return number, number
    raise HostError(
        "the caller is root of a user namespace that has no id for the command but root's own",
        hint=f"run `stockade {NAME}` as the user outside, or in a namespace with more ids: `unshare --map-auto`",
    )


def _mapped(number: int, kind: str) -> bool:
    """Whether this user namespace has the id (user_namespaces(7))."""
    with open(f"/proc/self/{kind}_map", encoding="ascii") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(first <= number < first + count for first, _, count in ranges)


def _digest(options: Options, named: Sequence[tuple[str, bool]], uid: int, gid: int) -> str:
    """Names what is kept: options, who, what the named paths are now, and the state of all else that it is made of."""
    kinds = [(path, writable, os.path.realpath(path), os.path.isdir(path)) for path, writable in named]
    states = [(path, status.st_dev, status.st_ino, status.st_mtime_ns) for path in parts() if (status := os.stat(path))]
    text = repr((options, kinds, uid, gid, user_of(uid), home_of(uid), states))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _forget_old(base: Path) -> None:
    """Keep the roots that were used last, and those that a command runs from or that are being made."""
    ages: list[tuple[float, Path]] = []
    for entry in os.scandir(base):
        with contextlib.suppress(FileNotFoundError):
            ages.append((entry.stat(follow_symlinks=False).st_mtime, Path(entry.path)))
    for _, path in sorted(ages)[:-_KEPT]:
        held = _lock(path, fcntl.LOCK_EX)
        if held is not None:
            # Renamed first, so that half a root never stands under its own name.
            aside = base / f"{_OLD}{os.urandom(8).hex()}"
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)
            os.close(held)
        elif path.name.startswith(_OLD):
            shutil.rmtree(path, ignore_errors=True)  # a removal that a kill stopped
