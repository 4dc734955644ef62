"""Gather a closure: entries, and programs with all that they need to start. Decides no rule."""

from __future__ import annotations

import re

import msgspec

from ..errors import ElfError, ResolveError
from ..records.closure import Evidence, EvidenceKind
from ..records.spec import Spec
from .entries import Entries
from .host import Host
from .ldso import Libraries, Loader
from .pattern import find
from .shebang import DEFAULT_PATH, chain, find_program

__all__ = ["Collector", "Observed"]

_BRINGS = ("required", "recommended")


class Observed(msgspec.Struct):
    """What a trace asks for beside files."""

    devices: set[str] = msgspec.field(default_factory=set)
    proc: bool = False
    proc_subset: bool = True
    syslog: bool = False


class Collector(Entries):
    """The closure in the making, with the programs whose interpreters and libraries are in it.

    `linked` has the canonical path of every library by the name it was asked for.
    """

    def __init__(self, host: Host, spec: Spec, *, observed: bool) -> None:
        super().__init__(host, spec, observed=observed)
        environment = spec.service.environment
        self.path = environment.get("PATH", DEFAULT_PATH)
        self.directory = spec.service.directory
        self.loader = Loader(
            host,
            library_path=environment.get("LD_LIBRARY_PATH", ""),
            preload=tuple(filter(None, re.split(r"[: ]", environment.get("LD_PRELOAD", "")))),
            directory=self.directory,
        )
        self.programs: dict[str, Libraries] = {}
        self.linked: dict[str, str] = {}

    def program(self, path: str, evidence: Evidence, *, strict: bool) -> str | None:
        """A program with its interpreters and libraries. With `strict`, what would keep it from starting raises."""
        real = self.add(path, evidence, operation="exec")
        if real is None or real in self.programs or not self.host.walk(path).is_file:
            return real
        self.programs[real] = Libraries(real, None)
        try:
            links = chain(self.host, path, path=self.path, directory=self.directory)
        except ResolveError as error:
            if strict:
                raise
            self.advise("interpreter", real, error.message)
            links = ()
        for link in links:
            evidence = Evidence(kind="shebang", detail=link.line, because=link.script)
            self.program(link.interpreter, evidence, strict=strict)
        if not links:
            self.libraries(path, strict=strict)
        return real

    def libraries(self, path: str, *, strict: bool) -> None:
        """The libraries and interpreter of the ELF file that `path` leads to, and what it opens by .note.dlopen."""
        try:
            found = self.loader.libraries(path)
        except (ElfError, ResolveError) as error:
            if strict:
                raise
            self.advise("damaged-elf", path, error.message)
            return
        if found is None:
            return
        self.programs[found.program] = found
        file = self.loader.files.read(found.program)
        if file is not None and file.interpreter is not None:
            detail = "PT_INTERP"
            self.add(file.interpreter, Evidence(kind="interpreter", detail=detail, because=found.program))
        for missing in found.missing:
            where = ", ".join(f"`{directory}`" for directory in missing.searched)
            message = f"`{missing.needed_by}` needs `{missing.name}`: {missing.reason}"
            if strict:
                hint = f"searched ld.so.cache and {where}" if where else "install the package that brings it"
                raise ResolveError(f"cannot run `{path}`: {message}", hint=hint)
            self.advise("missing-library", missing.needed_by, f"{message}{'; searched ' + where if where else ''}")
        for library in found.libraries:
            self.linked.setdefault(library.name.rpartition("/")[2], library.real)
            detail = f"{library.name} by {library.rule}"
            self.add(library.path, Evidence(kind="needed", detail=detail, because=library.needed_by))
        for real in (found.program, *(library.real for library in found.libraries)):
            self._dlopen(real)

    def _dlopen(self, real: str) -> None:
        file = self.loader.files.read(real)
        for note in file.dlopen if file is not None else ():
            if note.priority not in _BRINGS:
                continue
            path = next((path for name in note.sonames if (path := self.loader.lookup(name, real))), None)
            if path is None:
                self.advise("missing-library", real, f"`{real}` may open {' or '.join(note.sonames)}: not found")
            elif self.host.walk(path).path not in self.programs:
                detail = note.feature or note.sonames[0]
                self.library(path, Evidence(kind="dlopen", detail=detail, because=real))

    def library(self, path: str, evidence: Evidence) -> None:
        """A library that is opened while a program runs, with those that it needs."""
        real = self.add(path, evidence)
        if real is not None and real not in self.programs:
            self.libraries(path, strict=False)

    def named_program(self, name: str, evidence: Evidence, *, what: str) -> str | None:
        """A program by name on PATH or by path, as the spec gives it. Raises ResolveError when there is none."""
        found = find_program(self.host, name, self.path, directory=self.directory)
        if found is None:
            raise _no_program(self.host, name, what, self.path)
        return self.program(found, evidence, strict=not self.observed)

    def include(self, pattern: str, kind: EvidenceKind, detail: str, because: str = "") -> int:
        """A path, a directory with everything below, or a glob. Returns how many were found."""
        evidence = Evidence(kind=kind, detail=detail, because=because)
        count = 0
        for path in find(self.host, pattern):
            count += 1
            self.tree(path, evidence)
        return count

    def tree(self, path: str, evidence: Evidence) -> None:
        """`path` and everything below it; libraries of what is ELF, interpreters of what is a script."""
        pending = [path]
        seen: set[str] = set()
        while pending:
            current = pending.pop()
            real = self.add(current, evidence)
            if real is None or real in seen:
                continue
            seen.add(real)
            found = self.host.walk(real)
            if found.is_directory:
                pending += [f"{real.rstrip('/')}/{name}" for name in self.host.names(real)]
            elif found.status is not None and found.is_file:
                self.loadable(current, executable=bool(found.status.st_mode & 0o111))

    def loadable(self, path: str, *, executable: bool) -> None:
        """What the file needs in order to run, or to be loaded; nothing for any other file."""
        real = self.host.walk(path).path
        if real in self.programs:
            return
        head = self.host.data(path, limit=4) or b""
        if head == b"\x7fELF":
            self.libraries(path, strict=False)
        elif executable and head.startswith(b"#!"):
            self.program(path, Evidence(kind="spec", detail="an included script"), strict=False)


def _no_program(host: Host, name: str, what: str, path: str) -> ResolveError:
    if "/" in name:
        found = host.walk(name)
        if found.is_directory:
            return ResolveError(f"{what} `{name}` is a directory", hint="name the program in it")
        if found.error == "ELOOP":
            return ResolveError(f"{what} `{name}` is a loop of symlinks", hint="name the program itself")
        if found.status is not None:
            hint = f"`chmod +x {name}`, or name its interpreter"
            return ResolveError(f"{what} `{name}` is not executable", hint=hint)
        return ResolveError(f"{what} `{name}` does not exist", hint="install the package that brings it")
    return ResolveError(
        f"{what} `{name}` is on no directory of PATH",
        hint=f"install the package that brings it, or give its path; PATH is {path}",
    )
