"""Try a kernel interface in a child that can be thrown away. Leaves nothing: namespaces and mounts end with it."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from stockade.errors import HostError

__all__ = ["Outcome", "attempt"]

_ATTEMPT_SECONDS = 5.0


class Outcome(NamedTuple):
    """`code` is 0 or an errno; `seen` is what the work returned, or the errno's name and meaning."""

    code: int
    seen: str

    @property
    def good(self) -> bool:
        """Whether the attempt succeeded."""
        return self.code == 0


def attempt(work: Callable[[], str]) -> Outcome:
    """Call `work` in a forked child and return what came of it; one that hangs is ended and counts as ETIMEDOUT."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        _child(work, into)
    os.close(into)
    try:
        answer = _answer(out, time.monotonic() + _ATTEMPT_SECONDS)
    finally:
        os.close(out)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if answer is None:
        return _failed(errno.ETIMEDOUT)
    code, _, seen = answer.partition("\n")
    if code != "0":
        return _failed(int(code or errno.EIO))
    return Outcome(0, seen)


def _child(work: Callable[[], str], into: int) -> NoReturn:
    try:
        answer = f"0\n{work()}"
    except (OSError, HostError) as error:
        answer = str(error.errno if isinstance(error, OSError) else errno.EPERM)
    finally:
        # Nothing of the parent's may run in the child: no handlers at exit, no flushing of its buffers.
        os.write(into, answer.encode("utf-8", "surrogateescape"))
        os._exit(0)


def _answer(out: int, deadline: float) -> str | None:
    data = b""
    while select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
        more = os.read(out, 4096)
        if not more:
            return data.decode("utf-8", "surrogateescape")
        data += more
    return None


def _failed(code: int) -> Outcome:
    return Outcome(code, f"{errno.errorcode.get(code, str(code))} ({os.strerror(code).lower()})")
