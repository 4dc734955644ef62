"""The configuration and the cache of ld.so for a rootfs, from what will be in it. Reads the host's libraries only."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from stockade import elf
from stockade.elf.cache import FLAGS, CacheEntry, encode, rank
from stockade.errors import ElfError

__all__ = [
    "CACHE", "CONFIGURATION", "DEFAULT", "Library", "cache", "configured", "directories", "host_directories",
    "is_loader", "library", "text",
]  # fmt: skip

CACHE = "/etc/ld.so.cache"
CONFIGURATION = "/etc/ld.so.conf"

#: Indexed by ldconfig(8) whatever its configuration says.
DEFAULT = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")
_LIBRARY = re.compile(r".+\.so(\.|\Z)")
_INDEXED = re.compile(r"(lib|ld-).*\.so")  # of other names ldconfig(8) takes no notice
_HWCAPS = "/glibc-hwcaps/"
_MOST_INCLUDES = 8
# Names of glibc's dynamic loader (the psABI of each architecture); musl's reads no cache.
_LOADER = re.compile(r"ld-linux[\w-]*\.so\.\d+|ld64\.so\.\d+|ld-\d+\.\d+\.so|ld\.so\.1")


class Library(NamedTuple):
    """What a cache must know of a library: its SONAME, where it has one, and the linkers that it is for."""

    soname: str | None
    flags: int


def is_loader(path: str) -> bool:
    """Whether `path` has the name of glibc's loader, so that a cache is of use."""
    return _LOADER.fullmatch(path.rpartition("/")[2]) is not None


def library(path: str) -> Library | None:
    """The library in the host's file `path`; None for anything else, and for one that ld.so could not load."""
    if not _INDEXED.match(path.rpartition("/")[2]):
        return None
    try:
        found = elf.read(path)
    except (ElfError, OSError):
        return None
    flags = FLAGS.get((found.machine, found.bits)) if found is not None and found.dynamic else None
    return Library(found.soname, flags) if found is not None and flags is not None else None


def host_directories(configuration: str = CONFIGURATION) -> tuple[str, ...]:
    """Directories of the host's ld.so.conf with its includes, in order (ldconfig(8))."""
    return directories(configuration, text, glob.glob)


def text(path: str) -> str:
    """What is in a configuration file of the host; "" where it cannot be read, which ldconfig(8) makes nothing of."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return ""


def directories(
    configuration: str, read: Callable[[str], str], matching: Callable[[str], Iterable[str]]
) -> tuple[str, ...]:
    """Directories that the file `configuration` names, with its includes, in order (ldconfig(8)).

    `read` gives the text of a file, `matching` the paths that a glob(7) pattern matches.
    """
    return tuple(dict.fromkeys(_directories(configuration, read, matching, depth=0)))


def _directories(
    configuration: str, read: Callable[[str], str], matching: Callable[[str], Iterable[str]], *, depth: int
) -> Iterator[str]:
    for line in read(configuration).split("\n"):
        content = line.partition("#")[0].strip()
        words = content.split()
        if words[:1] == ["include"] and depth < _MOST_INCLUDES:
            for pattern in words[1:]:
                for name in sorted(matching(os.path.join(os.path.dirname(configuration), pattern))):
                    yield from _directories(name, read, matching, depth=depth + 1)
        elif words[:1] != ["hwcap"]:
            directory = content.partition("=")[0].rstrip().rstrip("/")
            if directory.startswith("/"):
                yield directory


def configured(directories: Iterable[str], files: Iterable[str]) -> bytes:
    """Content of a rootfs's ld.so.conf: those of `directories` in which one of `files` is a library.

    Both as canonical paths of the rootfs; the order of `directories` is kept.
    """
    holding = {directory for directory, _, name in (path.rpartition("/") for path in files) if _LIBRARY.match(name)}
    hwcaps = {directory.partition(_HWCAPS)[0] for directory in holding}
    wanted = [directory for directory in dict.fromkeys(directories) if directory in holding | hwcaps]
    return os.fsencode("".join(f"{directory}\n" for directory in wanted))


def cache(searched: Iterable[str], libraries: Mapping[str, Library]) -> bytes:
    """Content of a rootfs's ld.so.cache: `libraries`, by their canonical paths in it, that lie in `searched`.

    Links to a library count as it does. Of libraries with one name the one in the first of `searched` wins.
    """
    within: dict[str, dict[str, Library]] = {}
    for path, found in libraries.items():
        above, _, name = path.rpartition("/")
        if _INDEXED.match(name):
            within.setdefault(above, {})[name] = found
    hwcaps = sorted(directory for directory in within if _HWCAPS in directory)
    entries: list[tuple[str, CacheEntry]] = []
    for directory in dict.fromkeys(searched):
        for place in (*(found for found in hwcaps if found.startswith(f"{directory}{_HWCAPS}")), directory):
            entries += _entries(place, within.get(place, {}), place[len(directory) + len(_HWCAPS) :])
    return encode(entries)


def _entries(place: str, libraries: Mapping[str, Library], hwcaps: str) -> Iterator[tuple[str, CacheEntry]]:
    """Each by its SONAME, where it has none by its own name, and by both where that is the linker's (`libx.so`).

    Of several with one SONAME ldconfig(8) takes the one of that name, and below glibc-hwcaps the newest; so it is here,
    and the newest too where none has the name.
    """
    newest: dict[tuple[str, int], str] = {}
    for name, found in sorted(libraries.items(), key=lambda item: rank(os.fsencode(item[0]))):
        soname = found.soname or name
        names = {soname, name} if name.endswith(".so") and soname.startswith(name) else {soname}
        newest.update(((known, found.flags), name) for known in names)
    for (known, flags), name in sorted(newest.items()):
        there = None if hwcaps else libraries.get(known)
        chosen = known if there is not None and there.flags == flags else name
        yield known, CacheEntry(flags, f"{place}/{chosen}", hwcaps)
