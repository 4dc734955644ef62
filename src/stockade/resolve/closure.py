"""Put the closure together: what the spec names, what was observed, what that implies, what verify found missing."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ResolveError
from ..records.closure import Closure, Evidence, Gap
from ..records.spec import Spec
from .collect import Collector, Observed
from .history import FRESH, SHOWN
from .host import Host
from .implied import imply
from .pattern import is_glob
from .rules import rules
from .shebang import interpreters

if TYPE_CHECKING:
    from ..records.trace import Trace
    from .workplace import Workplaces

__all__ = ["require_command", "resolve"]


def resolve(trace: Trace | None, spec: Spec, *, gaps: Sequence[Gap] = (), root: str = "/") -> Closure:
    """Everything that the jail of `spec` needs from the host below `root`, each entry with its evidence.

    Without a trace the command and what it is linked with are followed, unobserved. `gaps` are what verify rounds
    found missing so far. Raises ResolveError and ElfError for what the spec names and that can't be followed.
    """
    host = Host(root)
    collector = Collector(host, spec, observed=trace is not None)
    collector.allow_below(_own_places(host, spec, trace))
    _named(collector)
    observed = Observed() if trace is None else _classified(trace, collector)
    touched: dict[str, bool] = {}
    for access in trace.accesses if trace is not None else ():
        touched[access.path] = touched.get(access.path, False) or not access.error
    if gaps:
        _gaps(collector, gaps, observed, touched)
    imply(collector, touched.items())
    _mount_points(collector)
    work = [directory for _, directory in sorted(collector.work.items())]
    anew = {found.path for found in work if rules().temporary(found.path) and not collector.owns(found.path)}
    return Closure(
        entries=collector.entries(),
        tmpfs=tuple(directory for directory in work if directory.path in anew),
        state=tuple(directory for directory in work if directory.path not in anew),
        devices=tuple(sorted(observed.devices)),
        proc=observed.proc,
        proc_subset=observed.proc_subset,
        uids=tuple(sorted(set(trace.uids))) if trace is not None else (),
        gids=tuple(sorted(set(trace.gids))) if trace is not None else (),
        syslog=observed.syslog,
        advice=tuple(advice for _, advice in sorted(collector.advice.items())),
        false_positives=tuple(positive for _, positive in sorted(collector.false_positives.items())),
    )


def _classified(trace: Trace, collector: Collector) -> Observed:
    from .classify import classify

    return classify(trace, collector)


def require_command(spec: Spec, *, root: str = "/") -> None:
    """Raise ResolveError or ElfError if the host below `root` cannot execute the command of `spec`, and tell why.

    The kernel says ENOENT for a missing interpreter of a script and kills what is no sound ELF file without a word.
    """
    collector = Collector(Host(root), spec, observed=False)
    command = spec.service.command[0]
    if command not in collector.made:
        collector.named_program(command, Evidence(kind="spec", detail="the command"), what="the command")


def _named(collector: Collector) -> None:
    """What the spec names: command, programs, files, links, shells."""
    spec = collector.spec
    command = spec.service.command
    if command[0] not in collector.made:
        evidence = Evidence(kind="spec", detail="the command")
        collector.named_program(command[0], evidence, what="the command")
    if not collector.observed:
        for argument in command[1:]:
            if argument.startswith("/") and collector.host.walk(argument).is_file:
                collector.add(argument, Evidence(kind="spec", detail="an argument of the command"))
    for name in spec.files.programs:
        evidence = Evidence(kind="spec", detail="a program in `files.programs`")
        collector.named_program(name, evidence, what="the program")
    for pattern in spec.files.include:
        if collector.host.walk(pattern).error == "ELOOP":
            raise ResolveError(
                f"`{pattern}` in `files.include` is a loop of symlinks",
                hint="mend the links, or name what they should lead to",
            )
        found = collector.include(pattern, "spec", f"`files.include` has {pattern}")
        if not found and not is_glob(pattern):
            raise ResolveError(
                f"`{pattern}` in `files.include` does not exist",
                hint="correct the path, or take it out of `files.include`",
            )
    for path, content in spec.files.content.items():
        programs, line = interpreters(content)
        for name in programs:
            collector.named_program(name, Evidence(kind="shebang", detail=line, because=path), what="the interpreter")
    for path, target in spec.files.links.items():
        collector.link(path, target, Evidence(kind="spec", detail="a link in `files.links`"))
    for account in spec.accounts:
        if account.shell is not None and collector.host.walk(account.shell).is_file:
            evidence = Evidence(kind="account", detail=f"the shell of `{account.name}`")
            collector.program(account.shell, evidence, strict=False)
    for path in (*spec.files.content, *collector.made, *sorted(rules().built)):
        collector.parents(path)
    if collector.host.walk(spec.service.directory).is_directory:
        collector.add(spec.service.directory, Evidence(kind="spec", detail="the working directory"))
    home = _home(collector.host, spec)
    if home and collector.host.walk(home).is_directory:
        collector.add(home, Evidence(kind="account", detail=f"the home of `{spec.service.user}`, empty"))


def _home(host: Host, spec: Spec) -> str:
    """The home of the service's user on the host (passwd(5)); "" for a person's, and where the spec gives one."""
    user = spec.service.user
    if any(account.name == user for account in spec.accounts):
        return ""
    try:
        with open(host.outer("/etc/passwd"), encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(":") for line in file]
    except FileNotFoundError:
        return ""
    home = next((line[5] for line in lines if len(line) > 5 and user in (line[0], line[2])), "")
    return "" if home == "/" or not home.startswith("/") or rules().in_home.covers(f"{home}/x") else home


def _gaps(collector: Collector, gaps: Sequence[Gap], observed: Observed, touched: dict[str, bool]) -> None:
    """Add what verify rounds found missing, and take away what was in the way.

    What can't be added is left as a false positive, so that it ends there.
    """
    from .workplace import Workplaces

    workplaces = Workplaces(collector, {})
    for gap in gaps:
        if gap.error == "EEXIST":
            for path in [path for path in collector.work if f"{path}/".startswith(f"{gap.path}/")]:
                del collector.work[path]
            continue
        round_ = f"round {gap.round}: " if gap.round else ""
        evidence = Evidence(kind="gap", detail=f"{round_}{gap.operation} failed with {gap.error}, {gap.reason}")
        touched[gap.path] = True
        if not _gap(collector, workplaces, gap, evidence, observed, touched):
            collector.refuse(gap.path, gap.operation, gap.error, "left out: nothing that could be added")


def _gap(
    collector: Collector,
    workplaces: Workplaces,
    gap: Gap,
    evidence: Evidence,
    observed: Observed,
    touched: dict[str, bool],
) -> bool:
    """Add what one gap asks for; False when there is nothing to add."""
    from .history import WRITES

    follow = gap.operation not in ("readlink", "unlink")
    found = collector.host.walk(gap.path, follow=follow)
    temporary = collector.rules.temporary(found.path)
    if gap.path.startswith("/dev/"):
        observed.devices.add(gap.path.removeprefix("/dev/"))
        return True
    if gap.operation in WRITES:
        collector.way(gap.path)
        made = workplaces.parent(found.path, evidence)
        if gap.operation != "write" or temporary or collector.rules.logs.covers(found.path):
            return made
    elif temporary and found.is_directory:
        return workplaces.directory(found.path, evidence)
    elif gap.operation == "exec":
        return collector.program(gap.path, evidence, strict=False) is not None
    real = collector.add(gap.path, evidence, follow=follow, operation=gap.operation)
    if real is not None and found.is_file:
        collector.loadable(gap.path, executable=False)
    if real is not None and found.is_directory:
        # A program that misses one directory soon asks for the next on its way: spare it a round for each.
        for path, succeeded in list(touched.items()):
            if not succeeded and path.startswith(f"{real}/"):
                collector.parents(path, deepest=True)
    return real is not None


def _mount_points(collector: Collector) -> None:
    """The directories on which tmpfs and volumes are mounted, and those above them."""
    for path in sorted(collector.work):
        place = path
        if collector.rules.temporary(path):
            tops = (top for top in collector.rules.tmpfs_tops if f"{path}/".startswith(f"{top}/"))
            place = next(tops, path)
        if place.startswith("/dev/") or collector.has(place):
            continue
        collector.add(place, Evidence(kind="parent", detail="a mount point"))


def _own_places(host: Host, spec: Spec, trace: Trace | None) -> tuple[str, ...]:
    """What holds the service in a home or in /var/tmp: its programs, what its command names, the links to these, the
    directories around them, and its working directory. Other places are among them too."""
    named = [execution.program for execution in trace.executions] if trace is not None else []
    named += [path for word in spec.service.command for path in (word, word.partition("=")[2]) if path]
    places = {host.walk(spec.service.directory).path}
    for path in named:
        where = os.path.join(spec.service.directory, path)
        found = host.walk(where)
        if found.status is None or os.path.normpath(where).startswith(FRESH):
            continue
        links = [link for link, _ in found.links]
        # A home is not the service's because a link lies in it; a virtual environment is.
        places |= {found.path, _around(found.path), *links, *filter(_within, map(_around, links))}
    return tuple(sorted(places))


def _around(path: str) -> str:
    """The directory of `path`, or that above where it is one for programs: what they come with lies beside it."""
    place = path.rpartition("/")[0]
    above = place.rpartition("/")[0]
    return above if _within(above) and re.search(r"/(?:bin|sbin|libexec)\Z", place) else place


def _within(path: str) -> bool:
    """Whether the directory lies in a home or in /var/tmp, and is not that itself."""
    return rules().in_home.covers(path) or path.startswith(SHOWN)
