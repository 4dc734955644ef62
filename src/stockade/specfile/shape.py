"""Compare parsed TOML with the records of a spec: unknown and missing keys, wrong types. Converts nothing."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from stockade.records.spec import Spec
from stockade.specfile.problem import Place, Problem, dotted, key, table

# What a value must look like, by the pattern of its type in `records.spec`: a phrase and an example.
_PATTERNS = {
    r"^/": ("an absolute path", '"/srv/data"'),
    r"^[0-7]{3,4}\Z": ("an octal mode in quotes", '"0755"'),
    r"^[0-9]+[KMGT]?\Z": ("a size in quotes, in bytes or with K, M, G or T", '"64M"'),
    r"^[a-z0-9][a-z0-9._-]{0,62}\Z": ("a name of a-z, 0-9, `.`, `_` and `-`, 63 characters at most", '"web-1"'),
    r"^[a-z_][a-z0-9_-]{0,31}\Z": ("an account name of a-z, 0-9, `_` and `-`, 32 characters at most", '"www"'),
}
_VERY_NEAR = 0.8  # least likeness, of 1, of a key that another table has
_PLAIN = {
    str: ("text in quotes", '"text"'),
    int: ("a whole number", "1"),
    float: ("a number", "1.5"),
    bool: ("`true` or `false`", "true"),
}


def check(data: dict[str, Any]) -> Iterator[Problem]:
    """Yield every place at which `data` is no spec. With none, `msgspec.convert(data, Spec)` succeeds."""
    yield from _value(Spec, data, ())


def _value(kind: Any, value: Any, place: Place) -> Iterator[Problem]:
    kind = _optional(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if _is_record(kind):
        yield from _record(kind, value, place)
    elif origin is dict:
        yield from _mapping(arguments[0], arguments[1], value, place)
    elif origin is tuple and _is_record(arguments[0]):
        yield from _records(arguments[0], value, place)
    elif not _fits(kind, value):
        yield from _wrong_items(kind, value, place) or [_mistyped(kind, value, place)]


def _records(kind: Any, value: Any, place: Place) -> Iterator[Problem]:
    if not isinstance(value, list):
        message = f"{key(place)} must be a list of tables, not {_shown(value)}"
        yield Problem(place, message, f"begin each with `[[{dotted(place)}]]`")
        return
    for index, item in enumerate(value):
        yield from _value(kind, item, (*place, index))


def _wrong_items(kind: Any, value: Any, place: Place) -> list[Problem]:
    """The items of a list that are wrong by themselves; none where `kind` is no list, or `value`."""
    lists = [part for part in (kind, *get_args(kind)) if get_origin(part) is tuple]
    if not lists or not isinstance(value, list):
        return []
    item = get_args(lists[0])[0]
    return [_mistyped(item, one, (*place, index)) for index, one in enumerate(value) if not _fits(item, one)]


def _record(kind: Any, value: Any, place: Place) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield Problem(place, f"{key(place)} must be a table, not {_shown(value)}", f"begin it with {table(place)}")
        return
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, inner in value.items():
        if name in fields:
            yield from _value(fields[name].type, inner, (*place, name))
        else:
            yield _unknown(name, list(fields), place)
    for name, field in fields.items():
        if field.required and name not in value:
            example = _form(field.type)[1]
            yield Problem(place, f"missing key `{name}` in {table(place)}", _instead(f"add `{name} = {example}`", name))


def _instead(hint: str, name: str) -> str:
    return 'add a table `[service]` with `command = ["/usr/sbin/daemon", "-f"]`' if name == "service" else hint


def _mapping(key_kind: Any, value_kind: Any, value: Any, place: Place) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield Problem(place, f"{key(place)} must be a table, not {_shown(value)}", f"begin it with {table(place)}")
        return
    for name, inner in value.items():
        if not _fits(key_kind, name):
            form, example = _form(key_kind)
            yield Problem(
                (*place, name),
                f"the key {json.dumps(name)} of {table(place)} must be {form}",
                f"for example `{example}`",
            )
        yield from _value(value_kind, inner, (*place, name))


def _unknown(name: str, here: list[str], place: Place) -> Problem:
    """Suggest the nearest key of the same table, else one of another, and then say where that one belongs."""
    message = f"unknown key `{name}` in {table(place)}"
    if near := difflib.get_close_matches(name, here, n=1):
        return Problem((*place, name), f"{message}, did you mean `{near[0]}`?")
    elsewhere = _homes()
    if near := difflib.get_close_matches(name, elsewhere, n=1, cutoff=_VERY_NEAR):
        meant = f", did you mean `{near[0]}`?" if near[0] != name else ""
        return Problem((*place, name), f"{message}{meant}", f"`{near[0]}` belongs in {' or '.join(elsewhere[near[0]])}")
    return Problem((*place, name), message, f"{table(place)} takes {', '.join(f'`{known}`' for known in here)}")


def _homes() -> dict[str, list[str]]:
    """Return every key of a spec, with the tables that it belongs in."""
    homes: dict[str, list[str]] = {}
    for header, record in tables(Spec):
        for field in msgspec.structs.fields(record):
            homes.setdefault(field.encode_name, []).append(header)
    return homes


def tables(record: type[msgspec.Struct], header: str = "") -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """Yield every table of a spec by its header, the top first, with the record that it is read into."""
    yield f"`[{header}]`" if header else "the top level, before the first table", record
    for field in msgspec.structs.fields(record):
        inner, name = _optional(field.type), f"{header}.{field.encode_name}" if header else field.encode_name
        if get_origin(inner) is tuple:
            inner, name = get_args(inner)[0], f"[{name}]"
        elif get_origin(inner) is dict:
            inner, name = get_args(inner)[1], f"{name}.NAME"
        if _is_record(inner):
            yield from tables(inner, name)


def form(kind: Any) -> str:
    """Say what a value of this type looks like."""
    return _form(kind)[0]


def _mistyped(kind: Any, value: Any, place: Place) -> Problem:
    form, example = _form(kind)
    choices = [choice for choice in get_args(kind) if isinstance(choice, str)] if get_origin(kind) is Literal else []
    near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    message = f"{key(place)} must be {form}, not {_shown(value)}"
    if near:
        return Problem(place, f"{message}, did you mean `{near[0]}`?")
    setting = example if isinstance(place[-1], int) else f"{dotted(place[-1:])} = {example}"
    return Problem(place, message, f"for example `{setting}`")


def _form(kind: Any) -> tuple[str, str]:
    """Return what a value of this type looks like, as a phrase and an example."""
    kind = _optional(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _constrained(arguments[0], arguments[1])
    if origin is Literal:
        return _either([_choice(choice) for choice in arguments]), _choice(arguments[0])
    if origin in (Union, UnionType):
        forms = [_form(argument) for argument in arguments]
        return _either([form for form, _ in forms]), forms[0][1]
    if origin is tuple:
        form, example = _form(arguments[0])
        return f"a list, each item {form}", f"[{example}]"
    return _PLAIN.get(kind, ("a table", "{}"))


def _constrained(kind: Any, meta: msgspec.Meta) -> tuple[str, str]:
    if meta.pattern is not None:
        return _PATTERNS[meta.pattern]
    form, example = _form(kind)
    if meta.min_length:
        return form.replace("a list", "a list that is not empty", 1), example
    least = meta.ge if meta.ge is not None else meta.gt
    words = [] if least is None else [f"{'from' if meta.ge is not None else 'above'} {least}"]
    words += [] if meta.le is None else [f"up to {meta.le}"]
    return " ".join([form, *words]), example if least is None else str(max(least, 1) if kind is int else example)


def _either(forms: list[str]) -> str:
    return forms[0] if len(forms) == 1 else f"{', '.join(forms[:-1])} or {forms[-1]}"


def _choice(choice: object) -> str:
    return json.dumps(choice)


def _fits(kind: Any, value: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _optional(kind: Any) -> Any:
    """Strip `| None`: TOML has no null."""
    if get_origin(kind) in (Union, UnionType):
        rest = tuple(argument for argument in get_args(kind) if argument is not NoneType)
        return rest[0] if len(rest) == 1 else kind
    return kind


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _shown(value: Any) -> str:
    match value:
        case dict():
            return "a table"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case bool() | int() | float() | str():
            text = json.dumps(value, ensure_ascii=False)
            return f"`{text if len(text) <= 60 else text[:57] + '...'}`"
        case _:
            return f"the date or time `{value}`"
