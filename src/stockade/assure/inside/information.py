"""I1 to I4: what can be learnt of the host."""

from __future__ import annotations

import os

from .calls import attempt, opening
from .results import Result, held, reached, skipped, worst
from .world import World, found_marks

__all__ = ["PROBES"]

_SIZE_BUFFER = 10
_MASKED = ("keys", "timer_list", "config.gz", "cmdline", "interrupts", "sched_debug", "latency_stats")


def identity(_: World) -> Result:
    mountinfo = opening("/proc/self/mountinfo", read=1 << 16)[1].decode("utf-8", "replace")
    return reached("host name and ids are compared outside", nodename=os.uname().nodename,
                   mounts=[line.split(" ")[3:5] for line in mountinfo.splitlines()])  # fmt: skip


def kernel_log(world: World) -> Result:
    results = [attempt("syslog", world.call("syslog", _SIZE_BUFFER, None, 0))]
    for path in ("/dev/kmsg", "/proc/kmsg"):
        error, _ = opening(path)
        masked = not error and os.stat(path).st_rdev == os.makedev(1, 3)
        results.append(held(f"{path}: {error or 'masked'}") if error or masked else reached(f"{path} can be opened"))
    _, symbols = opening("/proc/kallsyms", read=4096)
    addresses = {line.split()[0] for line in symbols.splitlines()[:20] if len(line.split()) > 2}
    shown = any(address.strip(b"0") for address in addresses)
    results.append(reached("kallsyms shows addresses") if shown else held("kallsyms: zeros, masked or ENOENT"))
    return worst(results)


def environment(_: World) -> Result:
    own = b"\0".join(key + b"=" + value for key, value in os.environb.items())
    marks = found_marks(own)
    if os.path.isdir("/proc/self"):
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                marks += found_marks(opening(f"/proc/{entry}/environ", read=1 << 16)[1])
    if marks:
        return reached("a secret of the launcher's environment is here", marks=sorted(set(marks)))
    return held("no secret of the launcher's environment is here")


def kernel_files(_: World) -> Result:
    if not os.path.isdir("/proc/self"):
        return held("there is no /proc: ENOENT")
    results = []
    for name in _MASKED:
        error, content = opening(f"/proc/{name}", read=64)
        if error:
            results.append(held(f"/proc/{name}: {error}"))
        elif content:
            results.append(reached(f"/proc/{name} can be read"))
        else:
            results.append(held(f"/proc/{name} is empty"))
    return worst(results) if results else skipped("no such file")


PROBES = {"I1": identity, "I2": kernel_log, "I3": environment, "I4": kernel_files}
