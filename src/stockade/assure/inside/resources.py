"""R1 to R4: a little more of everything than is allowed. Only limits that the oracle made small are tried."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import signal
import time

from .calls import error_name
from .results import Result, held, reached, unlimited, worst
from .world import World

__all__ = ["PROBES"]

_MOST_PROCESSES = 256
_MOST_MEMORY = 512 << 20
_MOST_SPACE = 32 << 20
_MOST_DISK = 4 << 30       # what is only reserved there is not written
_MOST_INODES = 2048
_MOST_FILES = 4096
_STEP = 1 << 20
_BURN_S = 0.5


def processes(world: World) -> Result:
    limit = world.request["limits"]["processes"]
    if limit is None or limit > _MOST_PROCESSES:
        return unlimited("processes: no limit is set")
    reader, writer = os.pipe()
    children: list[int] = []
    refused = ""
    try:
        while len(children) < limit + 16 and not refused:
            try:
                pid = os.fork()
            except OSError as error:
                refused = error_name(error.errno or 0)
                break
            if pid == 0:
                os.close(writer)
                os.read(reader, 1)
                os._exit(0)
            children.append(pid)
    finally:
        os.close(writer)
        os.close(reader)
        for pid in children:
            os.waitpid(pid, 0)
    if refused and len(children) <= limit:
        return held(f"fork number {len(children) + 1} of a limit of {limit}: {refused}")
    return reached(f"{len(children)} processes with a limit of {limit}")


def memory(world: World) -> Result:
    limit = world.request["limits"]["memory"]
    if limit is None or limit > _MOST_MEMORY:
        return unlimited("memory: no limit is set")
    pid = os.fork()
    if pid == 0:
        try:
            kept = []
            for _ in range((limit + (64 << 20)) // _STEP):
                piece = mmap.mmap(-1, _STEP)
                for page in range(0, _STEP, mmap.PAGESIZE):
                    piece[page] = 1
                kept.append(piece)
        except (MemoryError, OSError):
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return held(f"killed at the limit of {limit >> 20} MB")
    if code == 1:
        return held(f"ENOMEM at the limit of {limit >> 20} MB")
    return reached(f"{(limit >> 20) + 64} MB were used with a limit of {limit >> 20} MB")


def space(world: World) -> Result:
    results = [unlimited(f"disk: the volume {path} has no limit") for path in world.request["volumes"]]
    if world.request["unknown_storage"]:
        results.append(unlimited("disk: no limit is set"))
    for path in world.request["tmpfs"]:
        results += [_bytes(path, _MOST_SPACE), _inodes(path)]
    for path in world.request["sized"]:
        results += [_bytes(path, _MOST_DISK), _inodes(path)]
    return worst(results) if results else held("nothing here can be written to")


def _bytes(path: str, most: int) -> Result:
    status = os.statvfs(path)
    size = status.f_blocks * status.f_frsize
    if not 0 < size <= most:
        return unlimited(f"disk: the file system at {path} has no limit")
    name = f"{path}/.stockade-space"
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return held(f"{path}: {error_name(error.errno or 0)}")
    try:
        os.posix_fallocate(descriptor, 0, size + mmap.PAGESIZE)
    except OSError as error:
        return held(f"{path}, bytes: {error_name(error.errno or 0)}")
    finally:
        os.close(descriptor)
        os.unlink(name)
    return reached(f"{path} took more than its size of {size} bytes")


def _inodes(path: str) -> Result:
    limit = os.statvfs(path).f_files
    if not 0 < limit <= _MOST_INODES:
        return unlimited(f"inodes: the file system at {path} has no limit")
    made = []
    try:
        for number in range(limit + 1):
            name = f"{path}/.stockade-{number}"
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            made.append(name)
    except OSError as error:
        return held(f"{path}, inodes: {error_name(error.errno or 0)}")
    finally:
        for name in made:
            os.unlink(name)
    return reached(f"{path} took more than its {limit} inodes")


def files_and_cpu(world: World) -> Result:
    return worst([_files(world), _cpu(world)])


def _files(world: World) -> Result:
    limit = world.request["limits"]["open_files"]
    if limit is None or limit > _MOST_FILES:
        return unlimited("open files: no limit of the jail's own is set")
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit + 16, limit + 16))
    made: list[int] = []
    try:
        for _ in range(limit + 1):
            made.append(os.dup(0))
    except OSError as error:
        return held(f"open files: {error_name(error.errno or 0)} at the limit of {limit}")
    finally:
        for descriptor in made:
            os.close(descriptor)
    return reached(f"{len(made)} more descriptors with a limit of {limit}")


def _cpu(world: World) -> Result:
    limit = world.request["limits"]["cpus"]
    if limit is None:
        return unlimited("cpu: no limit is set")
    start = time.monotonic()
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            while time.monotonic() - start < _BURN_S:
                pass
            os._exit(0)
        pids.append(pid)
    used = 0.0
    for pid in pids:
        _, _, usage = os.wait4(pid, 0)
        used += usage.ru_utime + usage.ru_stime
    share = used / (time.monotonic() - start)
    # A period's quota can be used at once at each end.
    if share <= limit * 1.5 + 0.1:
        return held(f"cpu: throttled to {share:.2f} of a limit of {limit}")
    return reached(f"{share:.2f} cpus were used with a limit of {limit}")


PROBES = {"R1": processes, "R2": memory, "R3": space, "R4": files_and_cpu}
