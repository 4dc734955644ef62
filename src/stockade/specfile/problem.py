"""What is wrong with a spec: a place in it, a message and a cure. Knows nothing of any rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

Place = tuple[str | int, ...]
"""Keys and indexes from the top of a spec: `("exercises", 0, "command")`."""


class Problem(NamedTuple):
    """One mistake. `message` is a whole sentence that names the key; `hint` is "" where it says the cure itself."""

    place: Place
    message: str
    hint: str = ""


def table(place: Place) -> str:
    """Name a table as its header is written: `[files]`, `[[exercises]]` number 2, "the spec" for the top."""
    if not place:
        return "the spec"
    if isinstance(place[-1], int):
        return f"`[[{dotted(place[:-1])}]]` number {place[-1] + 1}"
    return f"`[{dotted(place)}]`"


def key(place: Place) -> str:
    """Name a key with its table: "`command` in `[service]`"."""
    if len(place) == 1:
        return f"`{dotted(place)}`"
    if isinstance(place[-1], int):
        return f"item {place[-1] + 1} of {key(place[:-1])}"
    return f"`{dotted(place[-1:])}` in {table(place[:-1])}"


def dotted(place: Place) -> str:
    """Write keys as TOML does, quoted where they are not bare."""
    return ".".join(part if _bare(part) else f'"{part}"' for part in map(str, place))


def _bare(part: str) -> bool:
    return part.isascii() and part.replace("-", "_").isidentifier() or part.isdigit()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean `…`?" with the nearest known name, or "" when none is near."""
    import difflib  # only for a name that is wrong

    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean `{near[0]}`?" if near else ""
