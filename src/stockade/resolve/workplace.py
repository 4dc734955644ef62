"""The directories that a service writes to: which, and with what owner and mode they must be there at the start."""

from __future__ import annotations

import stat
from collections.abc import Mapping

from ..records.closure import Evidence, WorkDirectory
from .collect import Collector
from .history import History

__all__ = ["Workplaces"]


def _identity(collector: Collector) -> tuple[int, int]:
    """The uid and gid that the service starts with, as far as passwd(5) of the host and the spec say; else root's."""
    user = collector.spec.service.user
    uid, gid = (int(user), int(user)) if user.isdigit() else (0, 0)
    for line in (collector.host.text("/etc/passwd") or "").splitlines():
        fields = line.split(":")
        if len(fields) > 3 and user in fields[:1] and fields[2].isdigit() and fields[3].isdigit():
            uid, gid = int(fields[2]), int(fields[3])
    for account in collector.spec.accounts:
        if account.name == user and account.uid is not None:
            uid, gid = account.uid, account.uid
    return uid, gid


class Workplaces:
    """Adds work directories to a collector: on a tmpfs, or as state."""

    def __init__(self, collector: Collector, histories: Mapping[str, History]) -> None:
        self._collector, self._histories = collector, histories
        self._host, self._rules, self._spec = collector.host, collector.rules, collector.spec
        self._umask = int(collector.spec.service.umask, 8)
        self._identity = _identity(collector)

    def parent(self, path: str, evidence: Evidence) -> bool:
        """The directory in which the service writes `path`, seen from the start of the service."""
        directory = path.rpartition("/")[0] or "/"
        while self._made_anew(directory):
            directory = directory.rpartition("/")[0] or "/"
        return self.directory(directory, evidence, child=path)

    def directory(self, path: str, evidence: Evidence, *, child: str = "") -> bool:
        """`path` itself, made by the service or used by it. `child` is what it wants to write there.

        False when it is not for us to make: the spec says what it is, or it is read-only, or the service makes it.
        """
        if self._removed(path) or (not child and self._made_anew(path)) or self._collector.given(path):
            return False
        temporary = self._rules.temporary(path) and not self._collector.owns(path)
        if not temporary and path in self._rules.fixed:
            if child:
                message = f"the service writes into `{path}`, which is read-only in a jail: see `directories`"
                self._collector.advise("writes-fixed-directory", child, message)
            return False
        if self._collector.left_out(path) not in ("", "in a home directory"):
            return False
        mode, uid, gid = self._ownership(path)
        known = self._collector.work.get(path)
        evidences = tuple(sorted({evidence, *(known.evidence if known else ())}))
        self._collector.work[path] = WorkDirectory(path=path, mode=mode, uid=uid, gid=gid, evidence=evidences)
        above = path.rpartition("/")[0]
        if temporary and path not in self._rules.tmpfs_tops and above not in self._rules.tmpfs_tops:
            self.directory(above, Evidence(kind="parent", because=path))
        return True

    def _made_anew(self, path: str) -> bool:
        """The service made this directory itself where it may write, and will again. Below /run it is made for it."""
        history = self._histories.get(path)
        if history is None or not history.did("mkdir") or path in self._rules.tmpfs_tops:
            return False
        above = path.rpartition("/")[0] or "/"
        if self._rules.temporary(path):
            return not path.startswith(("/run/", "/var/run/")) or self._removed(path)
        return above not in self._rules.fixed

    def _removed(self, path: str) -> bool:
        history = self._histories.get(path)
        if history is None:
            return False
        changes = [event.operation for event in history.events if not event.error]
        made = [operation for operation in changes if operation in ("mkdir", "unlink")]
        return bool(made) and made[-1] == "unlink"

    def _ownership(self, path: str) -> tuple[int, int, int]:
        """Mode, uid and gid: as the service set them, else as the host has them, else the service's own."""
        status = self._host.walk(path).status
        if status is not None:
            mode, uid, gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        else:
            mode, (uid, gid) = 0o755, self._identity
        history = self._histories.get(path)
        for event in history.events if history is not None else ():
            if event.error:
                continue
            if event.operation == "mkdir" and event.mode is not None:
                mode = event.mode & ~self._umask & 0o7777
            elif event.operation == "chmod" and event.mode is not None:
                mode = event.mode & 0o7777
            elif event.operation == "chown":
                uid = event.uid if event.uid is not None and event.uid >= 0 else uid
                gid = event.gid if event.gid is not None and event.gid >= 0 else gid
        return mode, uid, gid
