"""glibc's search for libraries, as ld.so(8) says and elf/dl-load.c does. Never runs ld.so."""

from __future__ import annotations

import re

from stockade.elf import EM_386, EM_AARCH64, EM_RISCV, EM_X86_64
from stockade.elf import cache as ldcache

from .cpu import Processor, processor
from .host import Host
from .linkmap import Files, Object

__all__ = ["LINKERS", "Glibc"]

# Where the dynamic linker of a machine and class lies, for libraries, which don't say.
LINKERS = {
    (EM_X86_64, 64): "/lib64/ld-linux-x86-64.so.2",
    (EM_X86_64, 32): "/libx32/ld-linux-x32.so.2",
    (EM_386, 32): "/lib/ld-linux.so.2",
    (EM_AARCH64, 64): "/lib/ld-linux-aarch64.so.1",
    (40, 32): "/lib/ld-linux-armhf.so.3",
    (EM_RISCV, 64): "/lib/ld-linux-riscv64-lp64d.so.1",
    (21, 64): "/lib64/ld64.so.2",
    (22, 64): "/lib/ld64.so.1",
}
_TOKEN = re.compile(r"\$(?:\{(ORIGIN|PLATFORM|LIB)\}|(ORIGIN|PLATFORM|LIB)(?![A-Za-z0-9_]))")
# It begins with a literal byte: so the search goes from one to the next, twenty times as fast.
_SYSTEM_DIRECTORIES = re.compile(rb"/(?<=\0/)(?:usr/)?lib[^\0]*/\0(?:/(?:usr/)?lib[^\0]*/\0)*")
_LINKER_LIMIT = 4 << 20


class Linker:
    """What is built into one ld.so: its default directories in order, and whether it knows the old subdirectories."""

    def __init__(self, host: Host, path: str) -> None:
        data = host.data(path, limit=_LINKER_LIMIT) or b""
        found = _SYSTEM_DIRECTORIES.search(data)
        names = found[0].decode("ascii", "replace").split("\0") if found else ["/lib64/", "/usr/lib64/"]
        self.directories = tuple(dict.fromkeys(name.rstrip("/") for name in names if name))
        # 2.33 to 2.36 name the old subdirectories in --help; older ones have no glibc-hwcaps at all.
        self.legacy = b"Legacy HWCAP subdirectories" in data or b"glibc-hwcaps" not in data

    @property
    def lib(self) -> str:
        """`$LIB`: the first default directory below / or /usr."""
        return self.directories[0].removeprefix("/usr").lstrip("/")


class Glibc:
    """Search rules of glibc's ld.so below one root."""

    def __init__(self, files: Files, linker: str, like: Object, library_path: str, directory: str) -> None:
        self._files, self._host = files, files.host
        self._linker_path, self._like, self._directory = linker, like, directory
        self._kind = (like.elf.machine, like.elf.bits)
        self._linker: Linker | None = None
        self._cache: ldcache.Cache | None = None
        self._below: dict[str, tuple[str, ...]] = {}
        self._library_path = library_path
        self._environment: tuple[str, ...] | None = None

    @property
    def linker(self) -> Linker:
        """The facts built into ld.so, read when first asked for."""
        if self._linker is None:
            self._linker = Linker(self._host, self._linker_path)
        return self._linker

    @property
    def _processor(self) -> Processor:
        return processor(self._like.elf.machine)

    def system_directories(self) -> tuple[str, ...]:
        """The default directories."""
        return self.linker.directories

    def reset(self) -> None:
        """Forget what depends on the program: `$ORIGIN` in LD_LIBRARY_PATH."""
        self._environment = None

    def expand(self, name: str, loader: Object) -> str:
        """Replace `$ORIGIN`, `$LIB` and `$PLATFORM`, which may stand in NEEDED itself."""
        if "$" not in name:
            return name

        def value(match: re.Match[str]) -> str:
            token = match[1] or match[2]
            if token == "ORIGIN":
                return loader.origin
            return self.linker.lib if token == "LIB" else self._processor.platform

        return _TOKEN.sub(value, name)

    def names(self, item: Object) -> tuple[str, ...]:
        """An object answers to the name it was opened by and to its SONAME."""
        return (item.path,) if item.elf.soname is None else (item.path, item.elf.soname)

    def find(self, name: str, loader: Object, main: Object) -> tuple[Object | None, str, list[str]]:
        """_dl_map_object: a name with a slash is a path; else RPATHs, LD_LIBRARY_PATH, RUNPATH, cache, defaults."""
        if "/" in name:
            return self._files.open(self._absolute(name), self._like), "path", []
        searched: list[str] = []
        # RPATH counts only where the object has no RUNPATH, and then that of its loaders too.
        if loader.elf.runpath is None:
            current: Object | None = loader
            while current is not None:
                if current.elf.rpath is not None:
                    found = self._in(self._rpath(current, current.elf.rpath), name, searched)
                    if found is not None:
                        return found, f"RPATH of `{current.real}`", searched
                current = current.loader
        if self._library_path:
            if self._environment is None:
                self._environment = self._split(self._library_path.replace(";", ":"), main)
            found = self._in(self._environment, name, searched)
            if found is not None:
                return found, "LD_LIBRARY_PATH", searched
        if loader.elf.runpath is not None:
            if loader.runpath is None:
                loader.runpath = self._split(loader.elf.runpath, loader)
            found = self._in(loader.runpath, name, searched)
            if found is not None:
                return found, f"RUNPATH of `{loader.real}`", searched
        found = self._cached(name, bare=loader.elf.nodeflib)
        if found is not None:
            return found, "ld.so.cache", searched
        if not loader.elf.nodeflib:
            found = self._in(self.linker.directories, name, searched)
            if found is not None:
                return found, "default directory", searched
        return None, "", searched

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"{self._directory.rstrip('/')}/{path}"

    def _rpath(self, item: Object, text: str) -> tuple[str, ...]:
        if item.rpath is None:
            item.rpath = self._split(text, item)
        return item.rpath

    def _split(self, text: str, item: Object) -> tuple[str, ...]:
        """The directories of a path list. ld.so reads an empty one as the working directory."""
        if not text:
            return ()
        names = (self.expand(name, item) for name in text.split(":"))
        return tuple(self._absolute(name.rstrip("/") or "/") if name else self._directory for name in names)

    def _in(self, directories: tuple[str, ...], name: str, searched: list[str]) -> Object | None:
        for directory in directories:
            if directory not in searched:
                searched.append(directory)
            for place in self._places(directory):
                found = self._files.open(f"{place}/{name}", self._like)
                if found is not None:
                    return found
        return None

    def _places(self, directory: str) -> tuple[str, ...]:
        """`directory`, after those of its hardware subdirectories that exist."""
        known = self._below.get(directory)
        if known is None:
            found: list[str] = []
            base = directory.rstrip("/")
            if self._host.walk(directory).is_directory:
                if self._host.walk(f"{base}/glibc-hwcaps").is_directory:
                    found += [f"{base}/glibc-hwcaps/{name}" for name in self._processor.hwcaps]
                if self.linker.legacy:
                    heads = {"tls", "x86_64", *self._processor.legacy}
                    if any(self._host.walk(f"{base}/{head}").is_directory for head in heads if "/" not in head):
                        found += [f"{base}/{name}" for name in self._processor.legacy]
                found = [place for place in found if self._host.walk(place).is_directory] + [base]
            known = self._below[directory] = tuple(found)
        return known

    def _cached(self, name: str, *, bare: bool) -> Object | None:
        """_dl_load_cache_lookup, and the rule that DF_1_NODEFLIB bars the default directories' entries (`bare`)."""
        if self._cache is None:
            self._cache = ldcache.Cache(self._host.data("/etc/ld.so.cache", limit=64 << 20) or b"")
        path = self._best(self._cache.entries(name))
        if path is None:
            return None
        if bare and path.startswith(tuple(f"{directory}/" for directory in self.linker.directories)):
            return None
        return self._files.open(path, self._like)

    def _best(self, entries: list[ldcache.CacheEntry]) -> str | None:
        flags = ldcache.FLAGS.get(self._kind)
        if len(entries) == 1 and entries[0].flags == flags and entries[0].hwcaps == "":
            return entries[0].path
        usable = [entry for entry in entries if flags is None or entry.flags == flags]
        if flags is None:  # told apart by opening: the first of the right class and machine
            usable = [entry for entry in usable if self._fits(entry.path)]
        for wanted in (*self._processor.hwcaps, "", None):
            for entry in usable:
                if entry.hwcaps == wanted and (wanted is not None or self.linker.legacy):
                    return entry.path
        return None

    def _fits(self, path: str) -> bool:
        return self._files.open(path, self._like, strict=False) is not None
