"""The state that a program really has after its exec, read in /proc from outside and compared with the policy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stockade.kernel import capabilities
from stockade.records.finding import Finding
from stockade.records.launch import Bind, Filesystem, LaunchPlan, ReadOnly

from .processes import joined

__all__ = ["compared", "differences"]

_SOURCE = "proc(5), against the compiled plan"
_KINDS = {"mount": "mnt"}
_LIMITS = {"core": "Max core file size", "fsize": "Max file size", "nofile": "Max open files", "nproc": "Max processes"}


def differences(
    plan: LaunchPlan, pid: int, *, descriptors: frozenset[int] = frozenset({0, 1, 2}), extra: tuple[str, ...] = ()
) -> tuple[Finding, ...]:
    """Every difference between `plan` and the process `pid` that was executed from it. OSError when it is gone.

    `descriptors` are those that it may have, `extra` mounts that were added to the plan.
    """
    opened, environ = _private(pid)
    return compared(
        plan, Path(f"/proc/{pid}"), Path("/proc/self"), opened=opened, environ=environ, descriptors=descriptors,
        extra=extra,
    )  # fmt: skip


def compared(
    plan: LaunchPlan, process: Path, beside: Path, *, opened: dict[int, str], environ: bytes,
    descriptors: frozenset[int] = frozenset({0, 1, 2}), extra: tuple[str, ...] = (),
) -> tuple[Finding, ...]:  # fmt: skip
    """The same from what stands in the directory `process`, which is one of /proc or a copy of it.

    `beside` is that of a process outside of the jail; `opened` are the open descriptors, `environ` the environment.
    """
    fields = _fields(process / "status")
    found: list[Finding] = []
    for check in (_ids, _rights):
        found += check(plan, fields)
    found += _descriptors(opened, descriptors)
    found += _environment(plan, environ)
    found += _limits(plan, process)
    if not plan.chroot:
        found += _namespaces(plan, process, beside)
        found += _mounts(plan, process, extra)
    return tuple(found)


def _finding(code: str, message: str, *, path: str = "") -> Finding:
    return Finding(
        code=code, severity="critical", path=path, message=message, source=_SOURCE,
        remedy="build the jail again; if it stays, report it: what runs is not what was compiled",
    )  # fmt: skip


def _fields(path: Path) -> dict[str, str]:
    lines = path.read_text(errors="replace").splitlines()
    return {key: rest.strip() for key, _, rest in (line.partition(":") for line in lines)}


def _outside(plan: LaunchPlan, number: int, *, group: bool) -> int:
    """An id of the jail as the host counts."""
    if plan.chroot:
        return number
    first = plan.ids.first_gid if group else plan.ids.first
    if plan.ids.kind == "single":
        return first
    return first + number


def _ids(plan: LaunchPlan, fields: dict[str, str]) -> Iterator[Finding]:
    for name, number, group in (("Uid", plan.uid, False), ("Gid", plan.gid, True)):
        expected = str(_outside(plan, number, group=group))
        if fields[name].split() != [expected] * 4:
            yield _finding("truth-ids", f"{name} is {fields[name].split()}, and the plan says {expected}")
    if plan.ids.kind == "single":
        return  # setgroups(2) is denied: what the caller has stays
    expected_groups = {str(_outside(plan, number, group=True)) for number in plan.groups}
    if set(fields["Groups"].split()) != expected_groups:
        seen = fields["Groups"].split()
        yield _finding("truth-groups", f"groups are {seen}, and the plan says {sorted(expected_groups)}")


def _rights(plan: LaunchPlan, fields: dict[str, str]) -> Iterator[Finding]:
    if plan.chroot:
        return
    granted = plan.capabilities
    carried = granted if plan.uid != 0 else 0
    expected = {"CapBnd": granted, "CapPrm": granted, "CapEff": granted, "CapInh": carried, "CapAmb": carried}
    for name, mask in expected.items():
        if capabilities.parse_mask(fields[name]) != mask:
            yield _finding("truth-capabilities", f"{name} is {fields[name]}, and the plan says {mask:016x}")
    if fields["NoNewPrivs"] != "1":
        yield _finding("truth-no-new-privs", "no_new_privs is not set")
    mode = "2" if plan.seccomp else "0"
    if fields["Seccomp"] != mode:
        yield _finding("truth-seccomp", f"the seccomp mode is {fields['Seccomp']}, and the plan says {mode}")
    count = fields.get("Seccomp_filters", str(len(plan.seccomp)))
    if int(count) < len(plan.seccomp):
        yield _finding("truth-seccomp", f"{count} seccomp filters are in force, and the plan has {len(plan.seccomp)}")


def _namespaces(plan: LaunchPlan, process: Path, beside: Path) -> Iterator[Finding]:
    for name in ("user", "mount", "pid", "ipc", "uts", "cgroup", "net"):
        kind = _KINDS.get(name, name)
        own = os.readlink(process / "ns" / kind) != os.readlink(beside / "ns" / kind)
        if own != (name in plan.namespaces):
            whose = "its own" if own else "the host's"
            yield _finding("truth-namespaces", f"the {name} namespace is {whose}, and the plan says otherwise")


def _private(pid: int) -> tuple[dict[int, str], bytes]:
    """Open descriptors and environment: only root and the process's own user may read them.

    An ordinary user may in the process's user namespace, whose owner the user is (user_namespaces(7)).
    """
    try:
        return _read_private(pid)
    except PermissionError:
        return joined(pid, _read_private, pid)


def _read_private(pid: int) -> tuple[dict[int, str], bytes]:
    process = Path(f"/proc/{pid}")
    opened = {int(name): os.readlink(process / "fd" / name) for name in os.listdir(process / "fd")}
    return opened, (process / "environ").read_bytes()


def _descriptors(found: dict[int, str], expected: frozenset[int]) -> Iterator[Finding]:
    for number in sorted(found.keys() - expected):
        yield _finding("truth-descriptors", f"descriptor {number} is open: `{found[number]}`", path=found[number])


def _environment(plan: LaunchPlan, environ: bytes) -> Iterator[Finding]:
    entries = [entry for entry in environ.split(b"\0") if entry]
    expected = {os.fsencode(f"{name}={value}") for name, value in plan.environment}
    for entry in entries:
        if entry not in expected:
            name = os.fsdecode(entry.partition(b"=")[0])
            yield _finding("truth-environment", f"the variable `{name}` is not the plan's")


def _limits(plan: LaunchPlan, process: Path) -> Iterator[Finding]:
    lines = (process / "limits").read_text(encoding="ascii").splitlines()
    for limit in plan.limits:
        title = _LIMITS.get(limit.name)
        line = next((line for line in lines if title and line.startswith(title)), None)
        if title is None or line is None:
            continue
        soft, hard = line[len(title) :].split()[:2]
        if (soft, hard) != (str(limit.soft), str(limit.hard)):
            yield _finding("truth-limits", f"the limit {limit.name} is {soft}, {hard}, and the plan says {limit.soft}")


def _mounts(plan: LaunchPlan, process: Path, extra: tuple[str, ...]) -> Iterator[Finding]:
    """What is mounted must be in the plan, and as read-only as it says; later mounts hide earlier ones."""
    planned: dict[str, bool] = {"/": False} | dict.fromkeys(extra, False)
    for step in plan.mounts:
        match step:
            case Bind() | Filesystem():
                planned[step.target] = step.writable
            case ReadOnly():
                planned[step.path] = False
            case _:
                pass
    below = tuple(f"{step.target}/" for step in plan.mounts if isinstance(step, Bind) and step.submounts)
    seen: set[str] = set()
    for line in (process / "mountinfo").read_text(errors="surrogateescape").splitlines():
        words = line.split(" ")
        target, options = words[4].replace("\\040", " ").replace("\\134", "\\"), words[5].split(",")
        seen.add(target)
        if target not in planned:
            if not target.startswith(below):
                yield _finding("truth-mounts", "something is mounted that is not in the plan", path=target)
            continue
        if not planned[target] and "ro" not in options:
            yield _finding("truth-mounts", "it is writable, and the plan says read-only", path=target)
    for step in plan.mounts:
        if isinstance(step, (Bind, Filesystem)) and not step.optional and step.target not in seen:
            yield _finding("truth-mounts", "the plan mounts something here, and nothing is", path=step.target)
