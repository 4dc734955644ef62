"""Which system calls were made and how they ended, from strace's lines. Tells refusals from other errors by errno only.

strace was told to show calls that it does not decode as hexadecimal numbers (`-e raw=`), so that arguments are numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ..kernel.capabilities import NAMES
from ..records.trace import CallSeen
from .recorded import Recorded
from .syntax import CLONE_FLAGS, NAME, STRINGS, unescape

__all__ = ["calls_seen"]

#: Errors by which a wall may have answered: a filter, a missing right, a place that is read-only, a limit.
_TELLING = frozenset({
    "EPERM", "EACCES", "ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "EROFS", "EMFILE", "ENOSPC", "EFBIG", "ENETUNREACH",
})  # fmt: skip
_TELLING_OF = {
    "EAGAIN": frozenset({"clone", "clone3", "fork", "vfork"}), "ENOMEM": frozenset({"mlock", "mlockall", "mmap"}),
}  # fmt: skip

#: Calls of which a filter or a capability check looks at arguments, and which of these; the others are noted as 0.
_JUDGED = {
    "socket": (0, 1, 2), "socketpair": (0, 1, 2), "ioctl": (1,), "personality": (0,), "prctl": (0, 1), "fcntl": (1,),
    "setsockopt": (1, 2), "prlimit64": (1,), "setrlimit": (0,), "shmctl": (1,), "clone": (0,), "mknod": (1,),
    "mknodat": (2,), "capset": (1,),
}  # fmt: skip

#: Calls that send SIGKILL, in strace's raw numbers: of threads the signal is the third, else the second.
_SENT = re.compile(
    r"(?:t?kill|pidfd_send_signal|rt_sigqueueinfo)\([^,]*, 0x9\b|(?:rt_)?tg(?:kill|sigqueueinfo)\([^,]*,[^,]*, 0x9\b"
)
_ERROR = re.compile(r"\) += -1 (E[A-Z0-9]+) ")
_PERMITTED = re.compile(r"permitted=([^,}]*)")
_NUMBERS = re.compile(r"(?:0x[0-9a-f]+|-?\d+)(?=[,)])")
_TYPE = re.compile(r", (?:S_IF([A-Z]+)\|)?0[0-7]+")
_TYPES = {"REG": 0o100000, "CHR": 0o020000, "BLK": 0o060000, "IFO": 0o010000, "SOCK": 0o140000}
# CLONE_NEW* of clone(2).
_NAMESPACES = {
    "CLONE_NEWNS": 0x00020000, "CLONE_NEWCGROUP": 0x02000000, "CLONE_NEWUTS": 0x04000000, "CLONE_NEWIPC": 0x08000000,
    "CLONE_NEWUSER": 0x10000000, "CLONE_NEWPID": 0x20000000, "CLONE_NEWNET": 0x40000000,
}  # fmt: skip


def calls_seen(lines: Sequence[tuple[str, int, str]], recorded: Sequence[Recorded]) -> tuple[CallSeen, ...]:
    """Every way in which calls were made, in the order of their first use; nothing of what set the service up.

    What the first process of a run does before it executes the service's program is left out.
    """
    waits = {item.pid: item.skip + 1 for item in recorded}
    counts: Counter[tuple[str, str, tuple[int, ...], str]] = Counter()
    for _, pid, text in lines:
        name, _, rest = text.partition("(")
        if pid in waits:
            if name == "execve" and rest.endswith(" = 0\n"):
                waits[pid] -= 1
                if not waits[pid]:
                    del waits[pid]
                    counts[name, "", (), ""] += 1
            continue
        if text.startswith("+++ killed by SIGSYS"):
            counts["", "SIGSYS", (), ""] += 1
        elif NAME.match(name):
            error = _error(name, rest)
            arguments = _arguments(name, rest) if name in _JUDGED else ()
            path = STRINGS.search(rest) if error else None
            counts[name, error, arguments, unescape(path[1]) if path else ""] += 1
    if _killed(lines, recorded):
        counts["", "SIGKILL", (), ""] = 1
    return tuple(
        CallSeen(name=name, error=error, arguments=arguments, path=path, count=count)
        for (name, error, arguments, path), count in counts.items()
    )


def _killed(lines: Sequence[tuple[str, int, str]], recorded: Sequence[Recorded]) -> bool:
    """Whether the kernel has ended a process by itself, as it does for want of memory, and none of them has.

    Those of a jail whose service has ended go the same way, and so do commands that took too long.
    """
    service, commands = recorded[0].pid, {item.pid for item in recorded[1:]}
    for _, pid, text in lines:
        if _SENT.match(text):
            return False
        if text.startswith("+++ killed by SIGKILL") and pid not in commands:
            return True
        if pid == service and text.startswith("+++ "):
            return False
    return False


def _error(name: str, rest: str) -> str:
    found = _ERROR.search(rest)
    if found is None:
        return ""
    error = found[1]
    return error if error in _TELLING or name in _TELLING_OF.get(error, ()) else ""


def _arguments(name: str, rest: str) -> tuple[int, ...]:
    if name == "clone":
        flags = CLONE_FLAGS.search(rest)
        return (sum(_NAMESPACES.get(flag, 0) for flag in flags[1].split("|")) if flags else 0,)
    if name == "capset":
        wanted = _PERMITTED.search(rest)
        bits = wanted[1].lower().split("|") if wanted else []
        return (0, sum(1 << number for number, one in enumerate(NAMES) if f"1<<cap_{one}" in bits))
    if name in ("mknod", "mknodat"):
        path = STRINGS.search(rest)
        found = _TYPE.match(rest, path.end()) if path else None
        kind = _TYPES.get(found[1] or "REG", 0) if found else 0
        return (0, kind) if name == "mknod" else (0, 0, kind)
    values = [int(number, 0) for number in _NUMBERS.findall(rest)[: _JUDGED[name][-1] + 1]]
    return tuple(value & 0xFFFFFFFF if place in _JUDGED[name] else 0 for place, value in enumerate(values))
