"""Start the warden with exactly the descriptors that its plan names. Nothing is forked in Python: threads may."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterable, Sequence

from stockade.errors import HostError

from . import warden_path, wire

__all__ = ["memory_file", "spawn"]


def memory_file(content: bytes) -> int:
    """A close-on-exec descriptor that reads `content` from its start."""
    descriptor = os.memfd_create("plan", os.MFD_CLOEXEC)
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def spawn(
    plan: str | bytes,
    records: Sequence[bytes],
    *,
    streams: tuple[int, int, int],
    inherit: Iterable[int],
    wrapper: Sequence[str] = (),
) -> int:
    """Start the warden on `plan` (a path, or its content) and the fragment `records`; returns its pid.

    `streams` are its standard input, output and error, `inherit` the descriptors that `records` name. `wrapper` is a
    command that becomes the one that follows it, with the caller's environment. HostError where the warden or the
    wrapper is missing.
    """
    opened: list[int] = []
    try:
        fragment = memory_file(wire.plan(list(records)))
        opened.append(fragment)
        if isinstance(plan, bytes):
            opened.append(memory_file(plan))
            plan = str(opened[-1])
        # A descriptor copied on itself stays open across the exec (posix_spawn_file_actions_adddup2(3)).
        kept = [(os.POSIX_SPAWN_DUP2, number, number) for number in (*opened, *inherit)]
        standard = []
        for target, source in enumerate(streams):
            if source != target and source <= 2:
                source = os.dup(source)  # it may be replaced itself before its turn comes
                opened.append(source)
            standard.append((os.POSIX_SPAWN_DUP2, source, target))
        argv = [*wrapper, warden_path(), plan, str(fragment)]
        return os.posix_spawn(
            _program(argv[0]), argv, _environment() if wrapper else {}, file_actions=[*standard, *kept],
            setsigmask=(), setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
        )  # fmt: skip
    except BlockingIOError as error:
        raise HostError(
            "the warden cannot be started: this host, or a limit of the caller, allows no further process",
            hint="end some, or raise the limit: `ulimit -u`, `pids.max` of the caller's control group",
        ) from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _environment() -> dict[str, str]:
    """The caller's, in which systemd-run(1) finds the caller's own manager: su(1), sudo(8) and cron(8) do not say."""
    return {**os.environ, "XDG_RUNTIME_DIR": f"/run/user/{os.geteuid()}"}


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise HostError(
            f"`{name}` is missing or cannot be executed",
            hint="install Stockade again; from its source tree, `make -C warden` compiles the warden",
        )
    return path
