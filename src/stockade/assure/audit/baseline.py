"""The baseline: findings that somebody has looked at and accepts, each with a reason."""

from __future__ import annotations

import datetime
import fnmatch
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from stockade.errors import NotFoundError, UsageError
from stockade.records.finding import Finding

from .catalogue import rules
from .seen import Seen

__all__ = ["Baseline", "read"]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accepted finding: its code, its path as the report writes it (or a glob), why, and until which day."""

    code: str
    path: str = ""
    reason: Annotated[str, msgspec.Meta(min_length=1)]
    expires: datetime.date | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    accept: tuple[Entry, ...] = ()


class Baseline:
    """The entries of one baseline file, as of the day `today`, and which of them were of use."""

    def __init__(self, entries: tuple[Entry, ...] = (), *, file: str = "", today: datetime.date | None = None) -> None:
        self._file = file
        self._today = today or datetime.date.today()
        self._entries = entries
        self._used: set[int] = set()
        self._by_code: dict[str, list[int]] = {}
        for number, entry in enumerate(entries):
            self._by_code.setdefault(entry.code, []).append(number)

    def accepts(self, finding: Finding) -> str | None:
        """The reason why `finding` is accepted; None when it is not."""
        for number in self._by_code.get(finding.code, ()):
            entry = self._entries[number]
            if entry.path == finding.path or _pattern(entry.path).match(finding.path):
                self._used.add(number)
                if not self._expired(entry):
                    return entry.reason
        return None

    def _expired(self, entry: Entry) -> bool:
        return entry.expires is not None and entry.expires < self._today

    def remains(self) -> Iterator[Seen]:
        """What is wrong with the baseline itself, once every finding was asked for."""
        for number, entry in enumerate(self._entries):
            what = f"`{self._file}` accepts {entry.code}{f' at `{entry.path}`' if entry.path else ''}"
            if entry.code not in rules():
                yield Seen("BASELINE-UNKNOWN", "", f"{what}, and there is no such rule")
            elif number not in self._used:
                yield Seen("BASELINE-UNUSED", "", f"{what}, and nothing like it was found")
            elif self._expired(entry):
                yield Seen("BASELINE-EXPIRED", "", f"{what} until {entry.expires}")


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(glob))


def read(path: Path, *, today: datetime.date | None = None) -> Baseline:
    """The baseline in a TOML file. NotFoundError when it is not there, UsageError when it is no baseline."""
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
        found = msgspec.convert(table, _File)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no baseline `{path}`", hint="docs/audit.md shows how one looks") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(
            f"`{path}` is no baseline: {error}",
            hint='an entry is `[[accept]]` with `code`, `path`, `reason` and, if it shall end, `expires = 2030-12-31`',
        ) from error
    return Baseline(found.accept, file=path.name, today=today)
