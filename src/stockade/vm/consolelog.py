"""A guest's console on disk: appended to, and one old file kept, so that a guest cannot fill the host's disk."""

from __future__ import annotations

import contextlib
import os

__all__ = ["ConsoleLog"]


class ConsoleLog:
    """The log at `path`, at most twice `most` bytes with its predecessor `path`.1."""

    def __init__(self, path: str, most: int) -> None:
        self._path = path
        self._most = most
        self.written = False
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._descriptor).st_size

    def write(self, data: bytes) -> None:
        """Append; a full disk must not end the guest: what cannot be written is dropped."""
        self.written = True
        if self._size + len(data) > self._most:
            self.close()
            with contextlib.suppress(OSError):
                os.replace(self._path, f"{self._path}.1")
        with contextlib.suppress(OSError):
            if self._descriptor < 0:
                self._open()
            self._size += os.write(self._descriptor, data)

    def fileno(self) -> int:
        """The descriptor, for a child's output."""
        return self._descriptor

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
