"""The objects that a dynamic linker has loaded, and the walk over what they need. Knows no search rule."""

from __future__ import annotations

from typing import Protocol

import msgspec

from stockade import elf

from ..errors import ElfError
from .host import Host

__all__ = ["Files", "Libraries", "Library", "Missing", "Object", "Search", "Unusable", "load"]

_VDSO = ("linux-vdso.so.1", "linux-gate.so.1", "linux-vdso64.so.1", "linux-vdso32.so.1")


class Library(msgspec.Struct, frozen=True):
    """One library of a program: the `name` asked for, the `path` under which it was found and its canonical path.

    `needed_by` is the canonical path of the object that asked; `rule` says which search rule found it.
    """

    name: str
    path: str
    real: str
    needed_by: str
    rule: str


class Missing(msgspec.Struct, frozen=True):
    """A library that was not found, or not usable (`reason`), and the directories that were searched."""

    name: str
    needed_by: str
    searched: tuple[str, ...] = ()
    reason: str = "not found"


class Libraries(msgspec.Struct, frozen=True):
    """Every library of a program in the order in which the dynamic linker loads them, itself included.

    `interpreter` is the canonical path of what PT_INTERP names, None where it names nothing.
    """

    program: str
    interpreter: str | None
    libraries: tuple[Library, ...] = ()
    missing: tuple[Missing, ...] = ()


class Object(msgspec.Struct, eq=False):
    """A loaded object. `path` is the name it was opened by, `loader` the object that first asked for it."""

    path: str
    real: str
    elf: elf.ElfFile
    identity: tuple[int, int]
    origin: str
    loader: Object | None = None
    rpath: tuple[str, ...] | None = None
    runpath: tuple[str, ...] | None = None


class Search(Protocol):
    """The search rules of one dynamic linker."""

    def expand(self, name: str, loader: Object) -> str:
        """`name` as NEEDED gives it, with `$ORIGIN` and the like replaced."""

    def names(self, item: Object) -> tuple[str, ...]:
        """The names that a loaded object answers to, beside those by which it was asked for."""

    def find(self, name: str, loader: Object, main: Object) -> tuple[Object | None, str, list[str]]:
        """The object for `name` (None: not found), the rule that found it, the directories searched."""


class Unusable(Exception):
    """A file that makes the dynamic linker stop its search with an error."""


class Files:
    """ELF files of a host, each read once."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._known: dict[str, elf.ElfFile | ElfError | None] = {}

    def read(self, real: str) -> elf.ElfFile | None:
        """The ELF file at the canonical path `real`; see `elf.read`."""
        if real not in self._known:
            try:
                self._known[real] = elf.read(self.host.outer(real))
            except ElfError as error:
                self._known[real] = error
        found = self._known[real]
        if isinstance(found, ElfError):
            raise found
        return found

    def open(self, path: str, like: Object, *, strict: bool = True) -> Object | None:
        """Open `path` as a library for `like`; None when it isn't there or is of another class or machine.

        glibc's open_verify: a file of the right class that is no library ends the search (Unusable);
        with `strict` False it is skipped instead.
        """
        found = self.host.walk(path)
        if found.status is None:
            return None
        try:
            file = self.read(found.path)
        except (ElfError, OSError) as error:
            raise Unusable(str(error)) from None
        if file is None:
            if strict:
                raise Unusable(f"`{path}` is no ELF file")
            return None
        if file.bits != like.elf.bits or file.machine != like.elf.machine:
            return None
        if file.type != "DYN":
            raise Unusable(f"`{path}` is no shared library")
        identity = (found.status.st_dev, found.status.st_ino)
        return Object(path, found.path, file, identity, path.rpartition("/")[0] or "/")


def load(main: Object, search: Search, files: Files, linker: Object | None, preload: tuple[str, ...]) -> Libraries:
    """Load everything that `main` needs, breadth first, as `_dl_map_object_deps` does."""
    by_name: dict[str, Object] = {}
    by_identity: dict[tuple[int, int], Object] = {}
    libraries: list[Library] = []
    missing: dict[str, Missing] = {}
    listed = {id(main)}
    order = [main]

    def register(item: Object) -> None:
        by_identity[item.identity] = item
        for name in search.names(item):  # of several the first that was loaded answers
            by_name.setdefault(name, item)

    def take(name: str, loader: Object, *, optional: bool, rule: str = "") -> None:
        if id(by_name.get(name)) in listed:  # asked for before: most are
            return
        name = search.expand(name, loader)
        if name in missing or name in _VDSO:
            return
        found = by_name.get(name)
        if found is None:
            try:
                found, how, searched = search.find(name, loader, main)
            except Unusable as error:
                missing[name] = Missing(name, loader.real, (), str(error))
                return
            if found is None:
                if not optional:
                    missing[name] = Missing(name, loader.real, tuple(searched))
                return
            rule = rule or how
            same = by_identity.get(found.identity)
            if same is None:
                found.loader = loader
                register(found)
            else:
                found = same
            by_name[name] = found
        if id(found) not in listed:
            listed.add(id(found))
            order.append(found)
            rule = "interpreter" if found is linker else rule
            libraries.append(Library(name, found.path, found.real, loader.real, rule))

    for item in (main, linker):
        if item is not None:
            register(item)
    for name in preload:
        take(name, main, optional=True, rule="LD_PRELOAD")
    for current in order:
        for name in current.elf.filters + current.elf.needed:
            take(name, current, optional=False)
        for name in current.elf.auxiliaries:
            take(name, current, optional=True)
    asked = linker.real if linker is not None and main.elf.interpreter is not None else None
    return Libraries(main.real, asked, tuple(libraries), tuple(missing.values()))
