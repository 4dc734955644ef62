"""Gather entries and their evidence: symlinks and parents included, what is left out refused. Decides no rule."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable

from .. import places
from ..records.closure import Advice, Entry, Evidence, FalsePositive, FileType, WorkDirectory
from ..records.spec import Spec
from .history import SHOWN
from .host import Host, Walk
from .pattern import Patterns
from .rules import rules

__all__ = ["Entries"]

_PRIVATE_KEY = re.compile(rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----")
_BUILT = "made by the build"
_KEY_LIMIT = 1 << 16  # private keys are small; larger files are not searched for one


class Entries:
    """The closure in the making. Paths may come as any program wrote them; what is kept is canonical."""

    def __init__(self, host: Host, spec: Spec, *, observed: bool) -> None:
        self.host, self.spec, self.rules, self.observed = host, spec, rules(), observed
        self.made = frozenset(host.walk(path).path for path in _made(spec))
        homes = [account.home for account in spec.accounts if account.home not in (None, "/")]
        self._given = tuple(f"{path}/" for path in (*spec.directories, *homes))
        self.false_positives: dict[tuple[str, str], FalsePositive] = {}
        self.advice: dict[tuple[str, str], Advice] = {}
        self.work: dict[str, WorkDirectory] = {}
        self._entries: dict[str, Entry] = {}
        self._evidence: dict[str, set[Evidence]] = {}
        self._exclude = Patterns(spec.files.exclude)
        self._named = Patterns(spec.files.include)
        self._own_places: tuple[str, ...] = ()
        self._own_homes: tuple[str, ...] = ()
        self._ours = tuple(f"{path}/" for path in (places.configuration(), places.state(), places.run()))
        self._keys: dict[str, bool] = {}
        self._left_out: dict[str, str] = {}

    # what is left out

    def allow_below(self, paths: Iterable[str]) -> None:
        """Paths in a home or in /var/tmp that belong to the service, so that the rules on these don't hold there.

        Of a home itself only what does not begin with a dot is the service's: the rest is its owner's.
        """
        for path in paths:
            if self.rules.in_home.covers(path) or path.startswith(SHOWN):
                self._own_places += (f"{path}/",)
            elif self.rules.in_home.covers(f"{path}/x"):
                self._own_homes += (f"{path}/",)
        self._left_out.clear()

    def owns(self, path: str) -> bool:
        """The canonical `path` is, or lies in, what was allowed."""
        return f"{path}/".startswith(self._own_places)

    def leads_to_own(self, path: str) -> bool:
        """What was allowed lies in the canonical `path`."""
        return any(own.startswith(f"{path}/") for own in self._own_places)

    def _in_home(self, path: str) -> bool:
        """The canonical `path` lies in a home and does not belong to the service."""
        if not self.rules.in_home.covers(path) or self.owns(path):
            return False
        return not any(path.startswith(home) and path[len(home)] != "." for home in self._own_homes)

    def left_out(self, path: str) -> str:
        """Why the canonical `path` stays outside: rule 13, `files.exclude` or what the build makes; else ""."""
        known = self._left_out.get(path)
        if known is None:
            known = self._left_out[path] = self._reason(path)
        return known

    def _reason(self, path: str) -> str:
        if self._exclude.covers(path):
            return "excluded by the spec"
        if path in self.rules.built or path in self.made:
            return _BUILT
        named = self._named.covers(path)
        if not named and f"{path}/".startswith(self._ours):
            return "a file of Stockade's own"
        group = self.rules.left_out(path)
        if group is not None and not (self._named.matches(path) if group.secret else named):
            return group.reason
        if named:
            return ""
        if self._in_home(path):
            return "in a home directory"
        return "a private key" if self._is_key(path) else ""

    def _is_key(self, path: str) -> bool:
        known = self._keys.get(path)
        if known is None:
            found = self.host.walk(path)
            known = False
            if found.status is not None and found.is_file and found.status.st_size <= _KEY_LIMIT:
                plain = path.startswith("/usr/") and not path.endswith((".pem", ".key"))
                known = not plain and _PRIVATE_KEY.search(self.host.data(path, limit=_KEY_LIMIT) or b"") is not None
            self._keys[path] = known
        return known

    def refuse(self, path: str, operation: str, error: str, reason: str) -> None:
        """Record something that is no need, once for each path and reason."""
        self.false_positives.setdefault(
            (path, reason), FalsePositive(path=path, operation=operation, error=error, reason=reason)
        )

    def given(self, path: str) -> bool:
        """The spec says what `path` is: it lies in one of its directories or in the home of an account."""
        return f"{path}/".startswith(self._given)

    def advise(self, code: str, path: str, message: str) -> None:
        """Record advice, once for each code and path."""
        self.advice.setdefault((code, path), Advice(code=code, path=path, message=message))

    # what comes in

    def add(self, path: str, evidence: Evidence, *, follow: bool = True, operation: str = "read") -> str | None:
        """Take in what `path` leads to, the symlinks on the way and the directories above.

        Returns the canonical path of what was taken; None, with a false positive, when it is left out or not there.
        """
        found = self.host.walk(path, follow=follow)
        if found.error == "ELOOP":
            self.refuse(path, operation, "ELOOP", "a loop of symlinks")
            return None
        outside = self._leads_to_tmpfs(found)
        for candidate in (*(link for link, _ in found.links), found.path):
            reason = self.left_out(candidate)
            if reason:
                if reason == _BUILT:
                    self._parents(candidate, Evidence(kind="parent", because=candidate))
                self.refuse(path, operation, "", f"left out: {reason}")
                return None
        if found.status is None:
            self._links(found, path)
            if not found.links:
                self.refuse(path, operation, found.error, "absent on the host too")
            return None
        if outside is not None:
            # The link leads onto a tmpfs (resolv.conf of systemd-resolved): its present content comes in instead.
            self._put(outside, found, evidence)
            return outside
        self._links(found, path)
        return self._put(found.path, found, evidence)

    def _leads_to_tmpfs(self, found: Walk) -> str | None:
        """The first symlink to the file from elsewhere that leads onto a tmpfs."""
        if not found.is_file or not self.rules.temporary(found.path):
            return None
        for link, _ in found.links:
            if not self.rules.temporary(link) and self.host.walk(link).path == found.path:
                return link if self.rules.temporary(_landing(self.host, link)) else None
        return None

    def _put(self, path: str, found: Walk, evidence: Evidence) -> str | None:
        status = found.status
        assert status is not None
        mode = status.st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            self._record(path, "file" if stat.S_ISREG(mode) else "directory", found.path, status, evidence)
        elif stat.S_ISLNK(mode):
            self._record(path, "symlink", found.path, status, evidence)
        else:
            self.advise("special-file", path, "a socket, pipe or device is made by its service, never copied")
            return None
        return path

    def _record(
        self, path: str, type_: FileType, source: str, status: os.stat_result, evidence: Evidence
    ) -> None:
        if path == "/":
            return
        if path not in self._entries:
            self._entries[path] = Entry(
                path=path,
                type=type_,
                source=self.host.outer(source),
                target=self.host.target(source) if type_ == "symlink" else None,
                mode=stat.S_IMODE(status.st_mode),
                uid=status.st_uid,
                gid=status.st_gid,
                size=status.st_size if type_ == "file" else 0,
            )
            self._evidence[path] = set()
            self._parents(path, Evidence(kind="parent", because=path))
        self._evidence[path].add(evidence)

    def _links(self, found: Walk, path: str) -> None:
        for link, _ in found.links:
            status, _ = self.host.status(link)
            if status is not None:
                because = found.path if found.status is not None else path
                self._record(link, "symlink", link, status, Evidence(kind="symlink", because=because))

    def _parents(self, path: str, evidence: Evidence) -> None:
        parent = path.rpartition("/")[0]
        if not parent or parent in self._entries:
            return
        found = self.host.walk(parent)
        self._links(found, path)
        if found.status is not None and found.is_directory:
            self._record(found.path, "directory", found.path, found.status, evidence)

    def way(self, path: str) -> None:
        """The symlinks on the way to what is not copied itself: /etc/mtab, /var/run."""
        found = self.host.walk(path)
        for link, _ in found.links:
            on_tmpfs = self.rules.temporary(link) and link not in self.rules.tmpfs_tops
            if not on_tmpfs and not link.startswith(("/proc/", "/sys/", "/dev/")):
                self.add(link, Evidence(kind="symlink", detail=f"leads to {found.path}"), follow=False)

    def link(self, path: str, target: str, evidence: Evidence) -> None:
        """A symlink that the spec wants, whatever the host has there."""
        parent, _, name = path.rstrip("/").rpartition("/")
        found = self.host.walk(parent or "/")
        self._links(found, path)
        place = f"{found.path.rstrip('/')}/{name}"
        self._entries[place] = Entry(path=place, type="symlink", target=target, mode=0o777)
        self._evidence.setdefault(place, set()).add(evidence)
        self._parents(place, Evidence(kind="parent", because=place))

    def parents(self, path: str, *, deepest: bool = False) -> None:
        """The directories above `path`, which itself is made by someone else; with `deepest` those that there are."""
        place = self.host.walk(path, follow=False).path
        while deepest and place and self.host.walk(place.rpartition("/")[0] or "/").status is None:
            place = place.rpartition("/")[0]
        self._parents(place, Evidence(kind="parent", because=path))

    def has(self, path: str) -> bool:
        """The canonical `path` is an entry."""
        return path in self._entries

    def entries(self) -> tuple[Entry, ...]:
        """All entries with their evidence, sorted by path."""
        return tuple(
            Entry(
                path=entry.path, type=entry.type, source=entry.source, target=entry.target, mode=entry.mode,
                uid=entry.uid, gid=entry.gid, size=entry.size, evidence=tuple(sorted(self._evidence[path])),
            )
            for path, entry in sorted(self._entries.items())
        )


def _landing(host: Host, link: str) -> str:
    """Where the symlink at the canonical `link` leads in one step, without looking whether it is there."""
    target = host.target(link)
    return os.path.normpath(target if target.startswith("/") else f"{link.rpartition('/')[0]}/{target}")


def _made(spec: Spec) -> frozenset[str]:
    """Paths that the spec has generated: contents and secrets."""
    paths = set(spec.files.content)
    for secret in spec.secrets.values():
        if secret.path is not None and not secret.client:
            paths |= {secret.path, f"{secret.path}.pub"} if secret.kind == "ssh-key" else {secret.path}
            paths |= {secret.key_path} if secret.key_path is not None else set()
    return frozenset(paths)
