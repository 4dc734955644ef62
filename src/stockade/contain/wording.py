"""A launch plan in words, one step a line, in the order in which the warden takes them. For a dry run."""

from __future__ import annotations

import shlex

from stockade.kernel.capabilities import names
from stockade.records.launch import (
    Bind,
    Filesystem,
    IdRange,
    LaunchPlan,
    LogSocket,
    MakeDirectory,
    MakeFile,
    MakeSymlink,
    MountStep,
    ReadOnly,
)

__all__ = ["describe"]


def describe(plan: LaunchPlan) -> list[str]:
    """What the launch does, line by line."""
    lines = [str(operation) for operation in plan.cgroup.make] if plan.cgroup is not None else []
    if plan.chroot:
        lines.append(f"change the root to {plan.root}")
    else:
        lines.append(f"new namespaces: {', '.join(plan.namespaces)}")
        lines.append(_ids(plan.ids, plan.inside_uid))
        lines += [f"set {file.removeprefix('/proc/sys/')} to {value}" for file, value in plan.sysctls]
        lines.append(f"mount {plan.root} on / read-only")
        lines += [_mount(step) for step in plan.mounts]
        lines.append(f"host name {plan.hostname}")
        if plan.loopback:
            lines.append("bring the loopback interface up")
    lines += [f"limit {limit.name} to {limit.soft}" for limit in plan.limits]
    groups = f", groups {' '.join(map(str, plan.groups))}" if plan.groups else ""
    lines.append(f"become uid {plan.uid}, gid {plan.gid}{groups}")
    lines.append(f"capabilities: {', '.join(names(plan.capabilities)) or 'none'}")
    lines.append("no new privileges")
    if plan.landlock is not None:
        lines.append(f"Landlock (ABI {plan.landlock.abi}) with {len(plan.landlock.rules)} rules")
    lines += [f"seccomp filter of {len(program) // 8} instructions" for program in plan.seccomp]
    lines.append(f"execute {shlex.join(plan.argv)}")
    if plan.restart != "no":
        lines.append(f"start anew when it ends{' with a failure' if plan.restart == 'on-failure' else ''}")
    return lines


def _ids(ids: IdRange, inside: int) -> str:
    if ids.kind == "single":
        return f"map uid {inside} to the caller's own, and no other"
    return f"map the ids 0 to {ids.count - 1} to {ids.first} to {ids.first + ids.count - 1}"


def _mount(step: MountStep) -> str:
    match step:
        case Bind():
            kind = "volume" if step.volume else "device" if step.device else "host path"
            return f"mount {kind} {step.source} on {step.target}, {'writable' if step.writable else 'read-only'}"
        case Filesystem():
            options = f" ({', '.join(step.options)})" if step.options else ""
            return f"mount a new {step.type} on {step.target}{options}"
        case MakeDirectory():
            return f"make directory {step.path}, mode {step.mode:04o}, owner {step.uid}:{step.gid}"
        case MakeFile():
            return f"make file {step.path}"
        case MakeSymlink():
            return f"make symlink {step.path} to {step.target}"
        case ReadOnly():
            return f"make {step.path} read-only"
        case LogSocket():
            return f"make the log socket {step.path}"
