"""Speak with the keeper of a running guest."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from stockade import places
from stockade.errors import StateError

from . import frames

__all__ = ["Session", "connect", "execute", "is_running", "request"]

_TIMEOUT_S = 20.0
_READ = 65536
#: Bytes of each stream of a command that are kept for who asked for them whole.
_KEPT_MOST = 64 << 20


def connect(name: str) -> socket.socket:
    """A connection to the guest's keeper; StateError when the guest does not run."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_TIMEOUT_S)
    try:
        directory = os.open(places.guest_runtime(name), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{directory}/control")
        finally:
            os.close(directory)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connection.close()
        raise StateError(f"guest `{name}` is not running", hint=f"`stockade guest start {name}` starts it") from None
    except OSError:
        connection.close()
        raise
    return connection


def is_running(name: str) -> bool:
    """Whether the guest has a keeper that answers."""
    try:
        connect(name).close()
    except StateError:
        return False
    return True


def request(name: str, do: str, limit_s: float = _TIMEOUT_S, **more: object) -> dict[str, Any]:
    """Ask the guest's keeper for something and return its answer; StateError with what it says against it."""
    with connect(name) as connection:
        return ask(connection, do, limit_s, **more)


def ask(connection: socket.socket, do: str, limit_s: float = _TIMEOUT_S, **more: object) -> dict[str, Any]:
    """Send a request on an open connection and read its answer."""
    connection.settimeout(limit_s)
    connection.sendall(json.dumps({"do": do, **more}).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):
        try:
            byte = connection.recv(1)
        except TimeoutError:
            raise TimeoutError(f"the guest's keeper did not answer to `{do}` within {limit_s:g} s") from None
        if not byte:
            raise StateError(f"the guest's keeper ended before it answered to `{do}`", hint="look at the guest's log")
        line += byte
    answer = json.loads(line)
    if "error" in answer:
        raise StateError(str(answer["error"]), hint=answer.get("hint"))
    return dict(answer)


class Session:
    """A command in a guest. `write` and `read` keep to the credit of both sides."""

    def __init__(
        self, name: str, argv: Sequence[str], *, environment: Mapping[str, str] | None = None, directory: str = "/",
        uid: int = 0, gid: int = 0, terminal: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self._connection = connect(name)
        self._reader = frames.Reader()
        self.credit = frames.WINDOW
        self.status: int | None = None
        variables = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        variables |= dict(environment or {})
        try:
            ask(
                self._connection, "exec", argv=list(argv), environment=variables, directory=directory, uid=uid, gid=gid,
                terminal=None if terminal is None else list(terminal),
            )  # fmt: skip
        except BaseException:
            self._connection.close()
            raise

    def fileno(self) -> int:
        """The connection's descriptor, to wait on."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the connection; a command that still runs gets SIGHUP."""
        self._connection.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """Send at most `credit` bytes of standard input."""
        self.credit -= len(data)
        for start in range(0, len(data), frames.DATA_MOST):
            self._send(frames.pack(frames.DATA, 0, data[start : start + frames.DATA_MOST]))

    def _send(self, frame: bytes) -> None:
        """Send a frame; nothing to a command that has ended, whose last frames are there to be read."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.sendall(frame)

    def end_input(self) -> None:
        """Close the command's standard input."""
        self._send(frames.pack(frames.EOF, 0))

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        self._send(frames.pack_number(frames.SIGNAL, 0, number))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal's new size."""
        payload = rows.to_bytes(2, "big") + columns.to_bytes(2, "big")
        self._send(frames.pack(frames.RESIZE, 0, payload))

    def read(self, timeout_s: float | None) -> list[tuple[int, bytes]]:
        """What came: pairs of 1 or 2 (output, error) and data. StateError when the guest ended; sets `status`."""
        self._connection.settimeout(timeout_s)
        try:
            data = self._connection.recv(_READ)
        except TimeoutError:
            raise TimeoutError(f"the command in the guest said nothing for {timeout_s:g} s") from None
        if not data:
            raise StateError(
                "the guest ended while a command ran in it", hint="look at its console: `stockade guest console`"
            )
        found = []
        for kind, _, payload in self._reader.feed(data):
            if kind in (frames.STDOUT, frames.STDERR):
                found.append((1 if kind == frames.STDOUT else 2, payload))
                self._send(frames.pack_number(frames.CREDIT, 0, len(payload)))
            elif kind == frames.CREDIT:
                self.credit += frames.number(payload)
            elif kind == frames.EXIT:
                self.status = frames.number(payload)
        return found


def execute(
    name: str, argv: Sequence[str], *, input: bytes | IO[bytes] = b"",
    output: Callable[[int, bytes], object] | None = None, timeout_s: float = 60.0, **more: Any,
) -> tuple[int, bytes, bytes]:  # fmt: skip
    """Run `argv` in the guest; returns status, standard output and error. `output` takes both as they come instead.

    `input` is standard input: bytes, or a file that is read to its end. `timeout_s` without any output is TimeoutError.
    StateError when the guest says more than is kept in memory.
    """
    source = input if not isinstance(input, bytes) else None
    waiting = input if isinstance(input, bytes) else b""
    ended = False
    streams: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
    with Session(name, argv, **more) as session:
        while session.status is None:
            if not waiting and source is not None and session.credit:
                waiting = source.read(min(_READ, session.credit))
                if not waiting:
                    source = None
            if waiting and session.credit:
                part, waiting = waiting[: session.credit], waiting[session.credit :]
                session.write(part)
            if not waiting and source is None and not ended:
                session.end_input()
                ended = True
            block = ended or not session.credit
            if block or select.select([session], [], [], 0)[0]:
                for stream, data in session.read(timeout_s):
                    if output is not None:
                        output(stream, data)
                    elif len(streams[stream]) + len(data) <= _KEPT_MOST:
                        streams[stream] += data
                    else:
                        raise StateError(
                            f"a command in guest `{name}` wrote more than {_KEPT_MOST >> 20} MB",
                            hint=f"`stockade guest exec {name} -- COMMAND` writes it out as it comes",
                        )
        return session.status, bytes(streams[1]), bytes(streams[2])
