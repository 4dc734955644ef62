"""Check passwd, group and shadow of a tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stockade.errors import NotFoundError
from stockade.kernel.beneath import Root

from .seen import Mend, Seen
from .subject import Subject
from .tree import Node, read_inside

__all__ = ["GROUP", "GSHADOW", "PASSWD", "SHADOW", "Accounts", "find_user"]

PASSWD, GROUP, SHADOW, GSHADOW = "/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"

_FIRST_PERSON = 1000
_NOBODY = 65534
_NO_LOGIN = frozenset({"nologin", "false", "true", "sync", "shutdown", "halt"})


class _User(NamedTuple):
    name: str
    password: str
    uid: int
    gid: int
    home: str
    shell: str


class _Group(NamedTuple):
    name: str
    gid: int
    members: tuple[str, ...]


def _lines(data: bytes | None, least: int) -> Iterator[list[str]]:
    """Fields of each line that is an account: not of NIS (`+`, `-`), not a comment, not damaged."""
    for line in os.fsdecode(data or b"").split("\n"):
        fields = line.split(":")
        if len(fields) >= least and fields[0] and fields[0][0] not in "+-#":
            yield fields


def _number(text: str) -> int:
    """The number that `text` is, -1 for none. Bounded, as `int` is slow for endless digits."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1


def _users(data: bytes | None) -> list[_User]:
    return [
        _User(name, password, _number(uid), _number(gid), home, shell)
        for name, password, uid, gid, _, home, shell in (fields[:7] for fields in _lines(data, 7))
    ]


def _groups(data: bytes | None) -> list[_Group]:
    return [
        _Group(name, _number(gid), tuple(filter(None, members.split(","))))
        for name, _, gid, members in (fields[:4] for fields in _lines(data, 4))
    ]


def find_user(root: Path, text: str) -> int:
    """The id of the user `text`, a name in the passwd of the tree at `root` or a number. NotFoundError for neither."""
    if _number(text) >= 0:
        return _number(text)
    with Root.open(os.path.realpath(root)) as tree:
        users = _users(read_inside(tree, PASSWD))
    for user in users:
        if user.name == text:
            return user.uid
    names = ", ".join(f"`{user.name}`" for user in users) or "nobody"
    raise NotFoundError(f"`{root}{PASSWD}` has no user `{text}`", hint=f"it has {names}; a number will do too")


@dataclass
class Accounts:
    """Ids that own something in the tree. `see` every entry, then `check`."""

    uids: set[int] = field(default_factory=lambda: {0})
    gids: set[int] = field(default_factory=lambda: {0})

    def see(self, node: Node) -> None:
        """Take one entry's owner in."""
        self.uids.add(node.status.st_uid)
        self.gids.add(node.status.st_gid)

    def check(self, root: Root, subject: Subject) -> Iterator[Seen]:
        """What is wrong with the accounts of the tree."""
        users, groups = _users(read_inside(root, PASSWD)), _groups(read_inside(root, GROUP))
        shadow = list(_lines(read_inside(root, SHADOW), 2))
        used = self._used(users, subject)
        yield from _doubles(users)
        yield from _passwords(users, shadow, subject.host)
        yield from _logins(users, root, subject)
        yield from _homes(users, subject)
        for user in users:
            if user.name not in used:
                what = f"`{user.name}`, uid {user.uid}: nothing is its"
                yield Seen("ACCOUNT-UNUSED", PASSWD, what, _unused(user, subject))
        names = {user.name for user in users}
        for fields in shadow:
            if fields[0] not in names:
                yield Seen("ACCOUNT-UNUSED", SHADOW, f"`{fields[0]}` is not in {PASSWD}", _gone(fields[0], subject))
        yield from self._groups(groups, users, used, subject)

    def _used(self, users: list[_User], subject: Subject) -> set[str]:
        """Names of accounts that tree, lock or spec need; of several with one id the first."""
        uids, names = set(self.uids), set[str]()
        if subject.user is not None:
            uids.add(subject.user)
        if subject.lock is not None:
            uids |= {*subject.lock.uids, *(found.uid for found in subject.lock.directories)}
        if subject.spec is not None:
            names |= _named(subject)
        first = {user.uid: user.name for user in reversed(users)}
        return names | {name for uid, name in first.items() if uid in uids}

    def _groups(
        self, groups: list[_Group], users: list[_User], used: set[str], subject: Subject
    ) -> Iterator[Seen]:
        gids = self.gids | {user.gid for user in users if user.name in used}
        names: set[str] = set()
        if subject.lock is not None:
            gids |= {*subject.lock.gids, *(found.gid for found in subject.lock.directories)}
        if subject.spec is not None:
            service = subject.spec.service
            names |= {*service.groups, *filter(None, [service.group])}
            names |= {name for account in subject.spec.accounts for name in (*account.groups, account.group) if name}
        for group in groups:
            if group.gid not in gids and group.name not in names and not used & set(group.members):
                mend = Mend("group", name=group.name) if subject.user is not None else None
                yield Seen("ACCOUNT-UNUSED", GROUP, f"group `{group.name}`, gid {group.gid}: nothing is its", mend)


def _unused(user: _User, subject: Subject) -> Mend | None:
    """Only who says as whom the service runs can know that an account without files is not the service's."""
    return None if user.uid in (-1, _NOBODY) else _gone(user.name, subject)


def _gone(name: str, subject: Subject) -> Mend | None:
    return Mend("user", name=name) if subject.user is not None else None


def _named(subject: Subject) -> set[str]:
    """Names of accounts that the spec mentions."""
    assert subject.spec is not None
    spec = subject.spec
    owners = [spec.service.user, *spec.files.owners.values()]
    owners += [directory.owner for directory in spec.directories.values()]
    owners += [secret.owner for secret in spec.secrets.values() if not secret.client]
    return {owner.partition(":")[0] for owner in owners} | {account.name for account in spec.accounts}


def _doubles(users: list[_User]) -> Iterator[Seen]:
    for user in [user for user in users if user.uid == 0][1:]:
        yield Seen("UID0-DOUBLE", PASSWD, f"`{user.name}` has uid 0")


def _passwords(users: list[_User], shadow: list[list[str]], host: Path) -> Iterator[Seen]:
    known = {fields[1] for fields in _lines(_host_file(host / "etc/shadow"), 2) if _is_hash(fields[1])}
    fields = [(PASSWD, user.name, user.password) for user in users]
    fields += [(SHADOW, line[0], line[1]) for line in shadow]
    for path, name, password in fields:
        if password == "":
            yield Seen("PASSWORD-EMPTY", path, f"`{name}`")
        elif password in known:
            yield Seen("PASSWORD-OF-HOST", path, f"`{name}`")
        elif _is_hash(password):
            yield Seen("PASSWORD-HASH", path, f"`{name}`")


def _is_hash(password: str) -> bool:
    """crypt(5): what can be the result of hashing, locked (`!`) or not. `x` refers to shadow, `*` is nothing."""
    return len(password.lstrip("!")) >= 13


def _host_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _logins(users: list[_User], root: Root, subject: Subject) -> Iterator[Seen]:
    shells = {account.name: account.shell for account in subject.spec.accounts} if subject.spec is not None else {}
    for user in users:
        shell = user.shell or "/bin/sh"
        if shell.rpartition("/")[2] in _NO_LOGIN or shells.get(user.name) == user.shell:
            continue
        if _is_program(root, shell):
            yield Seen("ACCOUNT-SHELL", PASSWD, f"`{user.name}` has the shell `{shell}`")


def _is_program(root: Root, path: str) -> bool:
    try:
        handle = root.openat(path, os.O_PATH, follow=True)
    except (OSError, ValueError):
        return False
    try:
        mode = os.fstat(handle).st_mode
        return stat.S_ISREG(mode) and bool(mode & 0o111)
    finally:
        os.close(handle)


def _homes(users: list[_User], subject: Subject) -> Iterator[Seen]:
    homes = {account.name: account.home for account in subject.spec.accounts} if subject.spec is not None else {}
    host = {user.name: user.home for user in _users(_host_file(subject.host / "etc/passwd"))}
    for user in users:
        person = user.uid == 0 or _FIRST_PERSON <= user.uid < _NOBODY
        real = host.get(user.name) == user.home and user.home not in ("", "/", "/nonexistent")
        if person and real and homes.get(user.name) != user.home:
            yield Seen("ACCOUNT-HOME", PASSWD, f"`{user.name}` has the home `{user.home}`")
