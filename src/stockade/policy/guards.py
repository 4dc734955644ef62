"""Which capability the kernel asks for where a call was refused. A table, after capabilities(7) and the calls' pages.

Whether a capability of a jail counts at all depends on where the kernel asks for it: in the user namespace that
owns the object (ns_capable), or in the host's (capable), which no process of a jail can have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..records.trace import CallSeen

__all__ = ["EXCESSIVE", "HOST_ONLY", "capability_for"]

#: Capabilities that the kernel asks for in the host's user namespace only.
HOST_ONLY = frozenset({
    "audit_control", "audit_read", "audit_write", "block_suspend", "ipc_lock", "lease", "linux_immutable", "mac_admin",
    "mac_override", "mknod", "sys_boot", "sys_module", "sys_nice", "sys_pacct", "sys_rawio", "sys_resource", "sys_time",
    "sys_tty_config", "syslog", "wake_alarm",
})  # fmt: skip

#: Capabilities that a jail could have and that are never proposed, with the reason.
EXCESSIVE = {
    "sys_admin": "`sys_admin` is most of what root can do; a service that needs it wants the walls `[\"vm\"]`",
    "sys_ptrace": "`sys_ptrace` is control over every process of the jail",
    "bpf": "`bpf` loads programs into the kernel",
    "perfmon": "`perfmon` looks into the kernel and into other processes",
}

_AF_PACKET, _SOCK_RAW, _SOCK_MASK = 17, 3, 0xF
_SOL_SOCKET = 1
_SO_MARK, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_BINDTODEVICE, _SO_PRIORITY, _SO_DEBUG = 36, 32, 33, 25, 12, 1
_IP_TRANSPARENT = {(0, 19), (41, 75)}  # level and option of ip(7) and ipv6(7)
_FS_IOC_SETFLAGS = 0x40086602
_SIOC = 0x8900  # the first of the ioctls that configure interfaces and routes (netdevice(7))
_F_SETLEASE = 1024
_PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_MM = 24, 28, 35


class _Guard(NamedTuple):
    capability: str
    calls: frozenset[str]
    errors: tuple[str, ...] = ("EPERM",)
    when: Callable[[tuple[int, ...]], bool] = lambda arguments: True


def _guard(
    capability: str, calls: str, *errors: str, when: Callable[[tuple[int, ...]], bool] = lambda arguments: True
) -> _Guard:
    return _Guard(capability, frozenset(calls.split()), errors or ("EPERM",), when)


#: The first that fits counts.
_GUARDS = (
    _guard("net_raw", "socket", when=lambda given: given[0] == _AF_PACKET or given[1] & _SOCK_MASK == _SOCK_RAW),
    _guard("net_raw", "setsockopt", when=lambda given: given[1:] == (_SOL_SOCKET, _SO_BINDTODEVICE)),
    _guard("net_admin", "setsockopt", when=lambda given: given[1:] in _IP_TRANSPARENT or given[1:] in {
        (_SOL_SOCKET, option) for option in (_SO_MARK, _SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_PRIORITY, _SO_DEBUG)
    }),
    _guard("net_admin", "ioctl", when=lambda given: given[1] & 0xFF00 == _SIOC),
    _guard("linux_immutable", "ioctl", when=lambda given: given[1] == _FS_IOC_SETFLAGS),
    _guard("net_bind_service", "bind", "EACCES"),
    _guard("setpcap", "prctl", when=lambda given: given[0] in (_PR_CAPBSET_DROP, _PR_SET_SECUREBITS)),
    _guard("sys_resource", "prctl", when=lambda given: given[0] == _PR_SET_MM),
    _guard("setpcap", "capset"),
    _guard("setuid", "setuid setreuid setresuid setfsuid"),
    _guard("setgid", "setgid setregid setresgid setfsgid setgroups"),
    _guard("chown", "chown fchown lchown fchownat"),
    _guard("fowner", "chmod fchmod fchmodat fchmodat2 utime utimes utimensat futimesat unlink unlinkat rename renameat "
                     "renameat2 setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr"),
    _guard("kill", "kill tkill tgkill pidfd_send_signal rt_sigqueueinfo rt_tgsigqueueinfo"),
    _guard("sys_chroot", "chroot"),
    _guard("mknod", "mknod mknodat"),
    _guard("sys_nice", "setpriority sched_setscheduler sched_setparam sched_setattr sched_setaffinity ioprio_set "
                       "mbind migrate_pages move_pages set_mempolicy", "EPERM", "EACCES"),
    _guard("sys_resource", "setrlimit prlimit64"),
    _guard("ipc_lock", "mlock mlock2 mlockall mmap", "EPERM", "ENOMEM", "EAGAIN"),
    _guard("ipc_lock", "shmctl", when=lambda given: given[1] in (11, 12)),  # SHM_LOCK, SHM_UNLOCK
    _guard("ipc_owner", "shmget shmat msgget msgsnd msgrcv semget semop semtimedop", "EACCES"),
    _guard("lease", "fcntl", "EACCES", when=lambda given: given[1] == _F_SETLEASE),
    _guard("sys_time", "settimeofday clock_settime adjtimex clock_adjtime"),
    _guard("sys_tty_config", "vhangup"),
    _guard("sys_admin", "sethostname setdomainname fanotify_init"),
    _guard("dac_read_search", "name_to_handle_at"),
)  # fmt: skip


def capability_for(seen: CallSeen) -> str:
    """The capability for want of which the kernel refused `seen`, "" where the refusal has another reason."""
    given = (*seen.arguments, *(0,) * (3 - len(seen.arguments)))
    for guard in _GUARDS:
        if seen.name in guard.calls and seen.error in guard.errors and guard.when(given):
            return guard.capability
    return ""
