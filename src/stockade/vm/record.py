"""What a guest's kernel told of programs and terminals, kept outside of the guest in the form of auditd's log.

`ausearch -if` and `aureport --tty -if` read it; so does anybody, but that what was typed stands in hexadecimal digits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["NAME", "Record", "typed"]

NAME = "record.log"
#: MAX_AUDIT_MESSAGE_LENGTH of include/linux/audit.h is less than 9000.
_MESSAGE_MOST = 1 << 16
#: include/uapi/linux/audit.h, the messages that the guest's PID 1 passes on.
_NAMES = {
    1100: "USER_AUTH", 1101: "USER_ACCT", 1103: "CRED_ACQ", 1104: "CRED_DISP", 1105: "USER_START", 1106: "USER_END",
    1112: "USER_LOGIN", 1113: "USER_LOGOUT", 1124: "USER_TTY", 1300: "SYSCALL", 1305: "CONFIG_CHANGE", 1307: "CWD",
    1309: "EXECVE", 1319: "TTY",
}  # fmt: skip


class Record:
    """The record at `path`, at most `most` bytes. Nothing in it is ever dropped: a guest is stopped instead."""

    def __init__(self, path: str, most: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._left = most - os.fstat(self._descriptor).st_size
        self._text = b""

    @property
    def full(self) -> bool:
        """Whether the guest has to be stopped."""
        return self._left <= 0

    def take(self, payload: bytes, *, more: bool) -> None:
        """A frame of the guest: the number of a message and its text, or, with `more`, a part of it.

        OSError when it cannot be written; ValueError for what is no such frame.
        """
        if len(payload) < 2:
            raise ValueError("malformed record")
        self._text += payload[2:]
        if len(self._text) > _MESSAGE_MOST:
            raise ValueError("malformed record")
        if more:
            return
        name = _NAMES.get(int.from_bytes(payload[:2], "big"))
        text, self._text = self._text.rstrip(b"\0\n"), b""
        if name is None:
            raise ValueError("malformed record")
        # One line for each message, whatever the guest puts in it.
        self._write(b"type=%s msg=%s\n" % (name.encode(), text.replace(b"\n", b"\\n").replace(b"\0", b"\\0")))

    def note(self, text: str) -> None:
        """Keep what is to be known of the record itself, as a message of its own. OSError as `take` has it."""
        self._write(b"type=DAEMON_CONFIG msg=%s\n" % text.encode("utf-8", "replace"))

    def _write(self, line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._left -= len(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def typed(path: Path) -> Iterator[tuple[str, bytes]]:
    """What was typed on each terminal, in order: the name of the program that read it and bytes, a line at most."""
    before: tuple[bytes | None, ...] = ()
    whole = b""
    with open(path, "rb") as file:
        for line in file:
            if not line.startswith(b"type=TTY "):
                continue
            fields = dict(word.split(b"=", 1) for word in line.split() if b"=" in word)
            data = fields.get(b"data", b"")
            try:
                read = bytes.fromhex(data.decode("ascii")) if not data.startswith(b'"') else data.strip(b'"')
            except ValueError:
                continue  # no kernel's: root in the guest can write to the line
            reader = tuple(fields.get(key) for key in (b"comm", b"pid", b"major", b"minor"))
            if whole and (reader != before or whole.endswith((b"\r", b"\n"))):
                yield _name(before[0]), whole
                whole = b""
            whole += read
            before = reader
    if whole:
        yield _name(before[0]), whole


def _name(comm: bytes | None) -> str:
    return (comm or b"").strip(b'"').decode("ascii", "replace")
