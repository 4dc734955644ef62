"""What the host sees of a process behind walls: namespaces, ids, files. Changes nothing."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stockade.errors import WallError
from stockade.kernel.namespaces import CLONE_NEWUSER, setns

from .judge import Outside
from .request import NAMESPACES

__all__ = ["find_runner", "host_uid", "joined", "observed"]

Result = TypeVar("Result")


def joined(pid: int, function: Callable[..., Result], *arguments: object) -> Result:
    """`function(*arguments)` in a child that joined the user namespace of `pid`; the result comes back pickled.

    Who made a user namespace has every capability in it (user_namespaces(7)). OSError where it is somebody else's.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                with open(f"/proc/{pid}/ns/user", "rb") as namespace:
                    setns(namespace.fileno(), CLONE_NEWUSER)
                answer: object = function(*arguments)
            except OSError as error:
                answer = error
            with open(writer, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        result = pickle.load(file)
    os.waitpid(child, 0)
    if isinstance(result, OSError):
        raise result
    return result  # type: ignore[no-any-return]


def observed(pid: int, *, network: str) -> Outside:
    """The facts about a run that only the outside knows."""
    root = os.stat(f"/proc/{pid}/root/.")
    return Outside(
        network=network,
        namespaces={
            kind: os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES
        },
        uid=int(_fields(pid)["Uid"].split()[0]),
        jail_root=(root.st_dev, root.st_ino),
    )


def host_uid(pid: int, path: str) -> str:
    """Owner and octal mode of the file `path`, as the process `pid` names it and the host sees it."""
    status = os.lstat(f"/proc/{pid}/root{path}")
    return f"{status.st_uid} {status.st_mode & 0o7777:o}"


def find_runner(ancestor: int, inner: int, mark: str) -> int:
    """The process below `ancestor` whose last argument is `mark` and that calls itself `inner`. WallError for none."""
    for pid in _descendants(ancestor):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if os.fsencode(mark) in words[-2:] and int(_fields(pid)["NSpid"].split()[-1]) == inner:
                return pid
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise WallError("the probes' process cannot be found from outside", hint="is `/proc` mounted with `hidepid`?")


def _fields(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    return {key: rest.strip() for key, _, rest in (line.partition(":") for line in lines)}


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{thread}/children").read_text(encoding="ascii")
                found += [int(child) for child in children.split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
