"""Files below a root directory, reached by openat2(2). Never leaves the root, never joins strings to a host path."""

from __future__ import annotations

import ctypes
import errno
import os
from types import TracebackType

from .libc import check, function, path_argument, syscall

__all__ = [
    "RESOLVE_IN_ROOT",
    "RESOLVE_NO_MAGICLINKS",
    "RESOLVE_NO_SYMLINKS",
    "RESOLVE_NO_XDEV",
    "Root",
    "openat2",
    "start_writing",
    "syncfs",
]

# include/uapi/linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_IN_ROOT = 0x10

# The number is the same on every architecture but alpha (include/uapi/asm-generic/unistd.h).
_SYS_OPENAT2 = 437
_ATTEMPTS = 64
_DIRECTORY = os.O_PATH | os.O_DIRECTORY

_SYNC_FILE_RANGE_WRITE = 2  # include/uapi/linux/fs.h

_syncfs = function("syncfs", ctypes.c_int)
_sync_file_range = function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(directory: int, path: str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): a descriptor, always close-on-exec. OSError has the errno and `path`."""
    name = path_argument(path)
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    descriptor = -1
    for _ in range(_ATTEMPTS):
        descriptor = syscall(
            _SYS_OPENAT2,
            ctypes.c_int(directory),
            ctypes.c_char_p(name),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        # EAGAIN: a rename or mount somewhere on the host raced with `..`; openat2(2) says to try again.
        if descriptor >= 0 or ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    return check(descriptor, "openat2", path)


def syncfs(descriptor: int) -> None:
    """syncfs(2): write out the whole file system that holds `descriptor`."""
    check(_syncfs(descriptor), "syncfs")


def start_writing(descriptor: int) -> None:
    """sync_file_range(2): have the disk begin with a file, so that a later `syncfs` need not wait for it.

    No more than a hint: what cannot be done, on whatever file system, is done then.
    """
    _sync_file_range(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)


class Root:
    """A directory that is `/` for every path given to the methods.

    Paths are absolute or relative to it alike; `..` stops at it. No symlink is followed unless a method says
    so: a component that is one is ELOOP. Use as a context manager; it owns its descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._parent: tuple[str, int] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, directory: int | None = None) -> Root:
        """The root at the host's `path`, which must be a directory and no symlink."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return cls(os.open(path, flags, dir_fd=directory))

    def __enter__(self) -> Root:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the root's descriptors."""
        self._forget()
        os.close(self.descriptor)

    def _forget(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def openat(self, path: str, flags: int, *, mode: int = 0, follow: bool = False) -> int:
        """A descriptor of `path`. With `follow`, symlinks are resolved inside the root as chroot(2) would."""
        resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
        return openat2(
            self.descriptor, path or ".", flags, mode=mode, resolve=resolve | (0 if follow else RESOLVE_NO_SYMLINKS)
        )

    def parent(self, path: str) -> tuple[int, str]:
        """A descriptor of the directory that holds `path`, and the last component.

        The descriptor is borrowed: it is good until the next call, which makes a run of paths in one
        directory cheap. ValueError where the last component is no name.
        """
        above, _, name = path.rstrip("/").rpartition("/")
        if name in ("", ".", ".."):
            raise ValueError(f"no file name in {path!r}")
        if self._parent is None or self._parent[0] != above:
            descriptor = self.openat(above, _DIRECTORY)
            self._forget()
            self._parent = above, descriptor
        return self._parent[1], name

    def create(self, path: str, mode: int = 0o600) -> int:
        """A descriptor, open for reading and writing, of the new file `path`; EEXIST if there is anything."""
        directory, name = self.parent(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, mode, dir_fd=directory)

    def mkdirat(self, path: str, mode: int = 0o700) -> None:
        """mkdirat(2); its parent must be there."""
        directory, name = self.parent(path)
        os.mkdir(name, mode, dir_fd=directory)

    def makedirs(self, path: str, mode: int = 0o755) -> None:
        """Make each missing directory of `path`, component by component; what is there is left as it is."""
        parts = [part for part in path.split("/") if part]
        for count in range(1, len(parts) + 1):
            try:
                self.mkdirat("/".join(parts[:count]), mode)
            except FileExistsError:
                continue

    def symlinkat(self, target: str, path: str) -> None:
        """symlinkat(2); the target is any text."""
        directory, name = self.parent(path)
        os.symlink(target, name, dir_fd=directory)

    def stat(self, path: str) -> os.stat_result:
        """lstat(2) of `path`."""
        if not path.strip("/"):
            return os.fstat(self.descriptor)
        directory, name = self.parent(path)
        return os.stat(name, dir_fd=directory, follow_symlinks=False)

    def readlinkat(self, path: str) -> str:
        """readlinkat(2)."""
        directory, name = self.parent(path)
        return os.readlink(name, dir_fd=directory)
