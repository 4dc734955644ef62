"""Who the service is, by the jail's own passwd and group files. Reads only inside the root."""

from __future__ import annotations

import os
from pathlib import Path

from stockade.errors import SpecError
from stockade.kernel.beneath import Root
from stockade.records.generation import Identity

__all__ = ["Account", "account", "identity", "users"]

_LARGEST_FILE = 1 << 24
_NO_SHELLS = ("nologin", "false")


class Account(Identity, frozen=True, kw_only=True):
    """Ids of a service and what passwd(5) says of its user."""

    name: str = ""
    home: str = "/"
    shell: str = "/bin/sh"

    def variables(self) -> dict[str, str]:
        """The environment that goes with the account. No SHELL where it may not log in: programs run commands by it."""
        found = {"HOME": self.home, "USER": self.name, "LOGNAME": self.name}
        return found if os.path.basename(self.shell) in _NO_SHELLS else {**found, "SHELL": self.shell}


def identity(rootfs: Path, user: str, group: str | None, groups: tuple[str, ...]) -> Identity:
    """Ids of `user`, a name or a number, with `group` as primary and `groups` as supplementary groups."""
    return account(rootfs, user, group, groups)


def account(rootfs: Path, user: str, group: str | None = None, groups: tuple[str, ...] = ()) -> Account:
    """The account `user` of the jail: its own groups in group(5) count as supplementary ones too.

    SpecError for a name that the jail does not know. A number needs no entry.
    """
    with Root.open(rootfs) as root:
        users = _lines(root, "etc/passwd", 7)
        known = _lines(root, "etc/group", 4)
    found = next((line for line in users if line[0] == user), None)
    if found is None and user.isdecimal():
        found = next((line for line in users if line[2] == user), ["", "", user, user, "", "/", "/bin/sh"])
    if found is None and user == "root":
        found = ["root", "", "0", "0", "", "/root", "/bin/sh"]
    if found is None:
        raise SpecError(
            f"the jail has no user `{user}`", hint="add it to `accounts`, or name another as `service.user`"
        )
    gid = int(found[3]) if group is None else _group(known, group)
    member = {int(line[2]) for line in known if found[0] and found[0] in line[3].split(",")}
    extra = member | {_group(known, name) for name in groups}
    return Account(
        uid=int(found[2]), gid=gid, groups=tuple(sorted(extra - {gid})), name=found[0], home=found[5] or "/",
        shell=found[6] or "/bin/sh",
    )  # fmt: skip


def users(rootfs: Path) -> dict[int, str]:
    """Names of the jail's users by uid; the first where several have one."""
    with Root.open(rootfs) as root:
        lines = _lines(root, "etc/passwd", 7)
    return {int(line[2]): line[0] for line in reversed(lines)}


def _group(known: list[list[str]], name: str) -> int:
    for line in known:
        if line[0] == name:
            return int(line[2])
    if name.isdecimal():
        return int(name)
    raise SpecError(f"the jail has no group `{name}`", hint="name a group of one of the jail's accounts")


def _lines(root: Root, path: str, fields: int) -> list[list[str]]:
    """Well-formed lines of passwd(5) or group(5); none where the file is missing."""
    try:
        descriptor = root.openat(path, os.O_RDONLY, follow=True)
    except FileNotFoundError:
        return []
    with open(descriptor, "rb") as file:
        text = os.fsdecode(file.read(_LARGEST_FILE))
    lines = [line.split(":") for line in text.splitlines()]
    return [
        line
        for line in lines
        if len(line) >= fields and line[2].isdecimal() and (fields < 7 or line[3].isdecimal())
    ]
