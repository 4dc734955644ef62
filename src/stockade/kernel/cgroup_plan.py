"""From the limits of a spec to the control groups of one jail: an ordered list of operations. Carries out none.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/{memory,pids,blkio-controller}.rst,
Documentation/scheduler/sched-bwc.rst of the kernel; systemd-run(1).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import SpecError
from ..records.policy import CgroupLayout, CgroupOperation, CgroupPlan, NotLimited, size_bytes
from ..records.spec import Limits

__all__ = ["plan", "scope"]

_PERIOD_US = 100_000        # cpu.max's own default period
_LEAST_QUOTA_US = 1_000     # min_cfs_quota_period: less is EINVAL
_MOST_CPUS = 1 << 20        # the kernel's quota ends at 2^44 µs, far above
_LEAST_MEMORY = 1 << 20
_MOST_BYTES = 1 << 60       # far below 2^63, above any machine
_MOST_PROCESSES = 1 << 22   # PID_MAX_LIMIT: more is EINVAL
_OWN_PROCESSES = 1          # the jail's PID 1, which is not the service's
_DEFAULT_WEIGHT = 100
_DEFAULT_SHARES = 1024

# Limits of the spec by the controller that keeps them, per version.
_COMMON = {"memory": "memory", "processes": "pids", "cpus": "cpu", "cpu_weight": "cpu"}
_CONTROLLERS = {
    1: _COMMON | {"io_read": "blkio", "io_write": "blkio"},
    2: _COMMON | {"io_read": "io", "io_write": "io"},
}
_LIMITS = tuple(_CONTROLLERS[2])
# Version 2 tells CPU time without its cpu controller, which real-time processes can keep from being switched on.
_ACCOUNTING = {1: ("memory", "pids", "cpuacct"), 2: ("memory", "pids")}


def plan(
    limits: Limits, layout: CgroupLayout, name: str, *, disk: str | None = None, accounting: bool = True
) -> CgroupPlan:
    """The control groups of the jail `name`.

    `layout` is `cgroups.layout()`'s, `disk` the MAJOR:MINOR that io limits are for. With
    `accounting` the controllers that tell memory, CPU time and processes are joined even where
    nothing is limited. SpecError for a limit that no kernel takes or under which nothing can run.
    """
    _check(limits)
    wanted = [limit for limit in _LIMITS if getattr(limits, limit) is not None]
    if layout.version == 0:
        return CgroupPlan(not_limited=tuple(NotLimited(limit=limit, reason=layout.reason) for limit in wanted))
    of_limit = _CONTROLLERS[layout.version]
    possible = [
        limit for limit in wanted if of_limit[limit] in layout.controllers and (disk is not None or not _is_io(limit))
    ]
    used = {of_limit[limit] for limit in possible} | (set(_ACCOUNTING[layout.version]) if accounting else set())
    controllers = [controller for controller in sorted(layout.controllers) if controller in used]
    not_limited = tuple(_not_limited(layout, wanted, possible))
    if not controllers:
        return CgroupPlan(version=layout.version, not_limited=not_limited)
    if layout.version == 1:
        return _version_1(limits, layout, name, controllers, possible, disk or "", not_limited)
    return _version_2(limits, layout, name, controllers, possible, disk or "", not_limited)


def _is_io(limit: str) -> bool:
    return limit in ("io_read", "io_write")


def _check(limits: Limits) -> None:
    if limits.memory is not None and not _LEAST_MEMORY <= size_bytes(limits.memory) <= _MOST_BYTES:
        raise SpecError(
            f"`limits.memory` is `{limits.memory}`, and must be between 1M, in which a process can run, and 1048576T",
            hint="sizes are bytes, or have K, M, G or T: `memory = \"256M\"`",
        )
    for limit in ("io_read", "io_write"):
        size = getattr(limits, limit)
        if size is not None and not 1 <= size_bytes(size) <= _MOST_BYTES:
            raise SpecError(
                f"`limits.{limit}` is `{size}`, which is no rate", hint=f"bytes per second: `{limit} = \"10M\"`"
            )
    if limits.cpus is not None and not _LEAST_QUOTA_US / _PERIOD_US <= limits.cpus <= _MOST_CPUS:
        raise SpecError(
            f"`limits.cpus` is `{limits.cpus}`, and must be between 0.01, the kernel's least, and {_MOST_CPUS}",
            hint="`cpus = 1.5` is one and a half CPUs",
        )
    if limits.processes is not None and limits.processes > _MOST_PROCESSES - _OWN_PROCESSES:
        raise SpecError(
            f"`limits.processes` is `{limits.processes}`, more than the {_MOST_PROCESSES} that a kernel can have",
            hint="leave it out for no limit",
        )


def _not_limited(layout: CgroupLayout, wanted: list[str], possible: list[str]) -> Iterator[NotLimited]:
    for limit in wanted:
        if limit in possible:
            continue
        controller = _CONTROLLERS[layout.version][limit]
        if controller in layout.controllers:
            reason = "the jail's files are on no single disk"
        elif layout.manager == "user":
            reason = f"`user@.service` does not delegate the controller `{controller}` to this user"
        else:
            reason = f"the controller `{controller}` is not there"
        yield NotLimited(limit=limit, reason=reason)
    swap_file = "memory.swap.max" if layout.version == 2 else "memory.memsw.limit_in_bytes"
    if "memory" in possible and layout.swap and swap_file not in layout.files:
        yield NotLimited(limit="memory", reason="swap is not counted: the kernel runs without swap accounting")
    if layout.version == 1 and "io_write" in possible:
        yield NotLimited(limit="io_write", reason="version 1 holds back direct writes, not those of the page cache")


def _quota_us(cpus: float) -> int:
    return max(_LEAST_QUOTA_US, round(cpus * _PERIOD_US))


def _settings_1(limits: Limits, layout: CgroupLayout, possible: list[str], disk: str) -> Iterator[tuple[str, str, str]]:
    """Controller, file and value of each limit, for version 1."""
    if "memory" in possible and limits.memory is not None:
        size = str(size_bytes(limits.memory))
        yield "memory", "memory.limit_in_bytes", size
        # Memory and swap together, so no swap beyond; never below the limit before it.
        if "memory.memsw.limit_in_bytes" in layout.files:
            yield "memory", "memory.memsw.limit_in_bytes", size
    if "processes" in possible and limits.processes is not None:
        yield "pids", "pids.max", str(limits.processes + _OWN_PROCESSES)
    if "cpus" in possible and limits.cpus is not None:
        yield "cpu", "cpu.cfs_period_us", str(_PERIOD_US)
        yield "cpu", "cpu.cfs_quota_us", str(_quota_us(limits.cpus))
    if "cpu_weight" in possible and limits.cpu_weight is not None:
        shares = max(2, limits.cpu_weight * _DEFAULT_SHARES // _DEFAULT_WEIGHT)
        yield "cpu", "cpu.shares", str(shares)
    for limit, file in (("io_read", "read_bps_device"), ("io_write", "write_bps_device")):
        if limit in possible:
            yield "blkio", f"blkio.throttle.{file}", f"{disk} {size_bytes(getattr(limits, limit))}"


def _settings_2(limits: Limits, layout: CgroupLayout, possible: list[str], disk: str) -> Iterator[tuple[str, str]]:
    """File and value of each limit, for version 2."""
    if "memory" in possible and limits.memory is not None:
        yield "memory.max", str(size_bytes(limits.memory))
        if "memory.swap.max" in layout.files:
            yield "memory.swap.max", "0"
        # At its limit the whole jail ends, not one process of it picked by size.
        yield "memory.oom.group", "1"
    if "processes" in possible and limits.processes is not None:
        yield "pids.max", str(limits.processes + _OWN_PROCESSES)
    if "cpus" in possible and limits.cpus is not None:
        yield "cpu.max", f"{_quota_us(limits.cpus)} {_PERIOD_US}"
    if "cpu_weight" in possible and limits.cpu_weight is not None:
        yield "cpu.weight", str(limits.cpu_weight)
    rates = [
        f"{key}={size_bytes(getattr(limits, limit))}"
        for limit, key in (("io_read", "rbps"), ("io_write", "wbps"))
        if limit in possible
    ]
    if rates:
        yield "io.max", " ".join([disk, *rates])


def _version_1(
    limits: Limits, layout: CgroupLayout, name: str, controllers: list[str], possible: list[str], disk: str,
    not_limited: tuple[NotLimited, ...],
) -> CgroupPlan:  # fmt: skip
    # Beside each other and not below a common directory: two jails that start and end share nothing.
    directories = {controller: f"{layout.controllers[controller]}/stockade-{name}" for controller in controllers}
    places = list(dict.fromkeys(directories.values()))  # cpu and cpuacct are often one
    return CgroupPlan(
        version=1,
        make=(
            *(CgroupOperation(kind="directory", path=place) for place in places),
            *(
                CgroupOperation(kind="write", path=f"{directories[controller]}/{file}", value=value)
                for controller, file, value in _settings_1(limits, layout, possible, disk)
            ),
        ),
        join=tuple(f"{place}/cgroup.procs" for place in places),
        remove=tuple(CgroupOperation(kind="remove", path=place) for place in reversed(places)),
        directories=directories,
        not_limited=not_limited,
    )


def _version_2(
    limits: Limits, layout: CgroupLayout, name: str, controllers: list[str], possible: list[str], disk: str,
    not_limited: tuple[NotLimited, ...],
) -> CgroupPlan:  # fmt: skip
    make: list[CgroupOperation] = []
    wrapper: tuple[str, ...] = ()
    parent, jail = layout.base, f"{layout.base}/stockade-{name}"
    if layout.manager:
        wrapper = scope(layout, name)
        parent = f"{layout.base}/stockade-{name}.scope"
        jail = f"{parent}/jail"
        # A cgroup with processes of its own cannot hand controllers on ("no internal processes"). systemd
        # removes what is left of the scope with its last process, the supervisor.
        make += [
            CgroupOperation(kind="directory", path=f"{parent}/supervisor", kept=True),
            CgroupOperation(kind="write", path=f"{parent}/supervisor/cgroup.procs", value="0"),
        ]
    if layout.enable:
        enabled = " ".join(f"+{controller}" for controller in controllers)
        make.append(CgroupOperation(kind="write", path=f"{parent}/cgroup.subtree_control", value=enabled))
    make.append(CgroupOperation(kind="directory", path=jail))
    make += [
        CgroupOperation(kind="write", path=f"{jail}/{file}", value=value)
        for file, value in _settings_2(limits, layout, possible, disk)
    ]
    return CgroupPlan(
        version=2,
        wrapper=wrapper,
        make=tuple(make),
        join=(f"{jail}/cgroup.procs",),
        remove=(
            CgroupOperation(kind="kill", path=f"{jail}/cgroup.kill", value="1"),
            CgroupOperation(kind="remove", path=jail),
        ),
        directories=dict.fromkeys(sorted({*controllers, "cpu"}), jail),
        not_limited=not_limited,
    )


def scope(layout: CgroupLayout, name: str = "") -> tuple[str, ...]:
    """The command that puts itself into a scope of systemd's and becomes what follows it; () without a systemd.

    With a `name` the scope is that jail's and its cgroup is delegated.
    """
    if not layout.manager:
        return ()
    slice_name = layout.base.rpartition("/")[2]
    return (
        "systemd-run", *(("--user",) if layout.manager == "user" else ()), "--scope", "--quiet", "--collect",
        *((f"--unit=stockade-{name}.scope",) if name else ()), f"--slice={slice_name}",
        *(("--property=Delegate=yes",) if name else ()), "--",
    )  # fmt: skip
