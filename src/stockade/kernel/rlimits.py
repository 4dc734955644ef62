"""Resource limits of a jail's processes from the limits of its spec. Sets none.

Source: getrlimit(2), core(5) and fs/coredump.c.
"""

from __future__ import annotations

import resource

from ..records.policy import ResourceLimit, size_bytes
from ..records.spec import Limits

__all__ = ["rlimits"]

# A dump needs room for a page, so no file is written; and the kernel runs no `|program` of core_pattern
# for a process whose limit is exactly 1, while 0 would not stop it from running one on the host.
_NO_CORE = 1


def rlimits(limits: Limits, *, processes: bool = False) -> tuple[ResourceLimit, ...]:
    """Limits for setrlimit(2), soft and hard alike, sorted by name.

    `processes` asks for RLIMIT_NPROC, the fallback where no pids controller limits the jail: it counts the
    processes of the service's user alone, and root inside is not bound by it. Core dumps are always off: they would
    be handled by the host's core_pattern.
    """
    values = [("core", resource.RLIMIT_CORE, _NO_CORE)]
    if limits.file_size is not None:
        values.append(("fsize", resource.RLIMIT_FSIZE, size_bytes(limits.file_size)))
    if limits.open_files is not None:
        values.append(("nofile", resource.RLIMIT_NOFILE, limits.open_files))
    if processes and limits.processes is not None:
        values.append(("nproc", resource.RLIMIT_NPROC, limits.processes))
    return tuple(ResourceLimit(name=name, resource=number, soft=value, hard=value) for name, number, value in values)
