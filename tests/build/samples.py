"""Closures of real files, as the stage before gives them, for the tests of the build."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from stockade.records.closure import Closure, Entry, Evidence
from stockade.records.spec import Service, Spec


def spec(
    name: str = "sample", command: str = "/bin/true", user: str = "root", groups: tuple[str, ...] = (), **fields: object
) -> Spec:
    """A spec with what a test is about."""
    return Spec(name=name, service=Service(command=(command,), user=user, groups=groups), **fields)  # type: ignore[arg-type]


def no_package(_path: str) -> None:
    return None


class Collector:
    """Gather entries for host paths, with every directory and link on the way."""

    def __init__(self, *, root: Path = Path("/")) -> None:
        self.root = root
        self.entries: dict[str, Entry] = {}

    def add(self, path: str, kind: str = "access") -> None:
        todo, done = [part for part in reversed(path.split("/")) if part], []
        while todo:
            part = todo.pop()
            if part == "..":
                del done[-1:]
                continue
            here = "/" + "/".join([*done, part])
            source = str(self.root) + here if self.root != Path("/") else here
            status = os.lstat(source)
            common = {
                "path": here,
                "mode": stat.S_IMODE(status.st_mode),
                "uid": status.st_uid,
                "gid": status.st_gid,
                "evidence": (Evidence(kind=kind),),  # type: ignore[arg-type]
            }
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(source)
                self.entries[here] = Entry(type="symlink", target=target, **common)  # type: ignore[arg-type]
                if target.startswith("/"):
                    done = []
                todo += [part for part in reversed(target.split("/")) if part]
                continue
            done.append(part)
            if stat.S_ISDIR(status.st_mode):
                self.entries[here] = Entry(type="directory", **common)  # type: ignore[arg-type]
            else:
                entry = Entry(type="file", source=source, size=status.st_size, **common)  # type: ignore[arg-type]
                self.entries[here] = entry

    def add_program(self, path: str) -> None:
        """A program of the test's own choice, so ldd may run it."""
        self.add(path)
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, timeout=20, check=True).stdout
        for word in listed.split():
            if word.startswith("/"):
                self.add(word, "needed")

    def closure(self, **fields: object) -> Closure:
        return Closure(entries=tuple(self.entries.values()), **fields)  # type: ignore[arg-type]


def closure_of_tree(root: Path, **fields: object) -> Closure:
    """Everything below `root`, as if that were the host."""
    collector = Collector(root=root)
    for above, directories, files in os.walk(root):
        for name in (*directories, *files):
            collector_path = above[len(str(root)) :] + "/" + name
            if os.path.lexists(str(root) + collector_path):
                _add_one(collector, collector_path)
    return collector.closure(**fields)


def _add_one(collector: Collector, path: str) -> None:
    source = str(collector.root) + path
    status = os.lstat(source)
    kind = "symlink" if stat.S_ISLNK(status.st_mode) else "directory" if stat.S_ISDIR(status.st_mode) else "file"
    collector.entries[path] = Entry(
        path=path,
        type=kind,  # type: ignore[arg-type]
        source=source if kind == "file" else None,
        target=os.readlink(source) if kind == "symlink" else None,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size,
        evidence=(Evidence(kind="access"),),
    )
