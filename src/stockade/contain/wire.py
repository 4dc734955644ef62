"""The warden's plan format: op numbers and the packing of records. Imports nothing: it is on the fast path.

The format and the meaning of each number stand in warden/plan.h, which a test compares with this table.
"""

from __future__ import annotations

from sys import byteorder

MAGIC = b"STKPLAN\n"
VERSION = 1

NAMESPACES = 1
MAP = 2
MAP_WAY = 3
MAP_HELPERS = 4
HOSTNAME = 5
LOOPBACK = 6
RLIMIT = 7
IDS = 8
GROUPS = 9
CAPABILITIES = 10
UMASK = 11
DIRECTORY = 12
ARGV = 13
ENV = 14
FORKS = 15
LIFELINE = 16
TERMINAL = 17
GATE = 18
STATUS = 19
STATE = 20
LOG = 21
PASS = 22
CHROOT = 23
DETACH = 24
LEASH = 25
ON_FAILURE = 26
ENTER = 27
BASE = 28
EPHEMERAL = 29
CGROUP_DIR = 30
WRITE = 31
CGROUP_JOIN = 32
REMOVE = 33
HELPER = 34
SYSCTL = 35
LANDLOCK = 36
LANDLOCK_PATH = 37
LANDLOCK_PORT = 38
SECCOMP = 39
ROOT = 40
BIND = 41
MOUNT = 42
MKDIR = 43
MKFILE = 44
SYMLINK = 45
READONLY = 46
LOG_SOCKET = 47
HELPER_FD = 48
RESTART = 49
AGAIN = 50
KEEP = 51
INSTANCE = 52

RESTART_ON_FAILURE, RESTART_ALWAYS = 1, 2
MAP_DIRECT, MAP_BY_HELPERS, MAP_SINGLE = range(3)
#: What opens a gate that brings descriptors: the head of a MESSAGE_GO (warden/util.h).
GO = (1).to_bytes(4, byteorder) + bytes(4)

TREE_OWN, TREE_IDMAP, TREE_SUBMOUNTS, TREE_OPTIONAL, TREE_VOLUME, TREE_SIZED = 1, 2, 4, 8, 16, 32


def _u32(number: int) -> bytes:
    return number.to_bytes(4, byteorder)


def _u64(number: int) -> bytes:
    return number.to_bytes(8, byteorder)


def record(op: int, *numbers: int, payload: bytes = b"") -> bytes:
    """One record with up to four numbers."""
    head = _u32(op) + _u32(len(payload)) + b"".join(map(_u64, numbers)).ljust(32, b"\0")
    return head + payload + bytes(-len(payload) % 8)


def text(op: int, *values: str | bytes, numbers: tuple[int, ...] = ()) -> bytes:
    """One record whose payload is these strings; ValueError for a NUL within one."""
    payload = b""
    for value in values:
        encoded = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        if b"\0" in encoded:
            raise ValueError(f"embedded null byte in {value!r}")
        payload += encoded + b"\0"
    return record(op, *numbers, payload=payload)


def plan(records: list[bytes]) -> bytes:
    """A whole plan, or a fragment of one."""
    return MAGIC + _u32(VERSION) + _u32(len(records)) + b"".join(records)
