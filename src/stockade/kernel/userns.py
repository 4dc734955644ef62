"""Run a function as root of a user namespace over the caller's subordinate ids. Needs no root, keeps no namespace."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pwd
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec

from stockade.errors import HostError

from .libc import check, function
from .namespaces import CLONE_NEWUSER, reason, refusal, unshare

__all__ = ["Range", "Single", "call", "range_cure", "require_range", "subordinate"]

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
_TIMEOUT_S = 30
_WANTED = 65536

_prctl = function("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Subordinate ids: `count` of them, from `first_uid` and from `first_gid`."""

    first_uid: int
    first_gid: int
    count: int


class Single(msgspec.Struct, frozen=True, kw_only=True):
    """No subordinate ids: the caller's own are seen inside as `uid` and `gid`."""

    uid: int
    gid: int


def subordinate(*, etc: Path = Path("/etc")) -> Range | None:
    """The caller's first ranges in subuid(5) and subgid(5), cut to equal length and 65536; None without both."""
    uids, gids = _range(etc / "subuid"), _range(etc / "subgid")
    if uids is None or gids is None:
        return None
    return Range(first_uid=uids[0], first_gid=gids[0], count=min(uids[1], gids[1], _WANTED))


def _range(path: Path) -> tuple[int, int] | None:
    names = {str(os.getuid()), _user()}
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (FileNotFoundError, PermissionError):
        return None
    for line in lines:
        name, _, numbers = line.partition(":")
        first, _, count = numbers.partition(":")
        if name in names and first.isdecimal() and count.isdecimal() and int(count) > 0:
            return int(first), int(count)
    return None


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def require_range(*, etc: Path = Path("/etc")) -> Range:
    """`subordinate`, or HostError with the command that gives the caller a range."""
    ids = subordinate(etc=etc)
    if ids is None:
        raise HostError(
            f"user `{_user()}` has no range of subordinate ids in `{etc}/subuid` and `{etc}/subgid`", hint=range_cure()
        )
    return ids


def range_cure() -> str:
    """What gives the caller a range of subordinate ids."""
    return (
        f"as root: `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {_user()}` "
        "(any 65536 ids that nobody else has)"
    )


def call(
    function: Callable[..., Result], *args: object, ids: Range | Single, **keywords: object
) -> Result:
    """`function(*args, **keywords)`, run in a child that has every capability over files of `ids`.

    With a Range the ids 0 to count - 1 inside are the caller's subordinate ones, the child is 0, and the caller's
    own id is `count`: so it reads the caller's files too. With a Single the child has those ids. The
    result, or the exception, comes back pickled. HostError, with the cure, where the host does not allow it. When the
    caller is interrupted the child is ended first.
    """
    import pickle  # before the child needs it: root never comes here

    ready_out, ready_in = os.pipe()
    mapped_out, mapped_in = os.pipe()
    result_out, result_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready_out)
        os.close(mapped_in)
        os.close(result_out)
        _child(lambda: function(*args, **keywords), ids, ready_in, mapped_out, result_in)
    for descriptor in (ready_in, mapped_out, result_in):
        os.close(descriptor)
    reaped = False
    try:
        answer = os.read(ready_out, 16)
        if answer != b"ready":
            raise _refused(int(answer or b"0"))
        if isinstance(ids, Range):
            _map(pid, ids)
        os.write(mapped_in, b"mapped")
        with open(result_out, "rb", closefd=False) as out:
            payload = out.read()
        _, status = os.waitpid(pid, 0)
        reaped = True
    finally:
        for descriptor in (ready_out, mapped_in, result_out):
            os.close(descriptor)
        if not reaped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if not payload:
        code = os.waitstatus_to_exitcode(status)
        raise HostError(f"the process in the user namespace ended without an answer, with status {code}")
    good, value = pickle.loads(payload)
    if good:
        return value  # type: ignore[no-any-return]
    raise value


def _child(
    work: Callable[[], object], ids: Range | Single, ready_in: int, mapped_out: int, result_in: int
) -> NoReturn:
    status = 1
    try:
        uid, gid = os.geteuid(), os.getegid()
        try:
            unshare(CLONE_NEWUSER)
        except OSError as error:
            os.write(ready_in, str(error.errno).encode())
            os._exit(1)
        os.write(ready_in, b"ready")
        os.close(ready_in)
        with open(mapped_out, "rb") as mapped:
            if mapped.read(6) != b"mapped":
                os._exit(1)
        try:
            _enter(ids, uid, gid)
            answer: tuple[bool, object] = True, work()
        except BaseException as error:
            answer = False, error
        with open(result_in, "wb") as out:
            out.write(_packed(answer))
        status = 0
    finally:
        os._exit(status)


def _packed(answer: tuple[bool, object]) -> bytes:
    import pickle

    try:
        packed = pickle.dumps(answer)
        pickle.loads(packed)
    except Exception:
        if answer[0] or not isinstance(answer[1], BaseException):
            raise
        import traceback

        text = "".join(traceback.format_exception(answer[1])).rstrip()
        return pickle.dumps((False, RuntimeError(f"in the user namespace: {text}")))
    return packed


def _enter(ids: Range | Single, uid: int, gid: int) -> None:
    """Become the namespace's root (or its only id), ended with the parent."""
    try:
        if isinstance(ids, Single):
            # user_namespaces(7): without a helper only the own id can be mapped, after setgroups is given up.
            Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
            Path("/proc/self/uid_map").write_text(f"{ids.uid} {uid} 1", encoding="ascii")
            Path("/proc/self/gid_map").write_text(f"{ids.gid} {gid} 1", encoding="ascii")
        else:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
    except PermissionError as error:
        raise _refused(errno.EPERM) from error
    check(_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _map(pid: int, ids: Range) -> None:
    import subprocess

    for command, first, own in (
        ("newuidmap", ids.first_uid, os.geteuid()),
        ("newgidmap", ids.first_gid, os.getegid()),
    ):
        numbers = [pid, 0, first, ids.count, ids.count, own, 1]
        try:
            done = subprocess.run(
                [command, *map(str, numbers)],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
        except (FileNotFoundError, PermissionError) as error:
            raise HostError(
                f"`{command}` is not installed, and without it a range of ids cannot be used",
                hint="install it: `apt-get install uidmap`",
            ) from error
        if done.returncode != 0:
            raise HostError(
                f"`{command}` refused the ids from {first} to {first + ids.count - 1}: "
                f"{done.stderr.strip() or 'no message'}",
                hint=f"as root: `usermod --add-subuids {ids.first_uid}-{ids.first_uid + ids.count - 1} --add-subgids "
                f"{ids.first_gid}-{ids.first_gid + ids.count - 1} {_user()}`; and `{command}` must be setuid root or "
                "have its file capability (`apt-get install --reinstall uidmap`)",
            )


def _refused(code: int) -> HostError:
    return HostError(
        f"this host refuses user namespaces to user `{_user()}`: {reason(code)}", hint=refusal(code)
    )
