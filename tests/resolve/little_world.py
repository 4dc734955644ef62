"""A host made of a few files, and traces written by hand, to try the rules on."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from stockade.records.closure import Closure, Entry, Gap
from stockade.records.spec import Files, Service, Spec
from stockade.records.trace import Access, Execution, Socket, Trace
from stockade.resolve import resolve

PROGRAM = "/usr/bin/service"


class World:
    """A root directory; all paths are as seen from inside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def outer(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def file(self, path: str, content: str | bytes = "x", *, mode: int = 0o644) -> str:
        outer = self.outer(path)
        outer.parent.mkdir(parents=True, exist_ok=True)
        outer.write_bytes(os.fsencode(content) if isinstance(content, str) else content)
        outer.chmod(mode)
        return path

    def files(self, *paths: str) -> None:
        for path in paths:
            self.file(path)

    def directory(self, path: str, *, mode: int = 0o755) -> str:
        outer = self.outer(path)
        outer.mkdir(parents=True, exist_ok=True)
        outer.chmod(mode)
        return path

    def link(self, path: str, target: str) -> str:
        outer = self.outer(path)
        outer.parent.mkdir(parents=True, exist_ok=True)
        outer.symlink_to(target)
        return path

    def resolve(self, trace: Trace | None, specification: Spec | None = None, *, gaps: tuple[Gap, ...] = ()) -> Closure:
        return resolve(trace, specification or spec(), gaps=gaps, root=str(self.root))


def spec(*, include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), **more: Any) -> Spec:
    more.setdefault("service", Service(command=(PROGRAM,)))
    more.setdefault("files", Files(include=include, exclude=exclude))
    return Spec(name="x", **{"timezone": False, **more})


def did(operation: str, path: str, error: str = "", **more: Any) -> Access:
    """One access of the service; `order` is given by `trace`."""
    return Access(path=path, operation=operation, error=error, pid=7, **more)  # type: ignore[arg-type]


def trace(*accesses: Access, where: str = "outside", sockets: tuple[Socket, ...] = (), **more: Any) -> Trace:
    counter = itertools.count(1)
    ordered = tuple(
        Access(
            path=access.path, operation=access.operation, error=access.error, pid=access.pid, order=next(counter),
            mode=access.mode, uid=access.uid, gid=access.gid,
        )
        for access in accesses
    )  # fmt: skip
    executions = (Execution(pid=7, program=PROGRAM),)
    return Trace(where=where, accesses=ordered, executions=executions, sockets=sockets, **more)  # type: ignore[arg-type]


def paths(closure: Closure) -> set[str]:
    return {entry.path for entry in closure.entries}


def entry(closure: Closure, path: str) -> Entry:
    return next(item for item in closure.entries if item.path == path)


def reasons(closure: Closure) -> dict[str, str]:
    return {positive.path: positive.reason for positive in closure.false_positives}


def advice(closure: Closure) -> set[tuple[str, str]]:
    return {(item.code, item.path) for item in closure.advice}


def work(directories: tuple[Any, ...]) -> dict[str, tuple[int, int, int]]:
    return {directory.path: (directory.mode, directory.uid, directory.gid) for directory in directories}
