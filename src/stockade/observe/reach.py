"""Capabilities with which an observed service could reach the host, each with the way. A table."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["HOST_REACHING"]

#: Dropped from every set of what runs in a view. Names as in capabilities(7), without `cap_`.
HOST_REACHING: Mapping[str, str] = {
    "audit_control": "switches the host's audit off",
    "audit_read": "reads the host's audit log",
    "block_suspend": "keeps the host from suspending",
    "bpf": "loads programs into the kernel",
    "checkpoint_restore": "reads the memory maps of processes through /proc and sets ids of processes to come",
    "dac_read_search": "open_by_handle_at(2) opens any file of a file system by number, past every mount point",
    "linux_immutable": "sets attributes of which the file system keeps the owner from removing the file",
    "mac_admin": "changes the host's mandatory access control",
    "mac_override": "overrides the host's mandatory access control",
    "mknod": "makes the nodes of the host's disks and memory",
    "net_admin": "loads kernel modules by network interface name, and sets sysctls that all namespaces share",
    "perfmon": "measures the kernel and every process",
    "sys_admin": "mounts, joins namespaces, and most else",
    "sys_boot": "restarts the host, and loads another kernel",
    "sys_module": "loads kernel modules",
    "sys_pacct": "writes records of all processes into a file of choice",
    "sys_ptrace": "takes over the view's first process, which holds every capability",
    "sys_rawio": "reads and writes I/O ports and memory",
    "sys_time": "sets the host's clock",
    "syslog": "reads and clears the kernel's log, and shows kernel addresses",
    "wake_alarm": "wakes the host from suspension",
}
