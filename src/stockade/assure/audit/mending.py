"""Mend what is safe to mend in a directory tree: take rights away, and accounts that nothing uses."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stockade.kernel.beneath import Root
from stockade.records.finding import Mending
from stockade.records.text import escape

from .accounts import GROUP, GSHADOW, PASSWD, SHADOW
from .ledger import Proposal

__all__ = ["described", "mend"]


def described(proposal: Proposal) -> str:
    """What a proposal would do."""
    mend = proposal.mend
    match mend.kind:
        case "mode":
            return f"take the mode bits {mend.bits:04o} away"
        case "capabilities":
            return "remove the file's capabilities"
        case kind:
            return f"remove the {kind} `{mend.name}`"


def mend(root: Path, proposals: Sequence[Proposal]) -> tuple[Mending, ...]:
    """Make each change in the tree at `root`, and tell which could be made.

    A file that is no longer the one that was examined is left alone. Files of accounts are replaced by one rename.
    """
    done = []
    with Root.open(os.path.realpath(root)) as tree:
        for proposal in proposals:
            if proposal.mend.kind in ("mode", "capabilities"):
                done.append(_told(proposal, _attempt(lambda found=proposal: _file(tree, found))))  # type: ignore[misc]
        accounts = [proposal for proposal in proposals if proposal.mend.kind in ("user", "group")]
        if accounts:
            failed = _attempt(lambda: _accounts(tree, accounts))
            done += [_told(proposal, failed) for proposal in accounts]
    return tuple(done)


def _attempt(change: Callable[[], None]) -> str:
    """"" when `change` was made, else why not."""
    try:
        change()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except _Refused as error:
        return str(error)
    return ""


class _Refused(Exception):
    """A change that would not do what was proposed."""


def _told(proposal: Proposal, failed: str) -> Mending:
    return Mending(
        code=proposal.code, path=escape(proposal.path), change=escape(described(proposal)), done=not failed,
        failed=failed,
    )  # fmt: skip


def _file(tree: Root, proposal: Proposal) -> None:
    mend = proposal.mend
    handle = tree.openat(proposal.path, os.O_PATH | os.O_NOFOLLOW)
    try:
        status = os.fstat(handle)
        kind = stat.S_IFMT(status.st_mode)
        same = (status.st_dev, status.st_ino) == mend.identity and status.st_mode & mend.bits == mend.bits
        # A number is given to another file once the first has gone, so the kind of file is asked for too.
        if not same or kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise _Refused("another file is there now")
        place = f"/proc/self/fd/{handle}"
        if mend.kind == "capabilities":
            os.removexattr(place, "security.capability")
        else:
            os.chmod(place, stat.S_IMODE(status.st_mode) & ~mend.bits)
    finally:
        os.close(handle)


def _accounts(tree: Root, proposals: Iterable[Proposal]) -> None:
    users = {proposal.mend.name for proposal in proposals if proposal.mend.kind == "user"}
    groups = {proposal.mend.name for proposal in proposals if proposal.mend.kind == "group"}
    for path, gone in ((PASSWD, users), (SHADOW, users), (GROUP, groups), (GSHADOW, groups)):
        try:
            descriptor = tree.openat(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise _Refused(f"`{path}` is no file of its own")
            with open(descriptor, "rb", closefd=False) as file:
                old = os.fsdecode(file.read())
        finally:
            os.close(descriptor)
        new = "".join(_kept(line, gone, users, path) for line in _lines(old))
        if new != old:
            _replace(tree, path, os.fsencode(new), status)


def _lines(text: str) -> list[str]:
    """Lines with their ends, the last perhaps without; other characters that Python takes for ends stay."""
    lines = [f"{line}\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines


def _kept(line: str, gone: set[str], users: set[str], path: str) -> str:
    """The line without those who are gone; "" when it is about one of them."""
    fields = line.rstrip("\n").split(":")
    if fields[0] in gone:
        return ""
    if path in (GROUP, GSHADOW) and users & set(fields[-1].split(",")):
        members = [name for name in fields[-1].split(",") if name not in users]
        return ":".join([*fields[:-1], ",".join(members)]) + ("\n" if line.endswith("\n") else "")
    return line


def _replace(tree: Root, path: str, content: bytes, status: os.stat_result) -> None:
    """Put a new file in the place of `path`, with the owner and mode of the old."""
    directory, name = tree.parent(path)
    scratch = f".{name}.{secrets.token_hex(8)}"
    descriptor = tree.create(f"{path.rpartition('/')[0]}/{scratch}")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
            os.fsync(descriptor)
        directory, name = tree.parent(path)
        os.rename(scratch, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        directory, name = tree.parent(path)
        os.unlink(scratch, dir_fd=directory)
        raise
