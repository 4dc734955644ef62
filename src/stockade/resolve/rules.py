"""The data of the classification rules, `rules.toml`, ready to ask."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import msgspec

from .pattern import Patterns

__all__ = ["Never", "Rules", "rules"]


class _Never(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: str
    patterns: tuple[str, ...]
    secret: bool = False


class _Socket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    patterns: tuple[str, ...]
    message: str


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tmpfs: tuple[str, ...]
    logs: tuple[str, ...]
    fixed: frozenset[str]
    built: frozenset[str]
    homes: tuple[str, ...]
    private_devices: tuple[str, ...]
    kernel_optional: tuple[str, ...]
    never: tuple[_Never, ...]
    socket: tuple[_Socket, ...]


class Never:
    """One group of files that are left out: why, and whether they are secret."""

    def __init__(self, data: _Never) -> None:
        self.reason, self.secret = data.reason, data.secret
        self.patterns = Patterns(data.patterns)


class Rules:
    """What the rules know of paths. All paths given to it are canonical or as a program named them."""

    def __init__(self, data: _Data) -> None:
        self.fixed, self.built = data.fixed, data.built
        self.tmpfs, self.logs = Patterns(data.tmpfs), Patterns(data.logs)
        self.tmpfs_tops = data.tmpfs
        self.in_home = Patterns([f"{home}/*" for home in data.homes])
        self.private_devices = Patterns([f"/dev/{name}" for name in data.private_devices])
        self.kernel_optional = Patterns(data.kernel_optional)
        self.never = tuple(Never(group) for group in data.never)
        self._any_never = Patterns([pattern for group in data.never for pattern in group.patterns])
        self._sockets = tuple((Patterns(group.patterns), group.message) for group in data.socket)

    def left_out(self, path: str) -> Never | None:
        """The rule-13 group that `path` belongs to."""
        if not self._any_never.covers(path):
            return None
        return next(group for group in self.never if group.patterns.covers(path))

    def socket(self, path: str) -> str:
        """What to say about a socket of another process."""
        return next((message for patterns, message in self._sockets if patterns.covers(path)), "")

    def temporary(self, path: str) -> bool:
        """`path` is on a tmpfs in the jail."""
        return self.tmpfs.covers(path)


@functools.cache
def rules() -> Rules:
    """The rules, read once."""
    text = Path(__file__).with_name("rules.toml").read_text(encoding="utf-8")
    return Rules(msgspec.convert(tomllib.loads(text), _Data))
