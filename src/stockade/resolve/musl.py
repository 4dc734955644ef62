"""musl's search for libraries, as ldso/dynlink.c does it. Never runs the linker."""

from __future__ import annotations

import re

from .linkmap import Files, Object

__all__ = ["Musl"]

_DEFAULT = "/lib:/usr/local/lib:/usr/lib"
# Names that musl's one library answers to itself.
_OWN = re.compile(r"lib(?:c|pthread|rt|m|dl|util|xnet)\.")
_ORIGIN = re.compile(r"\$(?:ORIGIN|\{ORIGIN\})")


class Musl:
    """Search rules of one musl linker below one root."""

    def __init__(self, files: Files, linker: Object, library_path: str, directory: str) -> None:
        self._files, self._linker, self._directory = files, linker, directory
        self._library_path = library_path
        self._system: tuple[str, ...] | None = None

    def system_directories(self) -> tuple[str, ...]:
        """The directories of the path file, or the default ones."""
        return self._system_path()

    def reset(self) -> None:
        """Nothing here depends on the program."""

    def expand(self, name: str, loader: Object) -> str:
        """musl expands nothing in NEEDED; the C library's names mean the linker itself."""
        del loader
        return self._linker.path if _OWN.match(name) else name

    def names(self, item: Object) -> tuple[str, ...]:
        """Only the linker answers to a name of its own."""
        return (item.path,) if item.path == self._linker.path else ()

    def find(self, name: str, loader: Object, main: Object) -> tuple[Object | None, str, list[str]]:
        """load_library: LD_LIBRARY_PATH, the RUNPATH or RPATH of the object and its loaders, the path file."""
        del main
        if "/" in name:
            return self._files.open(self._absolute(name), loader), "path", []
        searched: list[str] = []
        found = self._in(self._split(self._library_path), name, loader, searched)
        if found is not None:
            return found, "LD_LIBRARY_PATH", searched
        current: Object | None = loader
        while current is not None:
            found = self._in(self._own_path(current), name, loader, searched)
            if found is not None:
                return found, f"RUNPATH of `{current.real}`", searched
            current = current.loader
        found = self._in(self._system_path(), name, loader, searched)
        return found, "default directory", searched

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"{self._directory.rstrip('/')}/{path}"

    def _split(self, text: str) -> tuple[str, ...]:
        return tuple(self._absolute(name) for name in re.split(r"[:\n]", text) if name)

    def _own_path(self, item: Object) -> tuple[str, ...]:
        if item.runpath is None:
            text = item.elf.runpath if item.elf.runpath is not None else item.elf.rpath or ""
            text = _ORIGIN.sub(lambda _: item.origin, text)
            item.runpath = () if "$" in text else self._split(text)  # fixup_rpath: another token voids the list
        return item.runpath

    def _system_path(self) -> tuple[str, ...]:
        if self._system is None:
            # /lib/ld-musl-ARCH.so.1 reads PREFIX/etc/ld-musl-ARCH.path, PREFIX being what stands before /lib.
            prefix, _, name = self._linker.path.rpartition("/")
            prefix = prefix.removesuffix("/lib") if prefix.endswith("/lib") else ""
            stem = name.removesuffix(".so.1")
            text = self._files.host.text(f"{prefix}/etc/{stem}.path")
            self._system = self._split(text if text is not None else _DEFAULT)
        return self._system

    def _in(self, directories: tuple[str, ...], name: str, loader: Object, searched: list[str]) -> Object | None:
        for directory in directories:
            if directory not in searched:
                searched.append(directory)
            found = self._files.open(f"{directory.rstrip('/')}/{name}", loader)
            if found is not None:
                return found
        return None
