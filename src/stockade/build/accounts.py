"""The accounts of a jail: who is kept of the host's, who is created. No host password hash is kept."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from stockade.errors import SpecError
from stockade.records.generation import Identity
from stockade.records.spec import Account, Spec

if TYPE_CHECKING:
    from stockade.records.trace import Trace

__all__ = [
    "AccountFiles", "Group", "HostAccounts", "User", "identity", "merged", "missed", "owner", "read", "sanitised",
]  # fmt: skip

NO_HOME = "/nonexistent"
NO_SHELL = "/usr/sbin/nologin"
FIRST_ID = 1000
_WORD = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
#: A line of output that speaks of an account, not of what a name such as `bind` or `mail` means else.
_ACCOUNT = re.compile(r"user|group|account|owner|passwd|[ug]id\b|getpw|getgr", re.IGNORECASE)


class User(msgspec.Struct, frozen=True, kw_only=True):
    """A line of passwd(5)."""

    name: str
    uid: int
    gid: int
    gecos: str = ""
    home: str = NO_HOME
    shell: str = NO_SHELL


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A line of group(5)."""

    name: str
    gid: int
    members: tuple[str, ...] = ()


class _Accounts(msgspec.Struct, frozen=True, kw_only=True):
    users: tuple[User, ...] = ()
    groups: tuple[Group, ...] = ()

    def user(self, name: str) -> User | None:
        """The first user of that name."""
        return next((user for user in self.users if user.name == name), None)

    def group(self, name: str) -> Group | None:
        """The first group of that name."""
        return next((group for group in self.groups if group.name == name), None)


class HostAccounts(_Accounts, frozen=True, kw_only=True):
    """Accounts of a root. `shadow` maps names to whole lines; empty where it cannot be read."""

    shadow: dict[str, str] = {}


class AccountFiles(_Accounts, frozen=True, kw_only=True):
    """Accounts as the files of a new root. `shadow` is that file's content."""

    shadow: bytes = b""

    @property
    def passwd(self) -> bytes:
        """Content of /etc/passwd."""
        return _encode(f"{u.name}:x:{u.uid}:{u.gid}:{u.gecos}:{u.home}:{u.shell}" for u in self.users)

    @property
    def group_file(self) -> bytes:
        """Content of /etc/group."""
        return _encode(f"{g.name}:x:{g.gid}:{','.join(g.members)}" for g in self.groups)


def _encode(lines: Iterable[str]) -> bytes:
    return os.fsencode("".join(f"{line}\n" for line in lines))


def _lines(path: Path, fields: int) -> list[list[str]]:
    """Fields of each line that has `fields` of them; NIS lines (`+`, `-`) and damaged ones are no accounts."""
    try:
        text = os.fsdecode(path.read_bytes())
    except (FileNotFoundError, PermissionError):
        return []
    split = (line.split(":") for line in text.split("\n"))
    return [parts for parts in split if len(parts) == fields and parts[0] and parts[0][0] not in "+-#"]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def read(root: Path = Path("/")) -> HostAccounts:
    """Accounts of `root` from its passwd, group and shadow files. Missing or unreadable files are empty.

    On the host itself the caller's own account is added where it comes from elsewhere (LDAP, sssd).
    """
    users = []
    for name, _, uid, gid, gecos, home, shell in _lines(root / "etc/passwd", 7):
        numbers = _number(uid), _number(gid)
        if numbers[0] is not None and numbers[1] is not None:
            users.append(User(name=name, uid=numbers[0], gid=numbers[1], gecos=gecos, home=home, shell=shell))
    groups = []
    for name, _, gid, members in _lines(root / "etc/group", 4):
        number = _number(gid)
        if number is not None:
            groups.append(Group(name=name, gid=number, members=tuple(filter(None, members.split(",")))))
    if root == Path("/") and all(user.uid != os.getuid() for user in users):
        users.extend(_own_account())
    shadow = {fields[0]: ":".join(fields) for fields in _lines(root / "etc/shadow", 9)}
    return HostAccounts(users=tuple(users), groups=tuple(groups), shadow=shadow)


def _own_account() -> list[User]:
    try:
        own = pwd.getpwuid(os.getuid())
    except KeyError:
        return []
    return [
        User(name=own.pw_name, uid=own.pw_uid, gid=own.pw_gid, gecos=own.pw_gecos, home=own.pw_dir, shell=own.pw_shell)
    ]


class _Creation:
    """The spec's accounts and their groups, with the ids they get beside the host's."""

    def __init__(self, spec: Spec, host: HostAccounts) -> None:
        self.host = host
        self.users: dict[str, User] = {}
        self.groups: dict[str, Group] = {}
        self._taken = {user.uid for user in host.users} | {group.gid for group in host.groups}
        self._taken |= {account.uid for account in spec.accounts if account.uid is not None}
        for account in spec.accounts:
            if account.name in self.users:
                raise SpecError(
                    f"account `{account.name}` stands twice in `[[accounts]]`", hint="leave one of the two out"
                )
            self._user(account)

    def _free(self) -> int:
        number = FIRST_ID
        while number in self._taken:
            number += 1
        self._taken.add(number)
        return number

    def _gid(self, name: str, preferred: int | None = None) -> int:
        known = self.groups.get(name) or self.host.group(name)
        if known is None:
            used = {group.gid for group in (*self.host.groups, *self.groups.values())}
            gid = preferred if preferred is not None and preferred not in used else self._free()
            known = Group(name=name, gid=gid)
        self.groups[name] = known
        return known.gid

    def _user(self, account: Account) -> None:
        known = self.host.user(account.name)
        uid = account.uid
        if uid is None:
            uid = known.uid if known is not None else self._free()
        if account.group is not None:
            gid = self._gid(account.group, uid)
        elif known is not None:
            gid = known.gid
        else:
            gid = self._gid(account.name, uid)
        self.users[account.name] = User(
            name=account.name,
            uid=uid,
            gid=gid,
            gecos=account.gecos if account.gecos is not None else (known.gecos if known else ""),
            home=account.home or (known.home if known else NO_HOME),
            shell=account.shell or (known.shell if known else NO_SHELL),
        )
        for name in account.groups:
            self._gid(name)
            group = self.groups[name]
            if account.name not in group.members:
                self.groups[name] = msgspec.structs.replace(group, members=(*group.members, account.name))


def _shadow_line(name: str, password_hash: str | None) -> str:
    # Without a date of the last change shadow(5) disables ageing, and the file is the same every day.
    return f"{name}:{password_hash or '*'}:::::::"


def merged(spec: Spec, host: HostAccounts, password_hashes: Mapping[str, str]) -> AccountFiles:
    """The host's accounts and the spec's, for the view in which the service is observed.

    `password_hashes` maps names of accounts to crypt(3) hashes.
    """
    new = _Creation(spec, host)
    users = [new.users.get(user.name, user) for user in host.users]
    users += [user for name, user in new.users.items() if host.user(name) is None]
    groups = [new.groups.get(group.name, group) for group in host.groups]
    groups += [group for name, group in new.groups.items() if host.group(name) is None]
    lines = dict(host.shadow)
    for name in new.users:
        if name in password_hashes or name not in lines:
            lines[name] = _shadow_line(name, password_hashes.get(name))
    return AccountFiles(users=tuple(users), groups=tuple(groups), shadow=_encode(lines.values()))


def _named(spec: Spec) -> tuple[set[str], set[str]]:
    """Names of users and groups that the spec mentions as owners of something, or for the service."""
    owners = [*spec.files.owners.values()]
    owners += [directory.owner for directory in spec.directories.values()]
    owners += [secret.owner for secret in spec.secrets.values() if not secret.client]
    users, groups = {spec.service.user.partition(":")[0]}, set(spec.service.groups)
    groups |= {spec.service.group} if spec.service.group is not None else set()
    for text in owners:
        user, _, group = text.partition(":")
        users.add(user)
        groups |= {group} if group else set()
    return {name for name in users if _number(name) is None}, {name for name in groups if _number(name) is None}


def sanitised(
    spec: Spec,
    host: HostAccounts,
    *,
    uids: Collection[int],
    gids: Collection[int],
    password_hashes: Mapping[str, str],
    paths: Collection[str] = (),
) -> AccountFiles:
    """The accounts that a jail holds: root, the spec's, and the host's of `uids` and `gids`.

    A password is locked unless `password_hashes` has one. A home stands only if the spec names it or it is
    one of `paths`, which the jail holds; a login shell only if the spec names it. SpecError for an
    unknown user or group.
    """
    new = _Creation(spec, host)
    named_users, named_groups = _named(spec)
    users: dict[str, User] = {}
    seen: set[int] = set()
    for user in host.users:
        wanted = user.name in named_users or user.name == "root" or (user.uid in uids and user.uid not in seen)
        if wanted and user.name not in new.users:
            users[user.name] = user
            seen.add(user.uid)
    users.update(new.users)
    users.setdefault("root", User(name="root", uid=0, gid=0))
    for name in named_users - users.keys():
        raise _unknown("user", name, [user.name for user in host.users])

    groups: dict[str, Group] = {}
    primary = {user.gid for user in users.values()}
    for group in host.groups:
        if group.name in named_groups or group.gid in gids or group.gid in primary:
            groups[group.name] = group
    groups.update(new.groups)
    if all(group.gid != 0 for group in groups.values()):
        groups["root"] = Group(name="root", gid=0)
    for name in named_groups - groups.keys():
        raise _unknown("group", name, [group.name for group in host.groups])

    places = {account.name: account for account in spec.accounts}
    kept = tuple(
        msgspec.structs.replace(
            user,
            home=_home(user, places.get(user.name), paths),
            shell=(places[user.name].shell if user.name in places else None) or NO_SHELL,
        )
        for user in sorted(users.values(), key=lambda user: (user.uid, user.name))
    )
    return AccountFiles(
        users=kept,
        groups=tuple(
            msgspec.structs.replace(group, members=tuple(name for name in group.members if name in users))
            for group in sorted(groups.values(), key=lambda group: (group.gid, group.name))
        ),
        shadow=_encode(_shadow_line(user.name, password_hashes.get(user.name)) for user in kept),
    )


def missed(output: str, trace: Trace, host: HostAccounts, inside: HostAccounts) -> tuple[list[User], list[Group]]:
    """The users and groups of `host` that a service named as it failed in a jail, which has the accounts `inside`.

    A trace shows that /etc/passwd was read, not for which name: a service that only looks one up, and never takes
    its id, is found out by its complaint.
    """
    read = {access.path for access in trace.accesses if access.operation == "read" and not access.error}
    words = {word for line in output.splitlines() if _ACCOUNT.search(line) for word in _WORD.findall(line)}
    users = host.users if "/etc/passwd" in read else ()
    groups = host.groups if "/etc/group" in read else ()
    return (
        [user for user in users if user.name in words and inside.user(user.name) is None],
        [group for group in groups if group.name in words and inside.group(group.name) is None],
    )


def _home(user: User, account: Account | None, paths: Collection[str]) -> str:
    if account is not None and account.home is not None:
        return account.home
    return user.home if user.home in paths else NO_HOME


def _unknown(kind: str, name: str, known: list[str]) -> SpecError:
    import difflib  # only for a name that is wrong

    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"add it to `[[accounts]]`, or name a {kind} of this host"
    return SpecError(f"{kind} `{name}` is neither in `[[accounts]]` nor on this host", hint=hint)


def owner(files: AccountFiles, text: str) -> tuple[int, int]:
    """Ids of an owner written as "user" or "user:group", names or numbers; SpecError when unknown.

    Without a group it is the user's own, and a bare number is its own group too.
    """
    name, _, group_name = text.partition(":")
    uid = _number(name)
    user = next((u for u in files.users if u.name == name or u.uid == uid), None)
    if user is None and uid is None:
        raise _unknown("user", name, [user.name for user in files.users])
    uid = user.uid if user is not None else uid
    assert uid is not None
    if not group_name:
        return uid, user.gid if user is not None else uid
    return uid, _group_id(files, group_name)


def _group_id(files: AccountFiles, name: str) -> int:
    number = _number(name)
    if number is not None:
        return number
    group = files.group(name)
    if group is None:
        raise _unknown("group", name, [group.name for group in files.groups])
    return group.gid


def identity(spec: Spec, files: AccountFiles) -> Identity:
    """Ids of the spec's service: its user, its group or the user's own, and exactly the groups that the spec names."""
    service = spec.service
    uid, gid = owner(files, service.user)
    if service.group is not None:
        gid = _group_id(files, service.group)
    return Identity(uid=uid, gid=gid, groups=tuple(sorted({_group_id(files, name) for name in service.groups})))
