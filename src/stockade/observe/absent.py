"""What a run in a view of the host missed, as nobody had made it, or the caller may not read it. Changes nothing."""

from __future__ import annotations

import json
import os

from ..records.spec import Spec
from ..records.text import escape
from ..records.trace import Access, Trace

__all__ = ["cures"]

_MAKING = frozenset({"create", "mkdir", "mknod", "bind"})
_NEEDING = frozenset({"read", "write", "stat", "exec", "list", "chdir"})
_ASKED = {
    "read": (os.R_OK, "read"), "list": (os.R_OK | os.X_OK, "read"), "exec": (os.X_OK, "execute"),
    "chdir": (os.X_OK, "enter"),
}  # fmt: skip
_EMPTY = "/tmp/"
_SHORT_LIVED = ("/run/", "/var/run/", "/var/lock/", "/var/tmp/", _EMPTY)
_MOST = 3


def cures(trace: Trace, spec: Spec) -> tuple[str, ...]:
    """What may help a service that failed outside, three hints at most.

    Directories in which it could not make anything because they are not there: at boot a unit or a script of the
    host makes them (systemd.exec(5), RuntimeDirectory=). What it looked for in the host's /tmp. What an ordinary
    user may not read. And names that it, or its command, gave without a directory, looked for in `/`, where it is run
    unless the spec says otherwise.
    """
    made = {access.path for access in trace.accesses if access.operation == "mkdir" and not access.error}
    found: dict[str, str] = {}
    for access in trace.accesses:
        if access.error in _CURES:
            place, text = _CURES[access.error](access, spec)
            related = any(f"{place}/".startswith(f"{one}/") or one.startswith(f"{place}/") for one in found)
            if place and place not in made and not related:
                found[place] = text
    return (*tuple(found.values())[:_MOST], *_beside(trace, spec))[:_MOST]


def _beside(trace: Trace, spec: Spec) -> tuple[str, ...]:
    """One hint on what was not in the working directory, for a service that is run in `/`."""
    if spec.service.directory != "/":
        return ()
    words = {os.path.normpath(word) for word in spec.service.command}
    looked: dict[str, None] = {}
    for access in trace.accesses:
        if access.error == "ENOENT" and access.operation in _NEEDING:
            name = os.path.normpath(access.path).lstrip("/")
            # An interpreter makes the name of its program absolute before it looks.
            if "/" not in name and (access.relative or name in words):
                looked[name] = None
    names = [name for name in looked if not name.startswith(".") and not os.path.lexists(f"/{name}")]
    if not names:
        return ()
    named = ", ".join(f"`{escape(name)}`" for name in names[-_MOST:])
    verb = "is" if len(names) == 1 else "are"
    return (f"{named} {verb} not in `/`, where it is run: `directory` in `[service]` names another place",)


def _absent(access: Access, spec: Spec) -> tuple[str, str]:
    """The place that was missing and what to do about it; ("", "") where nothing is known."""
    path = access.path
    if access.operation in _MAKING:
        directory = os.path.normpath(os.path.dirname(path))
        if os.path.isdir(directory) and not directory.startswith(_EMPTY):
            return "", ""
        kind = "tmpfs" if f"{directory}/".startswith(_SHORT_LIVED) else "volume"
        key = json.dumps(escape(directory), ensure_ascii=False)
        line = f'{key} = {{ kind = "{kind}", owner = "{spec.service.user}" }}'
        text = f"`{escape(directory)}`, in which it makes `{escape(os.path.basename(path))}`, is not there"
        return directory, f"{text}: put `{line}` into `[directories]`"
    if access.operation in _NEEDING and path.startswith(_EMPTY) and os.path.lexists(path):
        text = f"`{escape(path)}` is in the host's `/tmp`, of which a jail has one of its own: keep it elsewhere"
        return path, text
    return "", ""


def _closed(access: Access, _spec: Spec) -> tuple[str, str]:
    """What the host has, and refuses the caller; a directory on the way to it where that is closed."""
    if access.operation not in _NEEDING:
        return "", ""
    steps = os.path.normpath(access.path).split("/")
    for count in range(2, len(steps) + 1):
        path = "/".join(steps[:count])
        wanted, verb = _ASKED.get(access.operation, (os.F_OK, "")) if count == len(steps) else (os.X_OK, "read")
        if wanted and os.path.lexists(path) and not os.access(path, wanted):
            return path, f"on this host you may not {verb} `{escape(path)}`"
    return "", ""


_CURES = {"ENOENT": _absent, "EACCES": _closed}
