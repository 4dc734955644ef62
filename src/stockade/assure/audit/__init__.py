"""Find what is wrong with the contents and the policy of a jail, or of any directory that is to be one. Static."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stockade.errors import NotFoundError, UsageError
from stockade.kernel.beneath import Root
from stockade.records.finding import Finding, Unchecked
from stockade.records.report import AuditReport

from . import files, secrets, stale
from .accounts import Accounts, find_user
from .baseline import Baseline
from .baseline import read as read_baseline
from .catalogue import Rule, rule, rules, scoring
from .ledger import Ledger, Proposal
from .libraries import Libraries
from .mending import described, mend
from .policy import policy
from .programs import program
from .seen import Mend, Seen
from .subject import Subject, of_directory, of_generation
from .tree import Node, mounts, open_regular, walk

__all__ = [
    "Baseline", "Proposal", "Rule", "Subject", "audit", "described", "examine", "find_user", "mend",
    "of_directory", "of_generation", "read_baseline", "rule", "rules",
]  # fmt: skip

_HEAD = 4096
_ELF = b"\x7fELF"
_EVERY = 5000
_SEVERITIES = ("critical", "high", "medium", "low")

Progress = Callable[[str], None]


def audit(subject: Subject, baseline: Baseline | None = None, *, progress: Progress | None = None) -> AuditReport:
    """Every finding of `subject`, judged by its spec's `files.reasons` and `baseline`.

    The caller has to have the rights over the tree's files; what cannot be read is a finding. Nothing is executed
    or changed, no device or FIFO is opened, and no path leads out of the tree. NotFoundError when there is no tree,
    UsageError when it is no directory. `progress` is told how far it is.
    """
    return examine(subject, baseline, progress=progress)[0]


def examine(
    subject: Subject, baseline: Baseline | None = None, *, progress: Progress | None = None
) -> tuple[AuditReport, tuple[Proposal, ...]]:
    """What `audit` gives, and the changes that would mend what is safe to mend; `mend` makes them."""
    began = time.monotonic()
    with _open(subject.root) as root:
        run = _Audit(subject, root, baseline or Baseline(), progress or (lambda text: None))
        run.all()
    return run.report(time.monotonic() - began), run.proposals()


def _open(path: Path) -> Root:
    """The tree's root; a symbolic link to it is followed, as the caller named it."""
    try:
        return Root.open(os.path.realpath(path))
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no directory `{path}`", hint="name the root of the tree to audit") from error
    except NotADirectoryError as error:
        raise UsageError(f"`{path}` is no directory", hint="name the root of the tree to audit") from error


class _Audit:
    def __init__(self, subject: Subject, root: Root, baseline: Baseline, progress: Progress) -> None:
        self.subject, self.root, self.progress = subject, root, progress
        self.ledger = Ledger(subject.reasons, baseline)
        self.unchecked: list[Unchecked] = []
        self.examined = 0
        self.accounts = Accounts()
        self.links = files.HardLinks()
        self.libraries = Libraries(root)
        self.lock = stale.Lock(subject) if subject.lock is not None else None
        self.copies: stale.Copies | None = None

    def all(self) -> None:
        """Walk the tree once, then check what only the whole of it tells."""
        take, subject = self.ledger.take, self.subject
        if self.lock is None:
            database = stale.status(self.root)
            if database is None:
                self.copies = stale.Copies(subject)
            else:
                self._take_or_note(stale.packages(self.root, database, subject))
            self._note_what_a_lock_would_tell()
        found = mounts(self.root.descriptor)
        take(files.mounted(found))
        for node in walk(self.root.descriptor, found):
            if isinstance(node, Seen):
                take((node,))
            else:
                self._entry(node)
        self.progress("looking at libraries and accounts")
        take(self.links.outside())
        take(self.libraries.check(subject))
        take(self.accounts.check(self.root, subject))
        if self.lock is not None:
            take(self.lock.missing())
            take(self.lock.stale())
            self._take_or_note(policy(subject))
        if subject.only_id is not None:
            reason = "the jail's user has one id: all files are its, and mounted read-only"
            self.unchecked.append(Unchecked(code="NOT-ROOT", reason=reason))
        self.ledger.close()

    def _take_or_note(self, results: Iterator[Seen | Unchecked]) -> None:
        for result in results:
            if isinstance(result, Seen):
                self.ledger.take((result,))
            else:
                self.unchecked.append(result)

    def _note_what_a_lock_would_tell(self) -> None:
        self.unchecked += [
            Unchecked(code=code, reason="only the lock and the spec of a jail of Stockade's tell")
            for code, entry in rules().items() if entry.needs == "lock"
        ]  # fmt: skip

    def _entry(self, node: Node) -> None:
        take, subject = self.ledger.take, self.subject
        self.examined += 1
        if self.examined % _EVERY == 0:
            self.progress(f"looking at the tree, {self.examined} entries so far")
        self.accounts.see(node)
        self.links.see(node)
        take(files.owners_and_modes(node, subject))
        if self.lock is not None:
            take(self.lock.see(node))
        take(files.special(node))
        if node.is_link:
            take(files.symlink(node, self.root, subject))
        elif node.is_file:
            take(program(node, subject))
            take(self._content(node))

    def _content(self, node: Node) -> Iterator[Seen]:
        descriptor = open_regular(node)
        if isinstance(descriptor, Seen):
            yield descriptor
            return
        try:
            yield from self._read(node, descriptor)
        except OSError as error:
            yield Seen("UNREADABLE", node.path, (error.strerror or str(error)).lower())
        finally:
            os.close(descriptor)

    def _read(self, node: Node, descriptor: int) -> Iterator[Seen]:
        capabilities = _file_capabilities(descriptor)
        if capabilities:
            mend = Mend("capabilities", identity=(node.status.st_dev, node.status.st_ino))
            yield Seen("FILE-CAPABILITIES", node.path, f"security.capability is {capabilities}", mend)
        head = os.pread(descriptor, _HEAD, 0)
        is_elf = head.startswith(_ELF)
        if is_elf:
            self.libraries.add(node.path)
        else:
            if len(head) == _HEAD:
                head += os.pread(descriptor, secrets.limit() - _HEAD, _HEAD)
            yield from secrets.secrets(node.path, head)
        if self.lock is not None:
            yield from self.lock.content(node, descriptor)
        elif self.copies is not None:
            yield from self.copies.content(node, descriptor, is_elf=is_elf)

    def proposals(self) -> tuple[Proposal, ...]:
        """What can be mended without a change to anything outside of the tree."""
        shared = self.links.shared()
        return tuple(found for found in self.ledger.proposals if found.mend.identity not in shared)

    def report(self, seconds: float) -> AuditReport:
        """What came of it, the worst first."""
        ledger, marks = self.ledger, scoring()
        everything = ledger.counts + ledger.accepted_counts
        return AuditReport(
            target=self.subject.name,
            kind="jail" if self.subject.lock is not None else "directory",
            generation=self.subject.generation,
            examined=self.examined,
            seconds=round(seconds, 3),
            score=marks.score(ledger.counts),
            score_with_accepted=marks.score(everything),
            points=round(marks.points(ledger.counts), 1),
            half=marks.half,
            weights=marks.weights,
            counts={code: ledger.counts[code] for code in rules() if ledger.counts[code]},
            findings=tuple(sorted(ledger.open, key=_place)),
            accepted=tuple(sorted(ledger.accepted, key=lambda accepted: _place(accepted.finding))),
            unchecked=tuple(sorted(self.unchecked)),
        )


def _place(finding: Finding) -> tuple[int, str, str, str]:
    return _SEVERITIES.index(finding.severity), finding.code, finding.path, finding.message


def _file_capabilities(descriptor: int) -> str:
    try:
        return os.getxattr(descriptor, "security.capability").hex()
    except OSError:
        return ""  # none, or a file system without attributes: fs/xattr.c gives ENODATA or EOPNOTSUPP
