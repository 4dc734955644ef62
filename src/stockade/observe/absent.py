"""What a run in a view of the host missed because nobody had made it there, and the cure. Changes nothing."""

from __future__ import annotations

import json
import os

from ..records.spec import Spec
from ..records.text import escape
from ..records.trace import Access, Trace

__all__ = ["cures"]

_MAKING = frozenset({"create", "mkdir", "mknod", "bind"})
_NEEDING = frozenset({"read", "write", "stat", "exec", "list", "chdir"})
_EMPTY = "/tmp/"
_SHORT_LIVED = ("/run/", "/var/run/", "/var/lock/", "/var/tmp/", _EMPTY)
_MOST = 3


def cures(trace: Trace, spec: Spec) -> tuple[str, ...]:
    """What may help a service that failed outside, three hints at most.

    Directories in which it could not make anything because they are not there: at boot a unit or a script of the
    host makes them (systemd.exec(5), RuntimeDirectory=). And what it looked for in the host's /tmp.
    """
    made = {access.path for access in trace.accesses if access.operation == "mkdir" and not access.error}
    found: dict[str, str] = {}
    for access in trace.accesses:
        if access.error == "ENOENT":
            place, text = _cure(access, spec)
            related = any(f"{place}/".startswith(f"{one}/") or one.startswith(f"{place}/") for one in found)
            if place and place not in made and not related:
                found[place] = text
    return tuple(found.values())[:_MOST]


def _cure(access: Access, spec: Spec) -> tuple[str, str]:
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
