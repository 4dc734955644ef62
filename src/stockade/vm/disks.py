"""Disks that a running guest has for a while: files that its kernel is told of over its management console."""

from __future__ import annotations

from collections.abc import Callable

from stockade.errors import StateError

__all__ = ["Disks"]

#: `a` is the guest's own.
_LETTERS = "bcdefgh"
_PREFIX = "run/copy-"


class Disks:
    """Attaches and takes away; `ask` carries out a command of the console and returns what that says."""

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask

    def attach(self, file: str) -> str:
        """Make the file, relative to UML's directory, a disk; returns its name. StateError as the kernel refuses it."""
        if not file.startswith(_PREFIX) or not file.removeprefix(_PREFIX).replace("-", "").isdecimal():
            raise StateError("a guest has no such file for a disk")
        refused = StateError("the guest has as many disks as it can have", hint="wait until a copy has ended")
        for letter in _LETTERS:
            try:
                # "d": whatever its contents look like, they are no copy-on-write file.
                self._ask(f"config ubd{letter}d={file}")
            except StateError as error:
                if "configured" not in error.message:
                    raise
                refused = error
                continue
            return f"ubd{letter}"
        raise refused

    def detach(self, disk: str) -> bool:
        """Take it away; False while somebody in the guest has it open."""
        try:
            self._ask(f"remove {disk}")
        except StateError:
            return False
        except TimeoutError:
            return True  # a kernel that does not answer keeps it until it ends
        return True
