"""`stockade run NAME -- COMMAND`: become the warden with as little Python before it as can be. Explains nothing.

Imports only what costs nothing: no pathlib (so the places of `stockade.places` stand here once more; a
test compares them), no msgspec. What this path cannot do it leaves to `launch`.
"""

from __future__ import annotations

import fcntl
import os
import time

from stockade.contain import warden_path, wire

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


def run(
    name: str, argv: Sequence[str], *, terminal: bool | None = None, on_failure: Sequence[str] = ()
) -> None:
    """Run `argv` in a jail of the current generation of `name`, on this process's standard streams.

    Does not return: this process becomes the jail's supervisor and ends with the command's status. It returns
    where `launch` has to say what is wrong: an unknown or malformed name, nothing built, no command. `terminal`:
    a pty of the jail's own; default: when standard input and output are terminals. `on_failure` is a command that
    replaces the warden when a launch step fails; it gets the warden's `failed` line as its last argument.
    """
    if not argv or not _is_name(name):
        return
    jail = f"{_place('state')}/jails/{name}"
    try:
        generation = f"{jail}/{os.readlink(f'{jail}/current')}"
    except OSError:
        return
    plan = f"{generation}/plan"
    place = f"{_place('run')}/{name}@{os.getpid()}"
    # `launch` knows how to put the warden into a scope of systemd's, start network helpers, and make volumes;
    # the parser's `run` what a machine is.
    aside = any(os.path.exists(f"{generation}/{name}") for name in ("wrapper", "network", "resize", "machine"))
    if not os.path.exists(plan) or aside or not _own(os.path.dirname(place)):
        return
    if terminal is None:
        terminal = os.isatty(0) and os.isatty(1)
    held = _hold(generation)
    if held is None:
        return
    state = _claim(place, generation)
    if state is None:
        os.close(held)
        return
    records = [
        wire.text(wire.BASE, generation),
        wire.text(wire.ARGV, *argv),
        wire.record(wire.LIFELINE),
        wire.record(wire.STATE, state),
        wire.record(wire.KEEP, held),
        wire.text(wire.REMOVE, place),
        wire.text(wire.REMOVE, f"{place}/state"),
    ]
    if terminal:
        records += _terminal()
    if on_failure:
        records.append(wire.text(wire.ON_FAILURE, *on_failure))
    fragment = os.memfd_create("plan", 0)
    os.write(fragment, wire.plan(records))
    os.lseek(fragment, 0, os.SEEK_SET)
    for descriptor in (state, held):
        os.set_inheritable(descriptor, True)
    os.execve(warden_path(), ["warden", plan, str(fragment)], {})


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 63 and _ALLOWED.issuperset(name) and name[0] not in "._-"


def _place(part: str) -> str:
    """As `stockade.places` has it."""
    home = os.environ.get("STOCKADE_HOME", "")
    if home:
        return f"{os.path.abspath(home)}/{part}"
    if os.geteuid() == 0:
        return {"state": "/var/lib/stockade", "run": "/run/stockade"}[part]
    if part == "run":
        base, session = os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.geteuid()}"
        fallback = session if os.access(session, os.W_OK) else f"/tmp/stockade-{os.geteuid()}"
        return f"{base if os.path.isabs(base) else fallback}/stockade"
    base = os.environ.get("XDG_DATA_HOME", "")
    return f"{base if os.path.isabs(base) else os.path.expanduser('~/.local/share')}/stockade"


def _own(run: str) -> bool:
    """Whether the runtime directory is there and the caller's alone; the first `launch` makes it."""
    try:
        for path in (run, os.path.dirname(run)) if run.startswith("/tmp/") else (run,):
            status = os.lstat(path)
            if status.st_uid != os.geteuid() or status.st_mode & 0o170022 != 0o040000:
                return False
    except OSError:
        return False
    return True


def _hold(generation: str) -> int | None:
    """A descriptor that keeps the generation from being removed; None where `launch` has to say that it is gone."""
    try:
        held = os.open(f"{generation}/in-use", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return None
    return held


def _claim(place: str, generation: str) -> int | None:
    """A locked state file of an instance with this process's pid; None where `launch` has to say why there is none."""
    try:
        os.makedirs(place, mode=0o700, exist_ok=True)
        state = os.open(f"{place}/state", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(state).st_nlink:
            os.ftruncate(state, 0)
            os.write(state, os.fsencode(f"generation {generation}\nstarted {time.time():.3f}\n"))
            return state
    except OSError:
        pass
    os.close(state)
    return None


def _terminal() -> list[bytes]:
    try:
        columns, rows = os.get_terminal_size(0)
    except OSError:
        columns, rows = 80, 24
    return [wire.record(wire.TERMINAL, rows, columns), wire.text(wire.ENV, "TERM=" + os.environ.get("TERM", "dumb"))]
