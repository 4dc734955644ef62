"""One process of a view, by descriptors: waited for, signalled, forgotten. Starts nothing."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from types import TracebackType

from ..kernel.pidfd import pid_of
from .protocol import Message

__all__ = ["Process"]


class Process:
    """A process of a view. Wait for it, signal it; close it or use it as a context manager."""

    def __init__(self, *, pidfd: int, inner: int, status: int) -> None:
        self.pid = pid_of(pidfd)
        """Its id on the host."""
        self.inner = inner
        """Its id in the view."""
        self._pidfd = pidfd
        self._status = status
        self._text = b""
        self.returncode: int | None = None
        """Exit status, or minus the number of the signal that ended it; None while it runs."""
        self.failure: str | None = None
        """Why it could not be executed."""

    def wait(self, timeout_s: float | None = None) -> int | None:
        """`returncode` once it has ended, None if it has not within `timeout_s` seconds."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        while self.returncode is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not poll.poll(None if left is None else left * 1000):
                return None
            part = os.read(self._status, 4096)
            if not part:
                # The view's first process is gone, and with it every other.
                self.returncode = -signal.SIGKILL
                break
            self._text += part
            *lines, self._text = self._text.split(b"\n")
            for line in lines:
                self._tell(json.loads(line))
        return self.returncode

    def _tell(self, message: Message) -> None:
        if "error" in message:
            self.failure = f"{message['error']}: {message['text']}"
        else:
            self.returncode = message["status"]

    def fileno(self) -> int:
        """A descriptor that becomes readable when `wait` would tell something new."""
        return self._status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process and all that stayed in its process group."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def close(self) -> None:
        """Forget the process; it is not ended."""
        for name in ("_pidfd", "_status"):
            descriptor = getattr(self, name)
            if descriptor >= 0:
                os.close(descriptor)
                setattr(self, name, -1)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_group()
        self.close()
