"""Read strace's per-process files into a Trace. Runs nothing.

The files are those of `strace -ff -y -ttt`: a line begins with the time at which the call was entered, so
that sorting the lines of all processes by it puts a process's creation before its first call.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..records.trace import Access, Execution, Operation, Socket, Trace
from .calls import CALLS, CREATING, IDENTITIES, OWNERS, PERMISSIONS, Call
from .recorded import Recorded
from .syntax import (
    ADDRESSES,
    CHANGED,
    CLONE_FLAGS,
    DESCRIPTOR,
    FAMILY,
    FLAGS,
    IDS,
    MODE,
    NAME,
    NUMBER,
    OPEN,
    OPENAT,
    PIECES,
    SOCKET,
    STRINGS,
    result_of,
    unescape,
)
from .usage import calls_seen

__all__ = ["Recorded", "parse", "read"]

_CALLS = {name: (call, re.compile(", ".join(PIECES[kind] for kind in call.layout))) for name, call in CALLS.items()}

#: Calls that only look: the same one again by the same process says nothing new.
_LOOKING = frozenset(("read", "stat", "readlink", "list", "exec", "chdir", "connect"))

@dataclass
class _Place:
    """Current and root directory, shared between processes that were made with CLONE_FS."""

    cwd: str
    root: str = ""


@dataclass
class _State:
    base: str
    accesses: list[Access] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    sockets: list[Socket] = field(default_factory=list)
    ids: dict[str, set[int]] = field(default_factory=lambda: {"uid": set(), "gid": set()})
    names: set[str] = field(default_factory=set)
    places: dict[int, _Place] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)
    bound: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    seen: set[tuple[int, str, str, str]] = field(default_factory=set)

    def add(
        self,
        pid: int,
        operation: Operation,
        path: str,
        error: str,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        relative: bool = False,
    ) -> None:
        if operation in _LOOKING:
            key = pid, operation, path, error
            if key in self.seen:
                return
            self.seen.add(key)
        self.accesses.append(
            Access(
                path=path, operation=operation, error=error, pid=pid, order=len(self.accesses),
                mode=mode, uid=uid, gid=gid, relative=relative,
            )
        )  # fmt: skip

    def inside(self, path: str) -> str:
        """A path that strace saw, as the observed root has it."""
        return path[len(self.base) :] or "/" if self.base and path.startswith(self.base) else path

    def absolute(self, place: _Place, path: str, directory: str | None = None) -> str:
        path = unescape(path)
        if not path.startswith("/"):
            above = place.cwd if directory is None else directory
            return f"{above}/{path}" if above != "/" else f"/{path}"
        if path.startswith("//"):  # two are one to Linux, and kept by posixpath, for which such a path has no end above
            path = f"/{path.lstrip('/')}"
        if place.root:
            # `..` stops at a process's root directory (path_resolution(7)).
            return posixpath.normpath(place.root + posixpath.normpath(path))
        return path

    def directory(self, place: _Place, number: str, path: str | None) -> str | None:
        """The directory that a path argument is relative to; None if strace could not tell."""
        if path is None:
            return place.cwd if number == "AT_FDCWD" else None
        found = self.inside(unescape(path))
        if number == "AT_FDCWD":
            place.cwd = found
        return found


def read(directory: int, recorded: Iterable[Recorded]) -> list[tuple[str, int, str]]:
    """The lines of strace's files in the directory behind that descriptor: time, pid, text; sorted by time."""
    prefixes = {item.prefix for item in recorded}
    lines: list[tuple[str, int, str]] = []
    for name in os.listdir(directory):
        prefix, _, number = name.rpartition(".")
        if prefix not in prefixes or not number.isdecimal():
            continue
        pid = int(number)
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        with open(descriptor, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                time, _, text = line.partition(" ")
                lines.append((time, pid, text))
    lines.sort(key=lambda line: line[0])
    return lines


def parse(
    lines: Sequence[tuple[str, int, str]], recorded: Sequence[Recorded], *, base: str = "/", names: bool = False
) -> Trace:
    """The Trace of the given lines, `where` and `seconds` left at "outside" and 0.

    `base` is the observed root as strace's own root names it, stripped from what strace resolved.
    `names` says that strace was told to show every system call.
    """
    state = _State(base="" if base == "/" else base)
    skip = {item.pid: item.skip for item in recorded}
    for item in recorded:
        state.places[item.pid] = _Place(item.directory)
    for _, pid, text in lines:
        name, _, rest = text.partition("(")
        if pid in skip:
            if name == "execve" and rest.endswith(" = 0\n"):
                skip[pid] -= 1
                if skip[pid] < 0:
                    del skip[pid]
            if pid in skip:
                continue
        place = state.places.get(pid)
        if place is None:
            place = state.places[pid] = _Place(recorded[0].directory)
        if rest.endswith(" ...>\n"):
            if (changed := CHANGED.search(rest)) is not None:
                # A thread's execve succeeded and goes on as its process (ptrace(2), "execve(2) under ptrace").
                leader = int(changed[1])
                _exec(state, leader, state.places.get(leader, place), name, f"{rest[: changed.start()]}) = 0\n")
            if NAME.match(name):
                state.names.add(name)
            continue
        entry = _CALLS.get(name)
        if entry is not None:
            _paths(state, pid, place, name, entry, rest)
        elif (handler := _HANDLERS.get(name)) is not None:
            handler(state, pid, place, name, rest)
        elif not NAME.match(name):
            continue
        state.names.add(name)
    return Trace(
        where="outside",
        accesses=tuple(state.accesses),
        executions=tuple(state.executions),
        sockets=tuple(state.sockets),
        uids=tuple(sorted(state.ids["uid"])),
        gids=tuple(sorted(state.ids["gid"])),
        syscalls=tuple(sorted(state.names)) if names else (),
        calls=calls_seen(lines, recorded) if names else (),
    )


def _relative(text: str, number: str = "AT_FDCWD") -> bool:
    """Whether a path argument is relative to the working directory."""
    return number == "AT_FDCWD" and not text.startswith("/")


def _paths(state: _State, pid: int, place: _Place, name: str, entry: tuple[Call, re.Pattern[str]], rest: str) -> None:
    call, pattern = entry
    if ', "",' in rest and "AT_EMPTY_PATH" in rest:
        return
    match = pattern.match(rest)
    if match is None or (result := result_of(rest, match.end())) is None:
        return
    error = result[1]
    found: list[str | None] = []
    relative = set[int]()
    groups = iter(match.groups())
    for kind in call.layout:
        if kind == "_":
            next(groups), next(groups)
            continue
        if kind == "f":
            next(groups)
            path = next(groups)
            named = path is not None and path.startswith("/") and not path.startswith("/memfd:")
            found.append(state.inside(unescape(path)) if named else None)
            continue
        directory: str | None = place.cwd
        number = "AT_FDCWD"
        if kind == "d":
            number = next(groups)
            directory = state.directory(place, number, next(groups))
        text = next(groups)
        if text is None or (text == "" and kind == "d") or (directory is None and not text.startswith("/")):
            found.append(None)
        else:
            if _relative(text, number):
                relative.add(len(found))
            found.append(state.absolute(place, text, directory))
    mode = uid = gid = None
    if name in PERMISSIONS and (numbers := MODE.match(rest, match.end())):
        mode = int(numbers[1], 8)
    elif name in OWNERS and (numbers := IDS.match(rest, match.end())):
        uid, gid = int(numbers[1]), int(numbers[2])
        if not error:
            state.ids["uid"].update({uid} - {-1})
            state.ids["gid"].update({gid} - {-1})
    for index, (operation, path) in enumerate(zip(call.operations, found, strict=True)):
        if operation is not None and path is not None and not (error and index in call.on_success):
            state.add(pid, operation, path, error, mode=mode, uid=uid, gid=gid, relative=index in relative)
    if not error and found[0] is not None:
        if name == "chdir":
            place.cwd = found[0]
        elif name == "chroot":
            place.root = found[0].rstrip("/")


def _open(state: _State, pid: int, place: _Place, name: str, rest: str) -> None:
    match = (OPENAT if name.startswith("openat") else OPEN).match(rest)
    if match is None or (result := result_of(rest, match.end())) is None:
        return
    *directory, text = match.groups()
    above = state.directory(place, directory[0], directory[1]) if directory else place.cwd
    if text is None or (above is None and not text.startswith("/")):
        return
    path = state.absolute(place, text, above)
    found = FLAGS.match(rest, match.end())
    flags = found[1].split("|") if found else []
    operation: Operation = "read"
    mode = None
    if name == "creat":
        operation = "create"
        mode = int(flags[0], 8) if flags else None
    elif any(flag in flags for flag in CREATING):
        operation = "create"
        mode = int(found[2], 8) if found and found[2] else None
    elif "O_PATH" in flags:
        operation = "stat"
    elif "O_TRUNC" in flags:
        operation = "truncate"
    elif "O_WRONLY" in flags or "O_RDWR" in flags:
        operation = "write"
    state.add(pid, operation, path, result[1], mode=mode, relative=_relative(text, *directory[:1]))


def _queue(state: _State, pid: int, place: _Place, name: str, rest: str) -> None:
    """A message queue, whose name has no slash, by the path that mq_overview(7) gives it."""
    match = OPEN.match(rest)
    if match is None or match[1] is None or (result := result_of(rest, match.end())) is None:
        return
    found = FLAGS.match(rest, match.end())
    made = found is not None and "O_CREAT" in found[1].split("|")
    state.add(pid, "create" if made else "write", f"/dev/mqueue/{unescape(match[1])}", result[1])


def _exec(state: _State, pid: int, place: _Place, name: str, rest: str) -> None:
    match = (OPENAT if name == "execveat" else OPEN).match(rest)
    end = rest.rfind(") = ")
    if match is None or end < 0 or (result := result_of(rest, end)) is None:
        return
    *directory, text = match.groups()
    above = state.directory(place, directory[0], directory[1]) if directory else place.cwd
    if text == "" and directory:
        # fexecve(3): the descriptor is the program.
        path = above
    elif text is None or (above is None and not text.startswith("/")):
        return
    else:
        path = state.absolute(place, text, above)
    if path is None:
        return
    state.add(pid, "exec", path, result[1], relative=bool(text) and _relative(text, *directory[:1]))
    if not result[1]:
        start = rest.find("[", match.end())
        arguments = tuple(unescape(item[1]) for item in STRINGS.finditer(rest, start, end)) if start > 0 else ()
        state.executions.append(
            Execution(pid=pid, program=path, arguments=arguments, parent=state.parents.get(pid, 0))
        )  # fmt: skip


def _clone(state: _State, pid: int, place: _Place, name: str, rest: str) -> None:
    result = result_of(rest, 0)
    if result is None or result[1]:
        return
    if name == "unshare":
        state.places[pid] = _Place(place.cwd, place.root)
        return
    child = int(result[0])
    flags = CLONE_FLAGS.search(rest)
    shared = flags is not None and "CLONE_FS" in flags[1].split("|")
    state.places[child] = place if shared else _Place(place.cwd, place.root)
    state.parents[child] = pid


def _fchdir(state: _State, pid: int, place: _Place, name: str, rest: str) -> None:
    match = re.match(DESCRIPTOR, rest)
    result = result_of(rest, 0)
    if match is None or result is None or match[2] is None:
        return
    path = state.inside(unescape(match[2]))
    state.add(pid, "chdir", path, result[1])
    if not result[1]:
        place.cwd = path


def _identity(state: _State, pid: int, place: _Place, name: str, rest: str) -> None:
    result = result_of(rest, 0)
    if result is None or result[1]:
        return
    numbers = rest[: rest.index(")")]
    if name.startswith("setgroups"):
        numbers = numbers.partition("[")[2]
    state.ids[IDENTITIES[name]].update({int(number) for number in NUMBER.findall(numbers)} - {-1})


def _socket(state: _State, pid: int, place: _Place, name: str, rest: str) -> None:
    end = rest.rfind(") = ")
    result = result_of(rest, end) if end >= 0 else None
    if result is None:
        return
    inode = SOCKET.match(rest)
    family, address, port = _address(state, place, rest)
    if family == "unspec":
        return
    if inode and name == "bind" and not result[1]:
        state.bound[inode[1]] = family, address, port
    error = result[1]
    if family == "unix" and address and not address.startswith("@"):
        state.add(pid, "bind" if name == "bind" else "connect", address, error)
    state.sockets.append(
        Socket(
            pid=pid, operation="bind" if name == "bind" else "connect", family=family, address=address, port=port,
            error=error,
        )
    )  # fmt: skip


def _address(state: _State, place: _Place, rest: str) -> tuple[str, str, int]:
    for family, pattern in ADDRESSES:
        found = pattern.search(rest)
        if found is None:
            continue
        if family != "unix":
            return family, found[2], int(found[1])
        return family, f"@{unescape(found[2])}" if found[1] else state.absolute(place, found[2]), 0
    other = FAMILY.search(rest)
    return (other[1].lower() if other else "unspec"), "", 0


def _listen(state: _State, pid: int, place: _Place, name: str, rest: str) -> None:
    inode = SOCKET.match(rest)
    result = result_of(rest, 0)
    if inode is None or result is None:
        return
    family, address, port = state.bound.get(inode[1], ("unknown", "", 0))
    state.sockets.append(
        Socket(pid=pid, operation="listen", family=family, address=address, port=port, error=result[1])
    )  # fmt: skip


_Handler = Callable[[_State, int, _Place, str, str], None]
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("open", "openat", "openat2", "creat"), _open),
    **dict.fromkeys(("execve", "execveat"), _exec),
    **dict.fromkeys(("clone", "clone3", "fork", "vfork", "unshare"), _clone),
    **dict.fromkeys(("bind", "connect"), _socket),
    **dict.fromkeys(IDENTITIES, _identity),
    "fchdir": _fchdir,
    "mq_open": _queue,
    "listen": _listen,
}
