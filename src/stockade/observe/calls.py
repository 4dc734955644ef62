"""How each traced system call is written in a trace, and what it does to paths. A table; parses nothing.

Layouts name the arguments in order, as man(2) has them: `p` a path relative to the current directory,
`d` a directory descriptor and a path, `f` a descriptor, `_` anything that is no path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..records.trace import Operation

__all__ = ["CALLS", "CREATING", "DECODED", "IDENTITIES", "OWNERS", "PERMISSIONS", "TRACED", "Call"]


class Call(NamedTuple):
    """Layout of the leading arguments, and the operation on each path; None where a path is of no interest.

    A path that only a success makes or removes counts when the call succeeded: `on_success`.
    """

    layout: str
    operations: tuple[Operation | None, ...]
    on_success: tuple[int, ...] = ()


def _each(names: str, layout: str, *operations: Operation | None, on_success: tuple[int, ...] = ()) -> dict[str, Call]:
    return dict.fromkeys(names.split(), Call(layout, operations, on_success))


#: Calls with paths, beside the open and exec families, which the parser knows by itself.
CALLS: Mapping[str, Call] = {
    **_each("stat lstat stat64 lstat64 oldstat oldlstat statfs statfs64 access", "p", "stat"),
    **_each("getxattr lgetxattr listxattr llistxattr acct swapon uselib", "p", "stat"),
    **_each("newfstatat fstatat64 statx faccessat faccessat2 name_to_handle_at", "d", "stat"),
    **_each("open_tree fspick mount_setattr listxattrat getxattrat", "d", "stat"),
    **_each("inotify_add_watch", "_p", "stat"),
    **_each("readlink", "p", "readlink"),
    **_each("readlinkat", "d", "readlink"),
    **_each("utime utimes setxattr lsetxattr removexattr lremovexattr", "p", "write"),
    **_each("futimesat utimensat utimensat_time64 setxattrat removexattrat", "d", "write"),
    **_each("truncate truncate64", "p", "truncate"),
    **_each("chdir", "p", "chdir"),
    **_each("chroot", "p", "chroot"),
    **_each("mkdir", "p", "mkdir"),
    **_each("mkdirat", "d", "mkdir"),
    **_each("mknod", "p", "mknod"),
    **_each("mknodat", "d", "mknod"),
    **_each("unlink rmdir", "p", "unlink"),
    **_each("unlinkat", "d", "unlink"),
    **_each("chmod", "p", "chmod"),
    **_each("fchmodat fchmodat2", "d", "chmod"),
    **_each("fchmod", "f", "chmod"),
    **_each("chown lchown chown32 lchown32", "p", "chown"),
    **_each("fchownat", "d", "chown"),
    **_each("fchown fchown32", "f", "chown"),
    **_each("getdents getdents64", "f", "list"),
    **_each("rename", "pp", "unlink", "create", on_success=(1,)),
    **_each("renameat renameat2", "dd", "unlink", "create", on_success=(1,)),
    **_each("link", "pp", "stat", "create"),
    **_each("linkat", "dd", "stat", "create"),
    **_each("symlink", "pp", None, "create"),
    **_each("symlinkat", "pd", None, "create"),
    **_each("mount", "pp", None, "mount"),
    **_each("umount umount2", "p", "mount"),
    **_each("pivot_root", "pp", "mount", None),
}

#: Calls whose next argument is a mode in octal.
PERMISSIONS = frozenset(
    name for name, call in CALLS.items() if call.operations[0] in ("mkdir", "chmod")
)  # fmt: skip

#: Calls whose next two arguments are a user and a group, -1 for unchanged.
OWNERS = frozenset(name for name, call in CALLS.items() if call.operations[0] == "chown")

#: Open flags that make a file where there is none (open(2)).
CREATING = ("O_CREAT", "O_TMPFILE")

#: Calls that change ids, and whether their numbers are of users or groups.
IDENTITIES: Mapping[str, str] = {
    name + suffix: kind
    for kind, names in (
        ("uid", ("setuid", "setreuid", "setresuid", "setfsuid")),
        ("gid", ("setgid", "setregid", "setresgid", "setfsgid", "setgroups")),
    )
    for name in names
    for suffix in ("", "32")
}

_PROCESSES = ("clone", "clone3", "fork", "vfork", "unshare")
_SOCKETS = ("bind", "connect", "listen")

#: The value for strace's `-e trace=`: what the parser understands. `?` skips what an architecture lacks.
TRACED = ",".join(
    ["%file", *(f"?{name}" for name in ("fchdir", "fchmod", "fchown", "getdents", "getdents64"))]
    + [f"?{name}" for name in (*_PROCESSES, *_SOCKETS, *IDENTITIES, "mq_open", "capset")]
)

#: Calls of which strace shall decode structures; the others' (stat's) cost time and tell nothing here.
DECODED = "execve,execveat,bind,connect,?setgroups,?setgroups32,?clone3,?openat2,?capset"
