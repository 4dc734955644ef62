"""Read specs and say what is wrong with them, where, and how to put it right. Changes no file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from stockade import places
from stockade.errors import NotFoundError, SpecError
from stockade.records.spec import Spec
from stockade.specfile import rules

if TYPE_CHECKING:
    from stockade.specfile.draft import derive, exercise_command, new
    from stockade.specfile.problem import Problem

__all__ = ["derive", "exercise_command", "find", "load", "loads", "new", "read", "recipe", "recipes", "specs"]

#: What to do about a mistake in TOML, by the beginning of what tomllib says of it.
_CURES = {
    "Cannot overwrite": "each key stands once in its table",
    "Cannot declare": "each table stands once in a file",
}
_DOTTED = re.compile("', '")  # between the keys of a table, in its messages


def __getattr__(name: str) -> object:
    """What writes specs, imported at first use: reading one needs no writer of TOML."""
    if name not in ("derive", "exercise_command", "new"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stockade.specfile import draft

    return getattr(draft, name)


def loads(text: str, where: str) -> Spec:
    """Return the spec that the TOML `text` says. `where` names its origin in messages, usually a path.

    Raises `SpecError`: its message holds every mistake, one a line, each with its place and cure.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _malformed(str(error), text, where) from error
    try:
        spec = msgspec.convert(data, Spec)
    except msgspec.ValidationError:
        from stockade.specfile import shape

        found = list(shape.check(data))
    else:
        found = list(rules.problems(spec))
        if not found:
            return spec
    raise _mistaken(found, text, where)


def _mistaken(found: Iterable[Problem], text: str, where: str) -> SpecError:
    """The error that tells every mistake in `text` with its line."""
    from stockade.specfile.position import line_of

    located = sorted(((line_of(text, problem.place), problem) for problem in found), key=lambda pair: pair[0])
    if len(located) == 1:
        [(line, problem)] = located
        return SpecError(f"{_at(where, line)}: {problem.message}", hint=problem.hint or None)
    return SpecError(
        "\n".join(
            f"{_at(where, line)}: {problem.message}{f' ({problem.hint})' if problem.hint else ''}"
            for line, problem in located
        )
    )


def _at(where: str, line: int) -> str:
    return f"{where}:{line}" if line else where


def load(path: str | os.PathLike[str]) -> Spec:
    """Return the spec in the file `path`. Raises `NotFoundError` or `SpecError`."""
    where = os.fspath(path)
    try:
        text = Path(where).read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        hint = f"`stockade new {Path(where).stem} --output {where} -- COMMAND` writes one"
        raise NotFoundError(f"no spec at `{where}`", hint=hint) from error
    except UnicodeDecodeError as error:
        raise SpecError(f"`{where}` is not UTF-8 text, at byte {error.start}", hint="save it as UTF-8") from error
    except OSError as error:
        raise SpecError(f"cannot read `{where}`: {error.strerror}", hint="name a file that you may read") from error
    return loads(text, where)


def read(name_or_path: str) -> Spec:
    """Find and load a spec; one found by name must bear that name."""
    path = find(name_or_path)
    spec = load(path)
    if not _is_path(name_or_path) and spec.name != name_or_path:
        raise SpecError(
            f'`{path}` says `name = "{spec.name}"`, and its file is called `{path.name}`',
            hint=f"rename the file to `{spec.name}.toml`, or change its `name`",
        )
    return spec


def find(name_or_path: str) -> Path:
    """Return the file that `name_or_path` means.

    With a slash, or ending in `.toml`: that file. Otherwise NAME.toml among the owner's specs, or
    else the recipe of that name. Raises `NotFoundError` with the nearest name.
    """
    if _is_path(name_or_path):
        return Path(name_or_path)
    for path in (places.configuration() / f"{name_or_path}.toml", recipe(name_or_path)):
        if path.is_file():
            return path
    here = Path(f"{name_or_path}.toml")
    if here.is_file():
        hint = f"a spec in this directory is named with its suffix: `{here}`"
    elif near := _nearest(name_or_path):
        hint = f"did you mean `{near}`?"
    else:
        hint = f"`stockade recipes` lists what is ready; `stockade new {name_or_path} -- COMMAND` writes a spec"
    raise NotFoundError(f"no spec in `{places.configuration()}` and no recipe is called `{name_or_path}`", hint=hint)


def _nearest(name: str) -> str:
    """The spec or recipe whose name is nearest, "" when none is near."""
    import difflib  # only for a name that is wrong

    return next(iter(difflib.get_close_matches(name, [*specs(), *recipes()], n=1)), "")


def specs() -> list[str]:
    """Return the names of the owner's specs, sorted."""
    return sorted(path.stem for path in places.configuration().glob("*.toml"))


def recipe(name: str) -> Path:
    """Return where the recipe `name` is, or would be."""
    return Path(os.path.dirname(os.path.dirname(__file__)), "recipes", f"{name}.toml")


def recipes() -> list[str]:
    """Return the names of the recipes that come with Stockade, sorted."""
    return sorted(path.stem for path in recipe("any").parent.glob("*.toml"))


def _is_path(name_or_path: str) -> bool:
    return "/" in name_or_path or name_or_path.endswith(".toml")


def _malformed(message: str, text: str, where: str) -> SpecError:
    """The error for what tomllib says of `text`, with the position that it appends in front, as compilers have it."""
    match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message, re.DOTALL)
    said, line, column = (match[1], int(match[2]), int(match[3])) if match else (message, 0, 0)
    said = said.removesuffix(" (at end of document)")
    said = re.sub(r"\('(.*?)',?\)", lambda keys: f"`[{_DOTTED.sub('.', keys[1])}]`", said)
    cure = next((cure for start, cure in _CURES.items() if said.startswith(start)), "")
    if said.startswith("Invalid initial character") and "{" in text.split("\n")[line - 1][:column]:
        cure = "an inline table `{ … }` is one line, with no comma at its end"
    place = f"{where}:{line}:{column}" if line else where
    hint = cure or 'a spec is TOML: `key = "text"` below `[table]`'
    return SpecError(f"{place}: not TOML: {said[:1].lower()}{said[1:]}", hint=hint)
