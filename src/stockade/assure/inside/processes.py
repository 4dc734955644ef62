"""P1 to P8: processes outside."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from .calls import attempt, error_name, opening
from .results import Result, held, reached, skipped, worst
from .world import World, found_marks

__all__ = ["PROBES", "pid_descriptors", "read_memory", "signal_nothing", "trace"]

Probe = Callable[[World], Result]

_PTRACE_SEIZE, _PTRACE_DETACH, _PTRACE_INTERRUPT = 0x4206, 17, 0x4207
_RLIMIT_NOFILE = 7
_KINDS = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user")


class _Span(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def signal_nothing(world: World) -> Result:
    return attempt("kill with signal 0", world.call("kill", world.canary["pid"], 0))


def trace(world: World) -> Result:
    pid = world.canary["pid"]

    def undo(_: int) -> object:
        world.call("ptrace", _PTRACE_INTERRUPT, pid, 0, 0)
        os.waitpid(pid, 0x40000000)  # __WALL
        return world.call("ptrace", _PTRACE_DETACH, pid, 0, 0)

    return attempt("ptrace seize", world.call("ptrace", _PTRACE_SEIZE, pid, 0, 0), undo=undo)


def read_memory(world: World) -> Result:
    buffer = ctypes.create_string_buffer(world.canary["length"])
    local = _Span(ctypes.cast(buffer, ctypes.c_void_p), len(buffer))
    pid = world.canary["pid"]
    results = []
    for address in (world.canary["address"], 8):
        remote = _Span(address, len(buffer))
        value = world.call("process_vm_readv", pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        result = attempt("process_vm_readv", value, reach=("EFAULT",))
        if result["outcome"] == "reached":
            result["evidence"]["marks"] = found_marks(buffer.raw)
        results.append(result)
    return worst(results)


def files_of_processes(world: World) -> Result:
    if not os.path.isdir("/proc/self"):
        return held("there is no /proc: ENOENT")
    marks: list[str] = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            marks += found_marks(opening(f"/proc/{entry}/environ", read=1 << 16)[1])
    error = ""
    try:
        memory = os.open(f"/proc/{world.canary['pid']}/mem", os.O_RDONLY)
        marks += found_marks(os.pread(memory, world.canary["length"], world.canary["address"]))
        os.close(memory)
    except OSError as failure:
        error = error_name(failure.errno or 0)
    if marks:
        return reached("memory or environment of a process can be read", marks=marks)
    return held(f"mem and environ of the process outside: {error or 'not its own'}")


def pid_descriptors(world: World) -> Result:
    descriptor, error = world.call("pidfd_open", world.canary["pid"], 0)
    if error:
        return held(f"pidfd_open: {error}")
    copied, error = world.call("pidfd_getfd", descriptor, world.canary["descriptor"], 0)
    os.close(descriptor)
    if error:
        return reached(f"pidfd_open of a process outside; pidfd_getfd: {error}")
    with open(copied, "rb") as file:
        marks = found_marks(os.pread(file.fileno(), 4096, 0))
    return reached("pidfd_open and pidfd_getfd of a process outside", marks=marks)


def limits_and_cpus(world: World) -> Result:
    pid = world.canary["pid"]
    limit = (ctypes.c_uint64 * 2)()
    cpus = ctypes.create_string_buffer(128)
    results = [attempt("prlimit", world.call("prlimit64", pid, _RLIMIT_NOFILE, None, limit))]
    length, error = world.call("sched_getaffinity", pid, len(cpus), cpus)
    if error:
        results.append(held(f"sched_getaffinity: {error}"))
    else:
        results.append(attempt("sched_setaffinity", world.call("sched_setaffinity", pid, length, cpus)))
    return worst(results)


def join_namespaces(world: World) -> Result:
    results = []
    host = world.request["namespaces"]
    for path, kind in ((f"/proc/{pid}/ns/{kind}", kind) for pid in (1, world.canary["pid"]) for kind in _KINDS):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            results.append(held(f"open of {path}: {error_name(error.errno or 0)}"))
            continue
        is_hosts = os.fstat(descriptor).st_ino == host[kind]
        _, error_text = world.call("setns", descriptor, 0)
        os.close(descriptor)
        if error_text:
            results.append(held(f"setns to {path}: {error_text}"))
        elif is_hosts:
            results.append(reached(f"setns to the host's {kind} namespace"))
        else:
            results.append(held(f"{path} is the jail's own"))
    return worst(results)


def count_processes(world: World) -> Result:
    if not os.path.isdir("/proc/self"):
        return held("there is no /proc: ENOENT")
    pids = [entry for entry in os.listdir("/proc") if entry.isdecimal()]
    for pid in pids:
        _, name = opening(f"/proc/{pid}/comm", read=64)
        if name.strip().decode("ascii", "replace") == world.canary["comm"]:
            return reached(f"{len(pids)} processes are seen, the one outside among them")
    return held(f"{len(pids)} processes are seen, none from outside")


def low_pid(world: World) -> Result | None:
    """A number that the own namespace may have given out says nothing."""
    if world.canary["pid"] < world.request["lowest_pid"]:
        return skipped("the canary's process number is so low that one in the jail may have it")
    return None


def _guarded(probe: Probe) -> Probe:
    return lambda world: low_pid(world) or probe(world)


PROBES: dict[str, Probe] = {
    "P1": _guarded(signal_nothing),
    "P2": _guarded(trace),
    "P3": _guarded(read_memory),
    "P4": files_of_processes,
    "P5": _guarded(pid_descriptors),
    "P6": _guarded(limits_and_cpus),
    "P7": join_namespaces,
    "P8": count_processes,
}
