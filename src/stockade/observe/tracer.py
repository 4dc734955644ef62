"""Call strace: as a launcher in a view, or attached to a process that waits at a gate. Reads no trace.

As a launcher it filters with seccomp, which makes the calls that are not traced free but sets
no_new_privs (every jail has that too) and cannot be done to a process that runs already.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from types import TracebackType

from ..errors import HostError, ObserveError
from .calls import DECODED, TRACED

__all__ = ["Tracer", "launcher", "processor", "require"]

_ATTACH_TIMEOUT_S = 10.0
_POLL_S = 0.002

#: Signals of which strace shall say that they ended a process: what a filter and the want of memory send.
_ENDING = "SIGSYS,SIGKILL"

#: For strace. Without TZ, localtime(3) looks at /etc/localtime again for the time on each line.
_TIME_ZONE = {"TZ": "UTC0"}


def require() -> str:
    """Path of strace; HostError where it is not installed."""
    found = shutil.which("strace")
    if found is None:
        raise HostError(
            "`strace` is not installed, and nothing can be observed without it",
            hint="install it: `apt-get install strace`",
        )
    return found


def processor() -> int:
    """The CPU for tracer and traced together: switching between two CPUs at each call costs most of the time."""
    return max(os.sched_getaffinity(0))


def _options(output: str, *, syscalls: bool) -> list[str]:
    traced = f"raw=!{TRACED}" if syscalls else f"trace={TRACED}"
    expressions = [word for value in (traced, f"verbose={DECODED}", f"signal={_ENDING}") for word in ("-e", value)]
    return ["-ff", "-y", "-ttt", "-s", "256", *expressions, "-o", output]


def launcher(
    output: str, *, environment: Mapping[str, str], syscalls: bool, privileged: bool
) -> tuple[list[str], dict[str, str]]:
    """A command that executes the rest of its arguments under strace, and the environment for that command.

    strace writes `output`.PID and runs detached; the program keeps the process id, and finds `environment`. With
    `syscalls` every call is shown. With `privileged` setuid programs gain their rights, at the cost of
    speed; otherwise the whole has no_new_privs.
    """
    fast = [] if syscalls or privileged else ["--seccomp-bpf"]
    command = ["strace", "-DDD", "-qqq", *fast, *_options(output, syscalls=syscalls)]
    if "TZ" not in environment:
        return [*command, "-E", "TZ", "--"], {**environment, **_TIME_ZONE}
    return [*command, "--"], dict(environment)


def _has_root(pid: int) -> bool:
    """Whether the user namespace of process `pid` maps uid 0."""
    with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
        return any(line.split()[0] == "0" for line in file)


class Tracer:
    """strace attached to one process and all that come from it. Use as a context manager."""

    def __init__(self, process: subprocess.Popen[bytes], pid: int) -> None:
        self._process = process
        self.pid = pid

    @classmethod
    def attach(
        cls, pid: int, *, directory: int, prefix: str, as_uid0_of: int | None = None, syscalls: bool = False
    ) -> Tracer:
        """strace on `pid` (a host id), writing PREFIX.PID into the directory behind that descriptor.

        Returns once it is attached. `as_uid0_of` is a process in whose user namespace strace runs as uid 0, if it
        maps that: what an ordinary user needs, for strace to see the descriptors of a process that changes its id.
        HostError where strace is missing, ObserveError where it cannot attach.
        """
        command = [require(), *_options(prefix, syscalls=syscalls), "--decode-pids=pidns", "-p", str(pid)]
        if as_uid0_of is not None and _has_root(as_uid0_of):
            command = ["nsenter", f"--user=/proc/{as_uid0_of}/ns/user", "--setuid", "0", "--setgid", "0", *command]
        cpu = processor()
        errors = os.memfd_create("strace")
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=f"/proc/self/fd/{directory}",
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **_TIME_ZONE},
                pass_fds=(directory,),
            )
            tracer = cls(process, pid)
            try:
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(process.pid, {cpu})
                    os.sched_setaffinity(pid, {cpu})
                tracer._await(errors)
            except BaseException:
                tracer.close()
                raise
        finally:
            os.close(errors)
        return tracer

    def _await(self, errors: int) -> None:
        deadline = time.monotonic() + _ATTACH_TIMEOUT_S
        while b" attached" not in (said := os.pread(errors, 4096, 0)):
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = said.decode("utf-8", "replace").strip() or "it did not answer"
                raise ObserveError(
                    f"`strace` cannot attach to process {self.pid}: {text}",
                    hint="another tracer may hold it, or `/proc/sys/kernel/yama/ptrace_scope` may forbid it",
                )
            time.sleep(_POLL_S)

    @property
    def running(self) -> bool:
        """Whether any traced process is left."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> bool:
        """Whether strace ends, because nothing that it traced is left, within `timeout_s` seconds."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Detach from what still runs; the files are complete afterwards."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2.0)

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
