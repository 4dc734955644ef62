"""Landlock rulesets for the ABI that a kernel has. Restricts nobody: the launch carries a plan out.

Source: landlock(7) and Documentation/userspace-api/landlock.rst. A ruleset takes away, for the
process and what it starts, every right that it handles and no rule gives back.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable
from typing import Literal

import msgspec

from ..records.policy import LandlockPlan, LandlockPort, LandlockRule
from .libc import check, syscall

__all__ = ["Access", "Grant", "NEWEST_ABI", "abi", "ruleset"]

NEWEST_ABI = 7

# LANDLOCK_ACCESS_FS_* of include/uapi/linux/landlock.h.
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

BIND_TCP = 1 << 0  # LANDLOCK_ACCESS_NET_*
CONNECT_TCP = 1 << 1

SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0  # LANDLOCK_SCOPE_*; SCOPE_SIGNAL is never used, see `ruleset`

# The ABI that brought each right, in the order of the bits: what is not named came with the first.
_FS_SINCE = {REFER: 2, TRUNCATE: 3, IOCTL_DEV: 5}
_ALL_FS = (IOCTL_DEV << 1) - 1
_NET_SINCE = 4
_SCOPE_SINCE = 6

# The rights that a rule for something other than a directory may hold (EINVAL otherwise).
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

Access = Literal["read", "execute", "truncate", "write", "device"]

_RIGHTS: dict[Access, int] = {
    "read": READ_FILE | READ_DIR,
    "execute": READ_FILE | READ_DIR | EXECUTE,
    "truncate": TRUNCATE,
    # No MAKE_CHAR and no MAKE_BLOCK: a service makes no devices.
    "write": WRITE_FILE | TRUNCATE | REFER | REMOVE_DIR | REMOVE_FILE
    | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM,
    "device": READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV,
}  # fmt: skip

_LACKING = (
    (1, "file access is left to the mounts"),
    (2, "no file can be renamed or linked into another directory, even where both are writable"),
    (3, "truncating a file by its path is left to the mounts"),
    (4, "TCP ports are left to the network namespace"),
    (5, "ioctl on devices is left to the system call filter"),
    (6, "abstract Unix sockets are left to the network namespace"),
)

_CREATE_RULESET = 444  # landlock_create_ruleset, on every architecture
_VERSION = 1 << 0      # LANDLOCK_CREATE_RULESET_VERSION


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """Rights that are given back at and below one path, as the service sees it.

    `directory` tells what stands there when the launch opens it: a rule for anything else holds only
    the rights of files.
    """

    path: str
    access: tuple[Access, ...]
    directory: bool = True


def landlock_create_ruleset_version() -> int:
    """landlock_create_ruleset(NULL, 0, LANDLOCK_CREATE_RULESET_VERSION): the kernel's ABI; OSError without Landlock."""
    number = syscall(_CREATE_RULESET, ctypes.c_void_p(None), ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    return check(number, "landlock_create_ruleset")


def abi() -> int:
    """The Landlock ABI of the running kernel; 0 where it is not built in or not switched on at boot."""
    try:
        return landlock_create_ruleset_version()
    except OSError as failure:
        if failure.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def handled_fs(version: int) -> int:
    """Mask of the file rights that the ABI `version` can handle."""
    return _ALL_FS & ~sum(bit for bit, since in _FS_SINCE.items() if version < since)


def ruleset(
    version: int,
    grants: Iterable[Grant],
    *,
    bind: Iterable[int] | None = None,
    connect: Iterable[int] | None = None,
) -> LandlockPlan | None:
    """The ruleset for the ABI `version`, None for 0. A newer ABI than is known here is treated as the newest known.

    Every file right that the ABI has is handled. `bind` and `connect` are TCP ports (port 0 stands
    for those that the kernel chooses): given, no other port can be used; None leaves them alone. Abstract
    Unix sockets of processes outside are out of reach; signals are not scoped, as `exec` into a jail could not
    signal the service then: the pid namespace keeps them in. Rules for one path are joined.
    """
    if version <= 0:
        return None
    version = min(version, NEWEST_ABI)
    handled = handled_fs(version)
    rights: dict[str, int] = {}
    for grant in grants:
        given = 0
        for access in grant.access:
            given |= _RIGHTS[access]
        rights[grant.path] = rights.get(grant.path, 0) | given & handled & (_ALL_FS if grant.directory else _OF_FILES)
    handled_net, ports = _network(bind, connect) if version >= _NET_SINCE else (0, ())
    return LandlockPlan(
        abi=version,
        attribute_size=8 if version < _NET_SINCE else 16 if version < _SCOPE_SINCE else 24,
        handled_fs=handled,
        handled_net=handled_net,
        scoped=SCOPE_ABSTRACT_UNIX_SOCKET if version >= _SCOPE_SINCE else 0,
        rules=tuple(LandlockRule(path=path, access=access) for path, access in sorted(rights.items()) if access),
        ports=ports,
        lacking=lacking(version),
    )


def _network(bind: Iterable[int] | None, connect: Iterable[int] | None) -> tuple[int, tuple[LandlockPort, ...]]:
    handled = 0
    rights: dict[int, int] = {}
    for right, listed in ((BIND_TCP, bind), (CONNECT_TCP, connect)):
        if listed is None:
            continue
        handled |= right
        for port in listed:
            rights[port] = rights.get(port, 0) | right
    return handled, tuple(LandlockPort(port=port, access=access) for port, access in sorted(rights.items()))


def lacking(version: int) -> tuple[str, ...]:
    """What a later ABI than `version` restricts (or, for renames, allows) and this one does not, in words."""
    return tuple(words for since, words in _LACKING if version < since)
