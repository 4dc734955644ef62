"""The reference page, made from the parser and the records: `python -m stockade.cli.reference > docs/reference.md`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from typing import Any

import msgspec

from stockade import schema
from stockade.cli.parser import Parser, build, verbs
from stockade.records.spec import Spec
from stockade.schema.remarks import remarks
from stockade.specfile import shape

__all__ = ["page"]

_HEAD = """\
# Reference

Made from the program itself: `python -m stockade.cli.reference > docs/reference.md`.

## Command line

Data goes to standard output, all else to standard error. Errors are `error: …` with a `hint: …` where there is a
cure. Exit statuses: 0 good; 1 failed, or something was found; 2 the command line or a spec is wrong; 130 interrupted.
`run`, `exec` and `shell` pass the command's status on (128 + n after signal n) and use 125 for failures of Stockade's
own, 126 for a command that cannot be executed and 127 for one that is not in the jail; a malformed command line is
2 there too.

`-v` before or after a verb says more, `-vv` shows tracebacks. `$STOCKADE_HOME` moves specs, state and run-time files
below one directory.
"""

_SPEC = """\
## Spec

A spec is `NAME.toml` in `/etc/stockade` (root) or `~/.config/stockade`, or any file named with its path. Unknown keys
are errors. Sizes are bytes, or a number with K, M, G or T, in quotes; times are seconds. `${secret:NAME}`,
`${secret-file:NAME}` and `${public:NAME}` are filled in where texts of `[files.content]` and exercises have them.
"""

_REPORTS = """\
## JSON

Every verb that reports takes `--json`. A report tells its name in `report` and its version in `version`; fields are
only ever added within a version. The schemas, and those of specs and locks, lie in the package, in
`stockade/schema/`:
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([_HEAD, *_command_line(), _SPEC, *_tables(), _REPORTS, *_schemas()]).rstrip("\n") + "\n"


def _command_line() -> Iterator[str]:
    for parser in verbs(build()).values():
        yield from _verb(parser)


def _verb(parser: Parser) -> Iterator[str]:
    """One verb; after a family of verbs those of its own."""
    yield f"### {parser.prog}\n"
    yield f"`{_usage(parser)}`\n"
    yield f"{parser.description}\n"
    inner = verbs(parser)
    for action in parser._actions:
        if action.help is not argparse.SUPPRESS and action.dest != "help" and not inner:
            yield f"- {_form(action)}: {action.help}"
    yield ""
    for one in inner.values():
        yield from _verb(one)


def _usage(parser: Parser) -> str:
    words = [parser.prog]
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or action.dest == "help":
            continue
        if action.option_strings:
            words.append(f"[{action.option_strings[0]}{_value(action)}]")
        else:
            name = str(action.metavar)
            words.append({"?": f"[{name}]", "+": f"{name} …"}.get(str(action.nargs), name))
    return " ".join([*words, *([parser.child] if parser.child else [])])


def _form(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    return ", ".join(f"`{option}{_value(action)}`" for option in action.option_strings)


def _value(action: argparse.Action) -> str:
    """What follows an option, with a space before it, as the help has it."""
    if action.nargs == 0:
        return ""
    choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices is not None else ""
    return f" {action.metavar or choices}"


def _tables() -> Iterator[str]:
    for header, record in shape.tables(Spec):
        yield f"### {header}\n"
        if record.__doc__:
            yield f"{inspect.cleandoc(record.__doc__)}\n"
        said = remarks(record)
        yield "| key | value | default | |"
        yield "|---|---|---|---|"
        for field in msgspec.structs.fields(record):
            cells = (shape.form(field.type), _default(field), said.get(field.name, ""))
            yield f"| `{field.encode_name}` | {' | '.join(map(_cell, cells))} |"
        yield ""


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    default: Any = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if default is None or default == "" or default == () or default == {}:
        return "none"
    if isinstance(default, msgspec.Struct):
        return "as below"
    return f"`{msgspec.json.encode(default).decode()}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _schemas() -> Iterator[str]:
    for name, record in schema.DOCUMENTS.items():
        first = inspect.cleandoc(record.__doc__ or "").partition("\n\n")[0]
        yield f"- `{name}.json`: {' '.join(first.split())}"


if __name__ == "__main__":
    print(page(), end="")
