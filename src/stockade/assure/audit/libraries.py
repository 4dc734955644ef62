"""Check what the programs of a tree are linked with: libraries that are missing, unused or no libraries."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator

from stockade.errors import ElfError, ResolveError
from stockade.kernel.beneath import Root
from stockade.resolve import ldso
from stockade.resolve.host import Host

from .seen import Seen
from .subject import Subject

__all__ = ["Beneath", "Libraries"]

# A library by its name, in a directory that the dynamic linker searches by itself. Those of the name service are opened
# by name alone, and some of libc's and the compiler's at run time.
_SYSTEM = re.compile(r"/(?:usr/(?:local/)?)?lib(?:32|64|x32)?(?:/[^/]+-linux-[^/]+)?/lib[^/]*\.so[^/]*")
_BY_NAME = re.compile(r".*/lib(?:nss_|gcc_s\.so|pthread|dl\.|rt\.|util\.|anl\.|thread_db|BrokenLocale|c_malloc_debug|"
                      r"memusage|pcprofile|mvec|resolv\.|nsl\.|SegFault)[^/]*")  # fmt: skip
_OF_ITSELF = frozenset({"access", "dlopen", "implied", "spec", "include", "interpreter", "gap"})


class Beneath(Host):
    """The tree below a root for the dynamic linker's rules, every path reached by openat2(2) inside that root."""

    def __init__(self, root: Root) -> None:
        super().__init__("/")
        self._beneath = root
        self._held = -1

    def status(self, path: str) -> tuple[os.stat_result | None, str]:
        known = self._status.get(path)
        if known is None:
            try:
                known = self._beneath.stat(path), ""
            except OSError as error:
                known = None, errno.errorcode.get(error.errno or 0, "EIO")
            except ValueError:
                known = None, "ENOENT"
            self._status[path] = known
        return known

    def target(self, path: str) -> str:
        known = self._targets.get(path)
        if known is None:
            try:
                known = self._beneath.readlinkat(path)
            except OSError:
                known = ""
            self._targets[path] = known
        return known

    def outer(self, path: str) -> str:
        """A name for the file that is good until the next call. OSError for what is neither file nor directory."""
        handle = self._beneath.openat(path, os.O_PATH)
        self.close()
        self._held = handle
        if stat.S_IFMT(os.fstat(handle).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return f"/proc/self/fd/{handle}"

    def close(self) -> None:
        """Let go of the file that `outer` named last."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


class Libraries:
    """The ELF files of a tree. `add` each one, then `check`."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._files: list[str] = []

    def add(self, path: str) -> None:
        """Take in the ELF file at the canonical `path`."""
        self._files.append(path)

    def check(self, subject: Subject) -> Iterator[Seen]:
        """What is damaged, what lacks a library, and which libraries nothing needs."""
        host = Beneath(self._root)
        try:
            loader = ldso.Loader(host)
            needed: set[str] = set()
            for path in sorted(self._files):
                yield from _one(loader, path, needed)
        finally:
            host.close()
        for path in sorted(self._files):
            if path not in needed and _SYSTEM.fullmatch(path) and not _BY_NAME.fullmatch(path):
                yield from _unused(path, subject)


def _one(loader: ldso.Loader, path: str, needed: set[str]) -> Iterator[Seen]:
    try:
        found = loader.libraries(path)
    except ElfError as error:
        yield Seen("ELF-DAMAGED", path, _why(error.message))
        return
    except ResolveError as error:
        yield Seen("ELF-BROKEN", path, _why(error.message))
        return
    if found is None:
        return
    needed.update(library.real for library in found.libraries if library.real != path)
    if found.interpreter is not None:
        needed.add(found.interpreter)
    for missing in found.missing:
        by = f", asked for by `{missing.needed_by}`," if missing.needed_by != path else ""
        yield Seen("ELF-BROKEN", path, f"needs `{missing.name}`{by} and it is {missing.reason}")


def _why(message: str) -> str:
    """The message without the name of the file, which is that of a descriptor."""
    return message.partition(": ")[2] or message


def _unused(path: str, subject: Subject) -> Iterator[Seen]:
    entry = subject.entries.get(path)
    if entry is None:
        yield Seen("LIBRARY-UNUSED", path, "no ELF file of the tree names it")
    elif not any(found.kind in _OF_ITSELF for found in entry.evidence):
        yield Seen("LIBRARY-UNUSED", path, "no ELF file of the jail names it, and the service never opened it")
