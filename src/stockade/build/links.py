"""Symbolic links of a root that does not exist yet, followed as the kernel would inside it. Touches no file."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from stockade.errors import BuildError
from stockade.records.text import escape

__all__ = ["Links"]

_MAXIMUM = 40  # include/linux/namei.h, MAXSYMLINKS


class Links:
    """The links of a root: canonical path to target.

    Made from links named by any path to them (`/lib/x` where `/lib` is a link itself). Those of `replaced`, paths
    where something else will stand, are left out.
    """

    def __init__(self, targets: Mapping[str, str], *, replaced: Collection[str] = ()) -> None:
        self.targets: dict[str, str] = {}
        self._parents: dict[str, str] = {}
        # A link's own place can lie behind other links: name all again until none moves.
        for _ in range(_MAXIMUM):
            covered = {self.place(path) for path in replaced}
            placed = {self.place(path): targets[path] for path in sorted(targets)}
            placed = {path: target for path, target in placed.items() if path not in covered and path != "/"}
            if placed == self.targets:
                return
            self.targets, self._parents = placed, {}
        some = ", ".join(f"`{escape(path)}`" for path in sorted(targets)[:5])
        raise BuildError(
            f"the places of the symbolic links depend on each other without end: {some}",
            hint="leave one of them out with `files.exclude`",
        )

    def place(self, path: str) -> str:
        """The canonical path of `path`, its last component not followed. BuildError for a loop above it."""
        above, _, name = path.rstrip("/").rpartition("/")
        if name in ("", ".", ".."):
            return self.resolve(path)
        parent = self._parents.get(above)
        if parent is None:
            parent = self._parents[above] = self.resolve(above)
        return f"{parent.rstrip('/')}/{name}"

    def end(self, path: str) -> str | None:
        """What `resolve` gives, None for a loop."""
        try:
            return self.resolve(path)
        except BuildError:
            return None

    def resolve(self, path: str) -> str:
        """The canonical path of what `path` leads to, existing or not. BuildError for a loop."""
        done: list[str] = []
        todo = _parts(path)
        followed = 0
        while todo:
            part = todo.pop()
            if part == "..":
                del done[-1:]
                continue
            done.append(part)
            target = self.targets.get("/" + "/".join(done))
            if target is None:
                continue
            followed += 1
            if followed > _MAXIMUM:
                raise BuildError(
                    f"the symbolic links on `{escape(path)}` form a loop", hint="leave it out with `files.exclude`"
                )
            if target.startswith("/"):
                done = []
            else:
                done.pop()
            todo += _parts(target)
        return "/" + "/".join(done)


def _parts(path: str) -> list[str]:
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]
