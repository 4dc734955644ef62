"""Run exercises as a client would, and judge them. Starts nothing outside of a view."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from ..records.exercise import ExerciseResult, Outcome
from ..records.spec import Exercise
from .process import Process
from .ready import sockets
from .view import View
from .viewtree import ROOT_LINK

__all__ = ["CLIENT_ENVIRONMENT", "Runner", "client", "communicate", "perform", "substitute", "title"]

#: Starts one command with some input and a time limit in seconds.
Runner = Callable[[Sequence[str], bytes, float], Outcome]

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLIENT_ENVIRONMENT: Mapping[str, str] = {"PATH": _PATH, "LANG": "C.UTF-8", "STOCKADE_ROOT": ROOT_LINK}

_MOST_OUTPUT = 1 << 20
_REFERENCE = re.compile(r"\$\{([a-z-]+:[a-z0-9][a-z0-9._-]*)\}")


def substitute(text: str, substitutions: Mapping[str, str]) -> str:
    """`text` with each `${KEY}` for which there is a substitution filled in; a shell's own stay."""
    return _REFERENCE.sub(lambda match: substitutions.get(match[1], match[0]), text)


def title(exercise: Exercise) -> str:
    """The exercise's name, or its command."""
    return exercise.name or " ".join(exercise.command)


def perform(exercise: Exercise, run: Runner, substitutions: Mapping[str, str]) -> ExerciseResult:
    """Run one exercise through `run`, and judge what came of it."""
    command = [substitute(word, substitutions) for word in exercise.command]
    text = substitute(exercise.input or "", substitutions).encode("utf-8", "surrogateescape")
    start = time.monotonic()
    outcome = run(command, text, exercise.timeout_s)
    stdout, stderr = (data.decode("utf-8", "replace") for data in (outcome.stdout, outcome.stderr))
    reason = _reason(exercise, outcome.status, stdout)
    return ExerciseResult(
        name=title(exercise),
        passed=not reason,
        status=outcome.status,
        seconds=time.monotonic() - start,
        stdout=stdout,
        stderr=stderr,
        reason=reason,
    )


def _reason(exercise: Exercise, status: int | None, stdout: str) -> str:
    """Why the exercise did not pass; empty if it did."""
    if status is None:
        return f"it did not end within {exercise.timeout_s:g} s"
    if exercise.refused:
        if status == 0:
            return "it succeeded, and should have been refused"
    elif status != exercise.status:
        return f"it ended with status {status}, not {exercise.status}"
    if exercise.stdout is not None and not re.search(exercise.stdout, stdout, re.MULTILINE):
        return f"its output does not match `{exercise.stdout}`"
    return ""


def client(view: View) -> Runner:
    """A runner for commands in `view`, with the view's own ids and without the capabilities that reach the host.

    Where the service runs elsewhere they find its unix sockets at the paths that these have there.
    """
    shown: set[str] = set()

    def run(command: Sequence[str], text: bytes, timeout_s: float) -> Outcome:
        if view.apart:
            _show_sockets(view, shown)
        return communicate(
            lambda stdin, stdout, stderr: view.spawn(
                command,
                environment={**CLIENT_ENVIRONMENT, "HOME": os.path.expanduser("~")},
                directory="/tmp",
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            ),
            text,
            timeout_s,
        )

    return run


def _show_sockets(view: View, shown: set[str]) -> None:
    """Show clients the unix sockets that have been bound since, each at its own path."""
    for path in sorted(sockets(view.pid).unix - shown):
        if path.startswith("/"):
            with contextlib.suppress(OSError):
                view.show_socket(path)
        shown.add(path)


def communicate(spawn: Callable[[int, int, int], Process], text: bytes, timeout_s: float) -> Outcome:
    """Start a process with three pipes, feed it `text`, and collect what it writes, each stream up to 1 MiB.

    When its time runs out its whole process group is killed. What it leaves running in the background keeps nobody
    waiting.
    """
    with contextlib.ExitStack() as stack:
        pipes = [os.pipe() for _ in range(3)]
        (stdin_out, stdin_in), (stdout_out, stdout_in), (stderr_out, stderr_in) = pipes
        theirs = (stdin_out, stdout_in, stderr_in)
        ours = [stdin_in, stdout_out, stderr_out]
        open_ones = set(ours)
        stack.callback(lambda: deque(map(os.close, open_ones), maxlen=0))
        try:
            process = spawn(*theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        stack.enter_context(process)
        collected = {stdout_out: bytearray(), stderr_out: bytearray()}
        selector = stack.enter_context(selectors.DefaultSelector())
        for descriptor in ours:
            os.set_blocking(descriptor, False)
        selector.register(stdin_in, selectors.EVENT_WRITE)
        for descriptor in collected:
            selector.register(descriptor, selectors.EVENT_READ)
        selector.register(process.fileno(), selectors.EVENT_READ)
        rest = memoryview(text)
        deadline = time.monotonic() + timeout_s
        status: int | None = None
        ended = False
        while not ended:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                if key.fd == stdin_in:
                    rest = _feed(stdin_in, rest)
                    if not rest:
                        selector.unregister(stdin_in)
                        open_ones.remove(stdin_in)
                        os.close(stdin_in)
                elif key.fd in collected:
                    if not _collect(key.fd, collected[key.fd]):
                        selector.unregister(key.fd)
                else:
                    status = process.wait(0)
                    ended = status is not None
        if not ended:
            process.kill_group()
            process.wait(5.0)
        for descriptor, data in collected.items():
            while _collect(descriptor, data):
                pass
        if status is not None and status < 0:
            status = 128 - status
        return Outcome(status=status, stdout=bytes(collected[stdout_out]), stderr=bytes(collected[stderr_out]))


def _feed(descriptor: int, data: memoryview) -> memoryview:
    try:
        return data[os.write(descriptor, data) :] if data else data
    except BrokenPipeError:
        return data[:0]


def _collect(descriptor: int, data: bytearray) -> bool:
    """Read what there is; whether there may be more."""
    try:
        part = os.read(descriptor, 65536)
    except BlockingIOError:
        return False
    data += part[: max(0, _MOST_OUTPUT - len(data))]
    return bool(part)
