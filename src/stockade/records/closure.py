"""Every file that a jail needs, each with the evidence for it."""

from __future__ import annotations

from typing import Literal

import msgspec

EvidenceKind = Literal[
    "access",       # the trace shows it
    "needed",       # DT_NEEDED of `because`
    "interpreter",  # PT_INTERP of `because`
    "shebang",      # `#!` line of `because`
    "dlopen",       # .note.dlopen of `because`
    "implied",      # an implied set; `detail` names it
    "include",      # an include directory of which all entries of one suffix were opened
    "symlink",      # lies on the path of `because`
    "parent",       # directory above `because`
    "spec",         # the spec names it
    "account",      # needed by an account that is kept
    "generated",    # made by Stockade: ld.so.cache, passwd, a secret, a configuration file
    "gap",          # found missing by a verify round; `detail` has the round and the access
]

FileType = Literal["file", "directory", "symlink"]


class Evidence(msgspec.Struct, frozen=True, kw_only=True, order=True, omit_defaults=True):
    """Why an entry is in the jail: a kind, a sentence, and the path of the entry that led to it."""

    kind: EvidenceKind
    detail: str = ""
    because: str = ""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One path of the future rootfs.

    `source` is the host path to copy from (usually equal to `path`), None for what is generated.
    `mode`, `uid` and `gid` are those of the host; the build decides what becomes of them.
    """

    path: str
    type: FileType
    source: str | None = None
    target: str | None = None
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    size: int = 0
    evidence: tuple[Evidence, ...] = ()


class FalsePositive(msgspec.Struct, frozen=True, kw_only=True):
    """An access that failed and is no need. `reason` is a fixed phrase, so reasons can be counted."""

    path: str
    operation: str
    error: str
    reason: str


class WorkDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that the service writes to or needs present at run time, with owner and mode."""

    path: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    evidence: tuple[Evidence, ...] = ()


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """Something reported, never copied: a socket of another process, state that wants a volume."""

    code: str
    path: str
    message: str


class Gap(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """An access that failed in the built jail and should not have: something is missing there.

    `error` is the errno name it failed with; `reason` says why it is no false positive. `round` is the verify
    round that showed it, counted from 1, 0 where that is not known.
    """

    path: str
    operation: str
    error: str
    reason: str
    round: int = 0


class Closure(msgspec.Struct, frozen=True, kw_only=True):
    """Every file needed, each with its evidence, and what is needed beside files."""

    entries: tuple[Entry, ...] = ()
    tmpfs: tuple[WorkDirectory, ...] = ()       # below /run, /tmp, /var/lock, /var/tmp …: made anew at each launch
    state: tuple[WorkDirectory, ...] = ()       # written elsewhere: wants a named volume
    devices: tuple[str, ...] = ()               # names below /dev
    proc: bool = False                          # /proc was used
    proc_subset: bool = True                    # pids only would do: nothing outside /proc/PID and /proc/self was used
    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()
    syslog: bool = False                        # /dev/log was connected to
    advice: tuple[Advice, ...] = ()
    false_positives: tuple[FalsePositive, ...] = ()
