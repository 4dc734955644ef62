"""UML's management console: one datagram to the kernel, some back. Format: arch/um/include/shared/mconsole.h."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time

from stockade.errors import StateError

__all__ = ["Console"]

_MAGIC = 0xCAFEBABE
_VERSION = 2
_REQUEST = struct.Struct("=III")
_REPLY = struct.Struct("=III")
_MOST = 512


class Console:
    """A client of the console at `path`. Both are relative to this process's directory, which must be UML's own too:

    UML answers to the client's address, as it resolves that itself.
    """

    def __init__(self, path: str, own: str) -> None:
        self._own = own
        self._path = path
        with contextlib.suppress(FileNotFoundError):
            os.unlink(own)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        mask = os.umask(0)
        try:
            self._socket.bind(own)
        finally:
            os.umask(mask)

    def close(self) -> None:
        """Close the socket and remove its name."""
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._own)

    def request(self, command: str, timeout_s: float = 5.0) -> str:
        """Carry out `command` and return what it says. StateError for a refusal, TimeoutError without an answer."""
        data = command.encode("utf-8", "surrogateescape")
        if len(data) > _MOST:
            raise StateError(f"`{command[:40]}…` is too long for the management console", hint="512 bytes at most")
        end = time.monotonic() + timeout_s
        request = _REQUEST.pack(_MAGIC, _VERSION, len(data)) + data.ljust(_MOST, b"\0")
        try:
            self._socket.sendto(request, self._path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise StateError("the guest's kernel has no management console yet", hint="try again") from error
        text = b""
        failed = False
        while True:
            self._socket.settimeout(max(0.01, end - time.monotonic()))
            try:
                reply = self._socket.recv(65536)
            except TimeoutError:
                raise TimeoutError(f"the management console did not answer to `{command}`") from None
            if len(reply) < _REPLY.size:
                raise StateError("the management console gave a malformed answer", hint="stop the guest")
            error_flag, more, length = _REPLY.unpack_from(reply)
            # The length counts the NUL behind the text, at the last part.
            text += reply[_REPLY.size : _REPLY.size + length].rstrip(b"\0")
            failed = failed or error_flag != 0
            if not more:
                break
        answer = text.decode("utf-8", "replace").strip()
        if failed:
            raise StateError(f"the guest's kernel refused `{command}`: {answer}")
        return answer
