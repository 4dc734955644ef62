"""What a failed launch step means and what to do about it: `failures.toml` says. Launches nothing."""

from __future__ import annotations

import errno
import os
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from stockade.errors import WallError

__all__ = ["wall_error"]

_STATUS = {errno.ENOENT: 127, errno.ENOTDIR: 127}


class _Cause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of the table: why it failed ("": as the errno says), and what to do.

    It is for a step, for names of errnos, and for a pattern (glob(7)) that the path matches which it failed on; what is
    left out is for all.
    """

    step: str = ""
    errnos: tuple[str, ...] = ()
    path: str = "*"
    why: str = ""
    hint: str

    def fits(self, step: str, name: str, path: str) -> bool:
        return self.step in ("", step) and (not self.errnos or name in self.errnos) and fnmatchcase(path, self.path)


def _causes() -> tuple[_Cause, ...]:
    text = Path(__file__).with_name("failures.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text)["cause"], tuple[_Cause, ...])


def wall_error(line: str) -> WallError:
    """The error for the warden's `failed` line: "ERRNO STEP: OBJECT".

    `exit_code` is 125, or for an exec that failed 127 (not found) or 126.
    """
    number_text, _, rest = line.partition(" ")
    step, _, target = rest.partition(": ")
    number = int(number_text) if number_text.isdecimal() else 0
    name = errno.errorcode.get(number, str(number))
    cause = next((row for row in _causes() if row.fits(step, name, target)), None)
    why = cause.why if cause is not None and cause.why else os.strerror(number).lower()
    hint = cause.hint if cause is not None else None
    if step == "exec":
        error = WallError(f"cannot execute `{target}`: {why}", hint=hint)
        error.exit_code = _STATUS.get(number, 126)
        return error
    named = f" on `{target}`" if target else ""
    return WallError(f"launch step `{step}` failed{named} ({name}): {why}", hint=hint)
