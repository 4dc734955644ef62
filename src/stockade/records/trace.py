"""What one observed run touched: accesses, executions, sockets, ids and system calls."""

from __future__ import annotations

from typing import Literal

import msgspec

Operation = Literal[
    "read",      # opened for reading only
    "write",     # opened for writing, not created
    "create",    # opened with O_CREAT, or made by link, symlink, rename's new name
    "truncate",  # truncated by path or with O_TRUNC
    "stat",      # stat, access, statfs, getxattr: looked at without opening
    "readlink",
    "list",      # directory entries read
    "exec",
    "chdir",
    "chroot",
    "mkdir",
    "mknod",
    "unlink",    # unlink, rmdir, rename's old name
    "chmod",
    "chown",
    "bind",      # unix socket path
    "connect",   # unix socket path
    "mount",
]


class Access(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that a process did to one path.

    `path` is absolute, as seen from the observed root (a chroot of the service's own is already
    undone), not normalised through symlinks. `error` is an errno name ("ENOENT") or "" when the
    call succeeded. `order` counts accesses of the whole run: a lower one came first as far as the
    tracer can tell. `mode` is the permission argument of create, mkdir, mknod and chmod, None for a name that link,
    symlink or rename made; `uid` and `gid` are those of a chown, -1 where unchanged. `relative`: the process named it
    from its working directory.
    """

    path: str
    operation: Operation
    error: str = ""
    pid: int = 0
    order: int = 0
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    relative: bool = False


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """One successful execve. `program` is the path that was executed.

    `line` is the `#!` line of a script that the run made for itself, "" for every other program.
    """

    pid: int
    program: str
    arguments: tuple[str, ...] = ()
    parent: int = 0
    line: str = ""


class Socket(msgspec.Struct, frozen=True, kw_only=True):
    """One bind, connect or listen. `family` is "inet", "inet6", "unix", "netlink"…

    `address` is a numeric address, a socket path, or "@name" for an abstract one.
    """

    pid: int
    operation: Literal["bind", "connect", "listen"]
    family: str
    address: str = ""
    port: int = 0
    error: str = ""


class CallSeen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One way in which a system call was made, and how it ended.

    `error` is the errno name where that may tell of a refusal, "" for success and every other error. `arguments` are
    the leading ones as numbers, for calls of which walls look at the arguments, else (). `path` is the first path of a
    call with an `error`, as it was given. The call `""` with the error "SIGSYS" is one that ended its process; with
    "SIGKILL" it is whatever a process did that the kernel ended for want of memory.
    """

    name: str
    error: str = ""
    arguments: tuple[int, ...] = ()
    path: str = ""
    count: int = 1


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one observed run did. `where` tells the host's view from the built jail."""

    where: Literal["outside", "inside"]
    accesses: tuple[Access, ...] = ()
    executions: tuple[Execution, ...] = ()
    sockets: tuple[Socket, ...] = ()
    uids: tuple[int, ...] = ()      # ids switched to (setuid family) or given files to (chown family)
    gids: tuple[int, ...] = ()
    syscalls: tuple[str, ...] = ()  # names of all system calls seen, sorted
    calls: tuple[CallSeen, ...] = ()  # how they were made, where all of them were recorded
    seconds: float = 0.0
