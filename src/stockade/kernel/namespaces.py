"""unshare(2), setns(2), sethostname(2), the loopback of a new network, and why a host refuses a namespace."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time
from pathlib import Path

from .libc import check, function

__all__ = [
    "CLONE_NEWIPC",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "CLONE_NEWUSER",
    "CLONE_NEWUTS",
    "loopback_address",
    "loopback_up",
    "reason",
    "refusal",
    "sethostname",
    "setns",
    "unshare",
]

# include/uapi/linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# include/uapi/linux/sockios.h and if.h
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_IFREQ = struct.Struct("16sh22x")

# include/uapi/linux/rtnetlink.h, netlink.h and if_addr.h
_NETLINK_ROUTE = 0
_RTM_NEWADDR = 20
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE = 0x1, 0x4, 0x400
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x2
_DISCARD = 9  # RFC 863; connect(2) of a datagram socket asks for the route and sends nothing
_ROUTE_TIMEOUT_S = 5.0
_POLL_S = 0.005

_unshare = function("unshare", ctypes.c_int)
_setns = function("setns", ctypes.c_int, ctypes.c_int)
_sethostname = function("sethostname", ctypes.c_char_p, ctypes.c_size_t)

#: Sysctl, the value that forbids an ordinary user's namespaces, and the cure.
_FORBIDDING = (
    ("user/max_user_namespaces", "0", "as root: `sysctl -w user.max_user_namespaces=15000`"),
    ("kernel/unprivileged_userns_clone", "0", "as root: `sysctl -w kernel.unprivileged_userns_clone=1`"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "as root: `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, "
        "or give the interpreter an AppArmor profile with `userns,`",
    ),
)

#: errno of unshare(2) and the cause that its page gives.
_CAUSES = {
    errno.ENOSPC: "a limit on the number of namespaces is reached (`/proc/sys/user/max_*_namespaces`)",
    errno.EINVAL: "the kernel was built without this kind of namespace",
    errno.ENOSYS: "the kernel was built without namespaces",
    errno.EPERM: "a container or a security module around this process forbids it; run outside of it, or as root",
    errno.EUSERS: "user namespaces are nested too deeply",
}


def unshare(flags: int) -> None:
    """unshare(2)."""
    check(_unshare(flags), "unshare")


def setns(descriptor: int, kind: int = 0) -> None:
    """setns(2): join the namespace behind `descriptor`, which must be of `kind` unless that is 0."""
    check(_setns(descriptor, kind), "setns")


def sethostname(name: str) -> None:
    """sethostname(2)."""
    data = name.encode()
    check(_sethostname(data, len(data)), "sethostname")


def loopback_up() -> None:
    """Set the interface `lo` of the current network namespace up, as netdevice(7) says."""
    import socket  # it takes longer than all else here, and only new networks need it

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
        answer = fcntl.ioctl(link, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        _, flags = _IFREQ.unpack(answer)
        fcntl.ioctl(link, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))


def loopback_address(address: str) -> None:
    """Give the interface `lo` of the current network namespace one more numeric address, as rtnetlink(7) says.

    Returns once it can be reached; TimeoutError where that takes longer than five seconds.
    """
    import socket

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    body = struct.pack("=BBBBI", family, 8 * len(packed), _IFA_F_NODAD, 0, socket.if_nametoindex("lo"))
    for kind in (_IFA_ADDRESS, _IFA_LOCAL):
        body += struct.pack("=HH", 4 + len(packed), kind) + packed
    head = struct.pack("=IHHII", 16 + len(body), _RTM_NEWADDR, _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_CREATE, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as link:
        link.send(head + body)
        answer = link.recv(4096)
    code = -struct.unpack_from("=i", answer, 16)[0]  # struct nlmsgerr behind the header; 0 acknowledges
    if code:
        raise OSError(code, os.strerror(code), address)
    _await_route(family, address)


def _await_route(family: int, address: str) -> None:
    """The kernel makes the route to an address of IPv6 a moment later."""
    import socket

    deadline = time.monotonic() + _ROUTE_TIMEOUT_S
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        while asking.connect_ex((address, _DISCARD)) != 0:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "no route comes to be", address)
            time.sleep(_POLL_S)


def reason(code: int) -> str:
    """Why a namespace was refused with the errno `code`, for a message; ENOSPC has nothing to do with a disk."""
    return "the limit on their number is reached" if code == errno.ENOSPC else os.strerror(code)


def refusal(code: int, *, proc_sys: Path = Path("/proc/sys")) -> str:
    """The cause or the cure of a namespace refused with the errno `code`, for a hint."""
    if os.geteuid() != 0:
        for name, value, cure in _FORBIDDING:
            try:
                found = (proc_sys / name).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if found == value:
                return cure
    return _CAUSES.get(code, os.strerror(code))
