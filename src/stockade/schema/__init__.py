"""JSON schemas of the spec, the lock and every `--json` report, for editors and for programs that read them.

`python -m stockade.schema` writes them anew beside this module, from the records.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec

from stockade.records.lock import Lock
from stockade.records.machine import MACHINE_REPORTS
from stockade.records.report import REPORTS
from stockade.records.spec import Spec
from stockade.schema.remarks import remarks

__all__ = ["DOCUMENTS", "generate", "path", "write"]

DOCUMENTS: dict[str, type[msgspec.Struct]] = {
    "spec": Spec,
    "lock": Lock,
    **{str(report.__struct_config__.tag): report for report in (*REPORTS, *MACHINE_REPORTS)},
}
"""The record of each schema, by the schema's name."""


def path(name: str) -> Path:
    """Return the file that holds the schema `name`."""
    return Path(__file__).with_name(f"{name}.json")


def generate(name: str) -> str:
    """Return the text of the schema `name`, made from its record."""
    (top,), definitions = msgspec.json.schema_components([DOCUMENTS[name]], ref_template="#/$defs/{name}")
    for record in _records(DOCUMENTS[name]):
        properties = definitions[record.__name__]["properties"]
        for field, remark in remarks(record).items():
            properties[field].setdefault("description", remark)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"stockade {name}",
        **top,
        "$defs": _plain(definitions),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _records(record: type[msgspec.Struct]) -> Iterator[type[msgspec.Struct]]:
    """Yield `record` and every record that it is made of, each once."""
    seen: list[type[msgspec.Struct]] = []
    waiting: list[Any] = [record]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if kind not in seen:
                seen.append(kind)
                yield kind
                waiting += [field.type for field in msgspec.structs.fields(kind)]
        else:
            waiting += get_args(kind)


def _plain(value: Any) -> Any:
    r"""Write patterns as JSON Schema wants them (ECMA 262 has no `\Z`), and docstrings without their indentation.

    Which keys a table with literal ones has is left out: only some versions of msgspec tell.
    """
    match value:
        case {"propertyNames": {"enum": _}, **rest}:
            return _plain(rest)
        case {"pattern": str(pattern), **rest}:
            return {"pattern": pattern.replace(r"\Z", "$"), **_plain(rest)}
        case {"description": str(text), **rest}:
            # Python 3.13 takes the indentation out of docstrings; earlier ones do not.
            return {"description": inspect.cleandoc(text), **_plain(rest)}
        case dict():
            return {name: _plain(inner) for name, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case _:
            return value


def write() -> None:
    """Write every schema to its file."""
    for name in DOCUMENTS:
        path(name).write_text(generate(name), encoding="utf-8")
