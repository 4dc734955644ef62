"""Turn what was observed into needs: the classification rules, one function for each kind of place."""

from __future__ import annotations

import os
import stat

from ..records.closure import Evidence
from ..records.trace import Access, Trace
from .collect import Collector, Observed
from .history import FRESH, WRITES, History, Programs, follows, histories
from .shebang import find_program, interpreters
from .workplace import Workplaces

__all__ = ["classify"]

_SYSLOG = ("/dev/log", "/run/systemd/journal/dev-log")
_CONTENT = ("read", "exec")
_REFUSED = ("EACCES", "EPERM", "ENXIO", "EROFS", "ENODEV")


def classify(trace: Trace, collector: Collector) -> Observed:
    """Put every need that `trace` shows into `collector`, and every other access into its false positives."""
    return _Classifier(trace, collector).run()


class _Classifier:
    def __init__(self, trace: Trace, collector: Collector) -> None:
        self.trace, self.collector, self.host = trace, collector, collector.host
        self.rules = collector.rules
        self.programs = Programs(trace)
        self.histories = histories(self.host, trace)
        self.work = Workplaces(collector, self.histories)
        self.observed = Observed()
        self.bound = {history.place for history in self.histories.values() if history.did("bind")}
        self.names = {
            os.path.basename(event.path)
            for history in self.histories.values()
            for event in history.events
            if not event.error and event.operation in _CONTENT
        }

    def run(self) -> Observed:
        self.sockets()
        for history in self.histories.values():
            if all(event.operation == "connect" for event in history.events):
                continue
            if _below(history.place, "/proc"):
                self.proc(history)
            elif _below(history.place, "/sys"):
                self.sys(history)
            elif _below(history.place, "/dev"):
                self.device(history)
            elif history.place.startswith(FRESH):
                self.fresh(history)
            elif not history.succeeded:
                self.failed(history)
            elif self.rules.temporary(history.place) and not self.collector.owns(history.place):
                self.temporary(history)
            elif self.rules.logs.covers(history.place):
                self.links(history)
                self.log(history)
            else:
                self.ordinary(history)
        self.include_directories()
        self.made_scripts()
        return self.observed

    def evidence(self, event: Access) -> Evidence:
        return Evidence(kind="access", detail=self.programs.tell(event))

    # rule 6: sockets of other processes

    def sockets(self) -> None:
        wanted = {
            (history.place, event.path, event.error)
            for history in self.histories.values()
            for event in history.events
            if event.operation == "connect"
        }
        for socket in self.trace.sockets:
            if socket.family == "unix" and socket.operation == "connect" and socket.address.startswith("/"):
                wanted.add((self.host.walk(socket.address).path, socket.address, socket.error))
        for place, path, error in sorted(wanted):
            if place in _SYSLOG or path in _SYSLOG:
                self.observed.syslog = True
            elif place in self.bound:
                continue
            elif error:
                self.collector.refuse(path, "connect", error, "a socket of another process")
            else:
                self.collector.advise("socket", path, self.rules.socket(path))

    # rule 3: the kernel's trees

    def proc(self, history: History) -> None:
        self.links(history)
        path = history.place
        if not history.succeeded:
            self.failed(history)
        elif self.rules.kernel_optional.covers(path):
            self.optional(history)
        else:
            self.observed.proc = True
            first = path.split("/")[2] if path.count("/") > 1 else "self"
            if not (first.isdigit() or first in ("self", "thread-self")):
                self.observed.proc_subset = False

    def optional(self, history: History) -> None:
        event = history.succeeded[0]
        reason = "kernel information that its reader does without"
        self.collector.refuse(history.place, event.operation, "", reason)

    def sys(self, history: History) -> None:
        self.links(history)
        if not history.succeeded:
            self.failed(history)
        elif self.rules.kernel_optional.covers(history.place):
            self.optional(history)
        elif any(event.operation in ("read", "list", "write") for event in history.succeeded):
            self.collector.advise("sysfs", "/sys", "something below `/sys` was read; a jail has none: see `mounts`")

    def device(self, history: History) -> None:
        path = history.place
        if not history.succeeded:
            self.failed(history)
            return
        if _below(path, "/dev/mqueue"):
            self.observed.devices.add("mqueue")
            return
        status, _ = self.host.status(path)
        if status is None or self.rules.private_devices.covers(path):
            return
        if stat.S_ISCHR(status.st_mode):
            self.observed.devices.add(path.removeprefix("/dev/"))
        elif stat.S_ISBLK(status.st_mode):
            self.collector.advise("block-device", path, "a disk of the host was opened; a jail is given none")

    def links(self, history: History) -> None:
        """Symlinks that lead to what is not copied, such as /etc/mtab and /var/run."""
        for path in history.paths:
            self.collector.way(path)

    # rules 1, 2 and 5: what failed

    def failed(self, history: History) -> None:
        event = history.events[0]
        path, reason = event.path, ""
        name = os.path.basename(path)
        found = self.host.walk(path)
        for attempt in history.events:
            if attempt.operation in ("create", "bind", "mkdir"):
                self.links(history)
                self.work.parent(history.place, self.evidence(attempt))
        if found.error == "ELOOP":
            reason = "a loop of symlinks"
        elif found.status is None and not _below(path, "/proc", "/sys", "/dev"):
            if name in self.names:
                reason = f"{'library' if '.so' in name else 'file'} found in another directory"
            else:
                reason = "absent on the host too"
        elif event.error in _REFUSED:
            reason = "refused on the host too"
        elif self.rules.temporary(history.place):
            if found.is_directory:
                self.links(history)
                self.work.directory(history.place, self.evidence(event))
                return
            reason = "a runtime file of another process"
        else:
            reason = "absent while observed"
        self.collector.refuse(path, event.operation, event.error, reason)

    # rule 3: directories that are made anew

    def fresh(self, history: History) -> None:
        """Below /tmp, where whatever the host has is none of the run's."""
        event = history.events[0]
        written = history.first(WRITES)
        if self.collector.has(history.place):
            return  # the spec names it
        if history.did("mkdir"):
            self.work.directory(history.place, self.evidence(event))
        elif written is not None:
            self.work.parent(history.place, self.evidence(written))
        else:
            reason = "gone after the run" if history.succeeded else "absent while observed"
            self.collector.refuse(event.path, event.operation, event.error, reason)

    def temporary(self, history: History) -> None:
        found = self.host.walk(history.place)
        event = history.succeeded[0]
        evidence = self.evidence(event)
        written = history.first(WRITES)
        if history.did("exec") and found.is_file:
            self.program(history)
        elif found.is_directory and written is None and self.collector.leads_to_own(history.place):
            self.take(history)
        elif found.is_file and written is None:
            self.runtime_file(history)
        elif history.did("mkdir") or found.is_directory:
            self.links(history)
            self.work.directory(history.place, evidence)
        elif written is not None:
            self.links(history)
            self.work.parent(history.place, self.evidence(written))

    def runtime_file(self, history: History) -> None:
        """A file that was only read there: it comes in only under a name elsewhere that leads to it."""
        aside = self.outside_link(history)
        if self.collector.has(history.place):
            return  # the spec names it
        if aside is None:
            message = "was read, and the jail's own copy of this directory starts empty: see `files.include`"
            self.collector.advise("runtime-file", history.place, message)
        else:
            self.collector.add(aside, self.evidence(history.succeeded[0]))

    def outside_link(self, history: History) -> str | None:
        """The name, if any, by which the file was reached from outside of the tmpfs."""
        for path in history.paths:
            if any(not self.rules.temporary(link) for link, _ in self.host.walk(path).links):
                return path
        return None

    def log(self, history: History) -> None:
        event = history.first(WRITES) or history.succeeded[0]
        if self.host.walk(history.place).is_directory or history.did("mkdir"):
            self.work.directory(history.place, self.evidence(event))
        else:
            self.work.parent(history.place, self.evidence(event))

    # rules 4, 7, 8 and 10: everything else

    def ordinary(self, history: History) -> None:
        found = self.host.walk(history.place, follow=any(map(follows, history.events)))
        if found.status is None:
            self.vanished(history)
        elif found.is_directory:
            self.take(history)
            changed = history.first(("chmod", "chown"))
            if changed is not None and history.place not in self.rules.fixed:
                self.work.directory(history.place, self.evidence(changed))
        elif found.is_link and (made := history.first(("create",))) is not None:
            self.collector.way(os.path.dirname(made.path))
            self.work.parent(history.place, self.evidence(made))
        elif found.is_file and history.did(*WRITES):
            self.written(history)
        else:
            self.take(history)

    def take(self, history: History) -> None:
        if history.did("exec"):
            self.program(history)
        for event in history.succeeded:
            follow = event.operation != "readlink"
            if event.operation not in ("exec", "connect"):
                self.collector.add(event.path, self.evidence(event), follow=follow, operation=event.operation)

    def program(self, history: History) -> None:
        for event in history.succeeded:
            if event.operation == "exec":
                self.collector.program(event.path, self.evidence(event), strict=False)

    def written(self, history: History) -> None:
        """A file of the host that the service wrote to: its state before, if it was read or had to be there."""
        first = history.first(WRITES)
        assert first is not None
        content = history.first((*_CONTENT, "write"))
        if content is not None and content.order <= first.order:
            if history.did("exec"):
                self.program(history)
            if not self.collector.has(history.place):
                message = (
                    "was read, then written: its present content is the start; of what lies beside it only what was "
                    "touched comes in, all of it by `files.include`"
                )
                self.collector.advise("state", history.place, message)
            self.collector.add(content.path, self.evidence(content), operation=content.operation)
        self.links(history)
        self.work.parent(history.place, self.evidence(first))

    def vanished(self, history: History) -> None:
        """Not on the host: made by the service, or seeded for the observation."""
        first = history.first(WRITES)
        event = history.succeeded[0]
        if history.place in self.collector.made:
            self.collector.parents(history.place)
        elif any(made.startswith(f"{history.place}/") for made in self.collector.made):
            self.collector.refuse(event.path, event.operation, "", "left out: made by the build")
        elif history.did("mkdir"):
            self.work.directory(history.place, self.evidence(event))
        elif first is not None:
            self.links(history)
            self.work.parent(history.place, self.evidence(first))
        else:
            given = self.collector.given(history.place)
            reason = "left out: made by the build" if given else "gone after the run"
            self.collector.refuse(event.path, event.operation, "", reason)

    # rule 9: include directories

    def include_directories(self) -> None:
        for history in list(self.histories.values()):
            if not history.did("list") or _below(history.place, "/proc", "/sys", "/dev"):
                continue
            groups: dict[str, list[str]] = {}
            for name in self.host.names(history.place):
                path = f"{history.place.rstrip('/')}/{name}"
                if not name.startswith(".") and self.host.walk(path).is_file:
                    groups.setdefault(os.path.splitext(name)[1], []).append(path)
            for suffix, paths in groups.items():
                if all(self.was_read(path) for path in paths):
                    detail = f"every `*{suffix}` of the directory was opened"
                    for path in paths:
                        evidence = Evidence(kind="include", detail=detail, because=history.place)
                        self.collector.add(path, evidence)

    def made_scripts(self) -> None:
        """Interpreters of scripts that the service makes for itself before it runs them."""
        for execution in self.trace.executions:
            names, line = interpreters(execution.line)
            for name in names:
                found = find_program(self.host, name, self.collector.path, directory=self.collector.directory)
                if found is not None:
                    detail = f"`{line}` of {execution.program}, which the service makes"
                    self.collector.program(found, Evidence(kind="shebang", detail=detail), strict=False)

    def was_read(self, path: str) -> bool:
        history = self.histories.get(self.host.walk(path).path)
        return history is not None and history.did("read")


def _below(path: str, *tops: str) -> bool:
    return any(path == top or path.startswith(f"{top}/") for top in tops)
