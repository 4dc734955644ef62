"""Find every library of a program, as its own dynamic linker would. Never executes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ElfError, ResolveError
from .glibc import LINKERS, Glibc
from .host import Host
from .linkmap import Files, Libraries, Library, Missing, Object, Unusable, load

if TYPE_CHECKING:
    from .musl import Musl

__all__ = ["Libraries", "Library", "Loader", "Missing", "closure"]


class Loader:
    """Resolves libraries of many programs below one root, reading each file once.

    `library_path` is LD_LIBRARY_PATH, `preload` LD_PRELOAD, `directory` the service's working directory.
    """

    def __init__(
        self, host: Host, *, library_path: str = "", preload: tuple[str, ...] = (), directory: str = "/"
    ) -> None:
        self.host = host
        self.files = Files(host)
        self._library_path, self._preload, self._directory = library_path, preload, directory
        self._searches: dict[tuple[str, int, int], Glibc | Musl] = {}

    def libraries(self, program: str) -> Libraries | None:
        """Every library of the ELF file that `program` leads to; None when it is no ELF file.

        Raises ElfError for a damaged file, ResolveError when there is none or its interpreter is missing.
        """
        found = self.host.walk(program)
        if found.status is None:
            raise ResolveError(f"cannot resolve the libraries of `{program}`: {_WHY.get(found.error, found.error)}")
        try:
            self.files.read(found.path)
        except OSError as error:
            raise ResolveError(f"cannot read `{program}`: {error.strerror}") from None
        main = self._object(program)
        if main is None:
            return None
        linker = self._linker(main, program)
        if not main.elf.dynamic:
            return Libraries(found.path, linker.real if linker and main.elf.interpreter else None)
        search = self._search(linker, main)
        search.reset()
        return load(main, search, self.files, linker, self._preload)

    def lookup(self, name: str, by: str) -> str | None:
        """The path under which dlopen(3) of `name`, called by the library at `by`, finds it; None if it doesn't."""
        main = self._object(by)
        if main is None:
            return None
        search = self._search(self._linker(main, by), main)
        search.reset()
        try:
            found, _, _ = search.find(name, main, main)
        except Unusable:
            return None
        return found.path if found is not None else None

    def system_directories(self, library: str) -> tuple[str, ...]:
        """The directories that the dynamic linker of `library` searches last."""
        main = self._object(library)
        return self._search(self._linker(main, library), main).system_directories() if main is not None else ()

    def _object(self, path: str) -> Object | None:
        found = self.host.walk(path)
        if found.status is None:
            return None
        try:
            file = self.files.read(found.path)
        except (ElfError, OSError):
            return None
        if file is None:
            return None
        # The kernel gives ld.so the program's real path, so $ORIGIN is that of the symlink's target.
        origin = found.path.rpartition("/")[0] or "/"
        return Object(found.path, found.path, file, (found.status.st_dev, found.status.st_ino), origin)

    def _linker(self, main: Object, program: str) -> Object | None:
        """The dynamic linker that PT_INTERP names; for a library the usual one of its machine."""
        asked = main.elf.interpreter
        path = asked or LINKERS.get((main.elf.machine, main.elf.bits), "")
        try:
            found = self.files.open(path, main, strict=False) if path else None
        except Unusable as error:
            if asked is None:
                return None
            raise ElfError(f"cannot use the interpreter `{path}` of `{program}`: {error}") from None
        if found is None and asked is not None:
            raise ResolveError(
                f"cannot run `{program}`: its interpreter `{asked}` is missing or for another machine",
                hint="install the C library for that machine (`dpkg --add-architecture`), or a build for this one",
            )
        return found

    def _search(self, linker: Object | None, main: Object) -> Glibc | Musl:
        path = linker.path if linker is not None else ""
        key = (path, main.elf.machine, main.elf.bits)
        search = self._searches.get(key)
        if search is None:
            if linker is not None and path.rpartition("/")[2].startswith("ld-musl-"):
                from .musl import Musl

                search = Musl(self.files, linker, self._library_path, self._directory)
            else:
                search = Glibc(self.files, path, main, self._library_path, self._directory)
            self._searches[key] = search
        return search


_WHY = {"ENOENT": "no such file", "ENOTDIR": "a part of the path is no directory", "ELOOP": "a loop of symlinks"}


def closure(program: str, root: str = "/", *, library_path: str = "", directory: str = "/") -> Libraries:
    """Every library of `program` below `root`. Raises ElfError, or ResolveError when it can't be followed."""
    found = Loader(Host(root), library_path=library_path, directory=directory).libraries(program)
    if found is None:
        raise ResolveError(f"cannot resolve the libraries of `{program}`: it is no ELF file")
    return found
