"""Changes of a spec that allow more or less, and the lines of TOML that say them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from ..records.proposal import SpecLine
from ..records.spec import Directory, Spec
from ..records.text import escape

__all__ = [
    "Change", "capabilities", "capability", "device", "directory", "include", "limit", "lines", "mode", "network",
    "no_landlock", "owner", "preset", "proc", "publish", "system_call", "toml",
]  # fmt: skip

Change = Callable[[Spec], Spec]

#: Tables in the order in which they are written. The nested one stands first: a key belongs to the first that has it.
_TABLES = (
    ("service",), ("files",), ("directories",), ("network",), ("limits",), ("policy", "syscalls"), ("policy",),
)  # fmt: skip


def system_call(word: str) -> Change:
    """Let the filter pass a call, a socket family or a netlink protocol."""

    def change(spec: Spec) -> Spec:
        calls = spec.policy.syscalls
        kept = tuple(other for other in calls.remove if other != word)
        calls = msgspec.structs.replace(calls, add=_with(calls.add, word), remove=kept)
        return _policy(spec, syscalls=calls)

    return change


def preset(name: str) -> Change:
    """Use another preset of system calls."""
    return lambda spec: _policy(spec, syscalls=msgspec.structs.replace(spec.policy.syscalls, preset=name))


def capability(name: str, *, found: tuple[str, ...]) -> Change:
    """Give a capability; `found` are those that the build found where the spec leaves it to the build."""

    def change(spec: Spec) -> Spec:
        named = spec.policy.capabilities
        return _policy(spec, capabilities=_with(found if named == "auto" else named, name))

    return change


def capabilities(names: tuple[str, ...]) -> Change:
    """Give exactly these capabilities."""
    return lambda spec: _policy(spec, capabilities=names)


def device(name: str) -> Change:
    """Show a device of the host."""
    return lambda spec: _policy(spec, devices=_with(spec.policy.devices, name))


def proc(kind: Literal["pid", "full"]) -> Change:
    """Show the jail's own processes in /proc, or what else the kernel tells there too."""
    return lambda spec: _policy(spec, proc=kind)


def no_landlock() -> Change:
    """Do without Landlock."""
    return lambda spec: _policy(spec, landlock=False)


def limit(key: str, value: int | str) -> Change:
    """Set a limit."""
    return lambda spec: msgspec.structs.replace(spec, limits=msgspec.structs.replace(spec.limits, **{key: value}))


def directory(path: str, wanted: Directory) -> Change:
    """Make a directory writable."""
    return lambda spec: msgspec.structs.replace(spec, directories={**spec.directories, escape(path): wanted})


def owner(path: str, name: str) -> Change:
    """Give a file of the jail to a user."""

    def change(spec: Spec) -> Spec:
        files = msgspec.structs.replace(spec.files, owners={**spec.files.owners, escape(path): name})
        return msgspec.structs.replace(spec, files=files)

    return change


def mode(path: str, text: str) -> Change:
    """Give a file of the jail a mode."""

    def change(spec: Spec) -> Spec:
        files = msgspec.structs.replace(spec.files, modes={**spec.files.modes, escape(path): text})
        return msgspec.structs.replace(spec, files=files)

    return change


def network(*, egress: bool) -> Change:
    """Give a private network, with or without a way out."""

    def change(spec: Spec) -> Spec:
        wanted = egress or spec.network.egress
        return msgspec.structs.replace(
            spec, network=msgspec.structs.replace(spec.network, mode="private", egress=wanted)
        )

    return change


def include(path: str) -> Change:
    """Take a path of the host into the jail."""

    def change(spec: Spec) -> Spec:
        files = msgspec.structs.replace(spec.files, include=_with(spec.files.include, escape(path)))
        return msgspec.structs.replace(spec, files=files)

    return change


def publish(text: str) -> Change:
    """Publish a port of a private network."""

    def change(spec: Spec) -> Spec:
        network = msgspec.structs.replace(spec.network, mode="private", publish=_with(spec.network.publish, text))
        return msgspec.structs.replace(spec, network=network)

    return change


def _with(listed: tuple[str, ...], word: str) -> tuple[str, ...]:
    return listed if word in listed else (*listed, word)


def _policy(spec: Spec, **fields: object) -> Spec:
    return msgspec.structs.replace(spec, policy=msgspec.structs.replace(spec.policy, **fields))


def lines(before: Spec, after: Spec) -> tuple[SpecLine, ...]:
    """What `after` says and `before` does not, a line for each key, whole: a list has all of its items."""
    old, new = msgspec.to_builtins(before), msgspec.to_builtins(after)
    return tuple(_differences(old, new))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[SpecLine]:
    for place in _TABLES:
        before, after = _table(old, place), _table(new, place)
        for key, value in after.items():
            if (*place, key) not in _TABLES and before.get(key) != value:
                yield SpecLine(table=".".join(place), line=f"{_key(key)} = {_value(value)}")


def _table(document: Mapping[str, Any], place: tuple[str, ...]) -> Mapping[str, Any]:
    found: Any = document
    for key in place:
        found = found.get(key, {})
    return found if isinstance(found, dict) else {}


def toml(changed: tuple[SpecLine, ...]) -> str:
    """The lines under the headers of their tables, to paste into a spec that does not have these keys yet."""
    tables: dict[str, list[str]] = {}
    for change in changed:
        tables.setdefault(change.table, []).append(change.line)
    return "\n\n".join("\n".join([f"[{table}]", *found]) for table, found in tables.items())


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("-", "_").isidentifier() else _value(key)


def _value(value: object) -> str:
    """TOML of a value of a spec: its basic strings escape as JSON's do."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case dict():
            return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
        case _:
            return str(value)
