"""The groups and presets of system calls, and what a policy selects from them. Compiles nothing."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..errors import SpecError

__all__ = [
    "Group", "Preset", "Rule", "Selection", "group_of", "groups", "known", "presets", "refusal", "rules", "select",
    "word_of", "words",
]  # fmt: skip

_TABLE = Path(__file__).with_name("presets.toml")

# Without it the warden cannot start the service: it is the one call made after the filter is in force.
_INDISPENSABLE = frozenset({"execve"})


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Calls that belong together; refused with `errno` where they are not allowed."""

    name: str
    about: str
    calls: tuple[str, ...]
    errno: str = "EPERM"
    never: bool = False


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """Groups, socket families and netlink protocols that are allowed together."""

    name: str
    about: str
    groups: tuple[str, ...]
    families: tuple[str, ...]
    netlink: tuple[str, ...]


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What an allowed call may be given: see the head of the rules in `presets.toml`."""

    calls: tuple[str, ...]
    argument: int
    errno: str
    about: str
    mask: int = 0xFFFFFFFF
    allow: tuple[int, ...] | str | None = None
    refuse: tuple[int, ...] = ()
    when: tuple[int, int] | None = None  # argument, value


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy allows: names of calls, numbers of socket families and netlink protocols."""

    calls: frozenset[str]
    families: frozenset[int]
    netlink: frozenset[int]

    def permitted(self, rule: Rule) -> tuple[int, ...] | None:
        """Values that `rule` permits, sorted; None when it rather names the values it refuses."""
        match rule.allow:
            case "families":
                return tuple(sorted(self.families))
            case "netlink":
                return tuple(sorted(self.netlink))
            case tuple() as values:
                return values
            case _:
                return None

    def answer(self, call: str, arguments: tuple[int, ...]) -> str:
        """Errno name with which the filter answers `call` with these leading `arguments`, "" where it lets it pass."""
        if call not in self.calls:
            group = group_of().get(call)
            return group.errno if group is not None else "ENOSYS"
        given = (*arguments, *(0,) * (6 - len(arguments)))
        for rule in rules():
            if call in rule.calls and (rule.when is None or given[rule.when[0]] == rule.when[1]):
                value, permitted = given[rule.argument] & rule.mask, self.permitted(rule)
                if value in rule.refuse if permitted is None else value not in permitted:
                    return rule.errno
        return ""


@functools.cache
def _table() -> dict[str, Any]:
    with _TABLE.open("rb") as file:
        return tomllib.load(file)


@functools.cache
def groups() -> dict[str, Group]:
    """Every group by name, in the order of the table."""
    return {
        name: Group(name=name, **{**entry, "calls": tuple(entry["calls"].split())})
        for name, entry in _table()["groups"].items()
    }


@functools.cache
def presets() -> dict[str, Preset]:
    """Every preset by name, the narrowest first; each holds all groups of the one it extends."""
    made: dict[str, Preset] = {}
    for name, entry in _table()["presets"].items():
        base = made[entry["extends"]].groups if "extends" in entry else ()
        made[name] = Preset(
            name=name,
            about=entry["about"],
            groups=(*base, *entry["groups"]),
            families=tuple(entry["families"]),
            netlink=tuple(entry["netlink"]),
        )
    return made


@functools.cache
def rules() -> tuple[Rule, ...]:
    """Every rule about arguments. Those of one call are applied in this order."""
    return tuple(_rule(entry) for entry in _table()["rules"])


def _rule(entry: dict[str, Any]) -> Rule:
    given = dict(entry, calls=tuple(entry["calls"].split()))
    for key in ("allow", "refuse"):
        if isinstance(given.get(key), list):
            given[key] = tuple(given[key])
    if "when" in given:
        given["when"] = (given["when"]["argument"], given["when"]["value"])
    return Rule(**given)


@functools.cache
def group_of() -> dict[str, Group]:
    """The group of every call, by the call's name."""
    return {call: group for group in groups().values() for call in group.calls}


def _sockets() -> dict[str, tuple[str, int]]:
    table = _table()
    return {
        f"{word}:{name}": (kind, number)
        for word, kind in (("socket", "families"), ("netlink", "netlink"))
        for name, number in table[kind].items()
    }


def words(*, add: bool) -> frozenset[str]:
    """Everything that `policy.syscalls.add` (or, without `add`, `.remove`) can hold.

    Names of calls, `@GROUP`, `socket:FAMILY` and `netlink:PROTOCOL`. What no policy can allow
    is no word of `add`; what a jail cannot start without is no word of `remove`.
    """
    usable = [group for group in groups().values() if not (add and group.never)]
    calls = {call for group in usable for call in group.calls}
    if not add:
        calls -= _INDISPENSABLE
    return frozenset({*calls, *(f"@{group.name}" for group in usable), *_sockets()})


def _expand(listed: Iterable[str], *, add: bool) -> Iterator[tuple[str, str | int]]:
    """Pairs of the selection's field and a member of it, for each word; SpecError for a wrong word."""
    place = "policy.syscalls.add" if add else "policy.syscalls.remove"
    accepted = words(add=add)
    for word in listed:
        if word not in accepted:
            raise refusal(word, place)
        if word.startswith("@"):
            yield from (("calls", call) for call in groups()[word[1:]].calls)
        elif ":" in word:
            yield _sockets()[word]
        else:
            yield "calls", word


def word_of(kind: str, number: int) -> str:
    """The word of a policy for a socket family ("families") or a netlink protocol ("netlink"); "" where none has it."""
    return next((word for word, member in _sockets().items() if member == (kind, number)), "")


def known(word: str) -> bool:
    """Whether `word` is a call, a group, a family or a protocol, whatever a policy may do with it."""
    return word in group_of() or word in words(add=False)


def refusal(word: str, place: str) -> SpecError:
    """Why `word` cannot stand in the list `place` of a policy, which `words` does not hold."""
    group = groups().get(word.removeprefix("@")) if word.startswith("@") else group_of().get(word)
    if group is not None and group.never:
        return SpecError(
            f"`{place}` cannot hold `{word}`: {group.about}",
            hint="leave it out; a service that cannot do without it needs the walls `[\"vm\"]`",
        )
    if group is not None:
        return SpecError(f"`{place}` cannot hold `{word}`: without it no service can be started", hint="leave it out")
    import difflib  # only errors need it

    near = difflib.get_close_matches(word, words(add=True) | words(add=False), n=1)
    return SpecError(
        f"`{place}` holds `{word}`, which is no system call, group or socket family",
        hint=f"did you mean `{near[0]}`?" if near else "syscalls(2) lists the calls, docs/seccomp.md the groups",
    )


def select(
    preset: str,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    *,
    chroot: bool = False,
    allow_ptrace: bool = False,
) -> Selection:
    """What `preset` with `add` and without `remove` allows.

    `chroot` allows chroot(2), for services that use it; `allow_ptrace` allows ptrace(2), for a
    built-in recipe whose program is a tracer. SpecError for a preset or a word that does not exist, for
    what no policy can allow, and for a word both added and removed.
    """
    if preset not in presets():
        raise SpecError(
            f"there is no system call preset `{preset}`",
            hint=f"presets are {', '.join(f'`{name}`' for name in presets())}",
        )
    add, remove = tuple(add), tuple(remove)
    for word in add:
        if word in remove:
            raise SpecError(f"`policy.syscalls` both adds and removes `{word}`", hint="keep one of the two")
    chosen = presets()[preset]
    selected: dict[str, set[Any]] = {
        "calls": {call for name in chosen.groups for call in groups()[name].calls},
        "families": {_table()["families"][name] for name in chosen.families},
        "netlink": {_table()["netlink"][name] for name in chosen.netlink},
    }
    if chroot:
        selected["calls"].update(groups()["chroot"].calls)
    if allow_ptrace:
        selected["calls"].update(groups()["ptrace"].calls)
    for kind, member in _expand(add, add=True):
        selected[kind].add(member)
    for kind, member in _expand(remove, add=False):
        selected[kind].discard(member)
    return Selection(**{kind: frozenset(members) for kind, members in selected.items()})
