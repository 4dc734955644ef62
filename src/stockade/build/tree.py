"""The tree of a rootfs as data: closure and seeds brought together by canonical path. Touches no file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from stockade.errors import BuildError, SpecError
from stockade.records.closure import Closure, Entry, Evidence, FileType
from stockade.records.seed import Seed
from stockade.records.spec import Spec
from stockade.records.text import escape

from .accounts import AccountFiles, owner
from .layout import Layout
from .links import Links
from .permissions import Ownership, reduced_directory, reduced_file, state

__all__ = ["Node", "Tree", "evidence_of_seed"]

_PLAIN = Ownership(0o755, 0, 0)


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One path of the rootfs. A file has either a `source` on the host, of `size` bytes, or a `content`."""

    path: str
    type: FileType
    mode: int = 0o777
    uid: int = 0
    gid: int = 0
    source: str | None = None
    size: int = 0
    content: bytes | None = None
    target: str = ""
    secret: bool = False
    evidence: tuple[Evidence, ...] = ()


def evidence_of_seed(seed: Seed) -> Evidence:
    """Why a generated path is there."""
    return Evidence(kind="generated", detail=seed.reason)


class Tree:
    """Nodes by canonical path. What is generated wins over what is copied; a directory over nothing else."""

    def __init__(self, spec: Spec, links: Links, layout: Layout, accounts: AccountFiles) -> None:
        self.nodes: dict[str, Node] = {}
        self._wanted: dict[str, tuple[Evidence, ...]] = {}
        self.links = links
        self.layout = layout
        self._accounts = accounts
        self._modes = {links.place(path): mode for path, mode in spec.files.modes.items()}
        self._owners = {links.place(path): text for path, text in spec.files.owners.items()}
        self._setuid = {links.resolve(path) for path in spec.files.setuid}
        for path, mode in self._modes.items():
            if int(mode, 8) & 0o6000 and path not in self._setuid:
                raise SpecError(
                    f"`files.modes.\"{escape(path)}\"` sets setuid or setgid, which `files.setuid` does not allow",
                    hint=f"add `{escape(path)}` to `files.setuid`, or leave the bit out",
                )

    def keeps_setuid(self, path: str) -> bool:
        """Whether the spec lets the canonical `path` keep setuid, setgid and file capabilities."""
        return path in self._setuid

    def add_closure(self, closure: Closure) -> None:
        """Add the closure's entries; what a tmpfs would hide is left out, but BuildError for a file there."""
        for entry in closure.entries:
            if entry.type == "symlink":
                place = self.links.place(entry.path)
                if place in self.links.targets and not self.layout.hidden(place):
                    self._merge(Node(path=place, type="symlink", target=entry.target or "", evidence=entry.evidence))
            elif entry.type == "directory":
                self._directory(self.links.resolve(entry.path), entry)
            else:
                self._file(self.links.place(entry.path), entry)

    def _directory(self, place: str, entry: Entry) -> None:
        if self.layout.hidden(place):
            return
        rule = state(entry.mode, entry.uid, entry.gid, directory=True) if self.layout.in_volume(place) else None
        owned = self._decided(place, rule or reduced_directory(entry.mode, entry.uid, entry.gid))
        self._merge(Node(path=place, type="directory", evidence=entry.evidence, **owned._asdict()))

    def _file(self, place: str, entry: Entry) -> None:
        if place in self.links.targets:
            return
        if entry.source is None:
            self._wanted[place] = entry.evidence
            return
        hiding = self.layout.above(place)
        if hiding is not None and not hiding.volume:
            raise BuildError(
                f"`{escape(place)}` is needed and would be hidden by the tmpfs on `{escape(hiding.path)}`",
                hint=f'move it elsewhere, or add `"{escape(hiding.path)}" = {{ kind = "fixed" }}` to `[directories]`',
            )
        if self.layout.in_volume(place):
            rule = state(entry.mode, entry.uid, entry.gid, directory=False)
        else:
            rule = reduced_file(entry.mode, entry.uid, entry.gid, setuid=self.keeps_setuid(place))
        owned = self._decided(place, rule)
        node = Node(
            path=place, type="file", source=entry.source, size=entry.size, evidence=entry.evidence, **owned._asdict()
        )
        self._merge(node)

    def _decided(self, place: str, rule: Ownership) -> Ownership:
        """The spec's mode and owner where it gives them, else those of the rule."""
        mode, uid, gid = rule
        if place in self._modes:
            mode = int(self._modes[place], 8)
        if place in self._owners:
            uid, gid = owner(self._accounts, self._owners[place])
        return Ownership(mode, uid, gid)

    def add_seeds(self, seeds: Iterable[Seed]) -> None:
        """Add what is generated; SpecError for a file where it would be hidden at run time."""
        for seed in seeds:
            evidence = (evidence_of_seed(seed),)
            if seed.type == "directory":
                place = self.links.resolve(seed.path)
                if not self.layout.hidden(place):
                    self._replace(
                        Node(
                            path=place, type="directory", mode=seed.mode & 0o1777, uid=seed.uid, gid=seed.gid,
                            evidence=evidence,
                        )
                    )  # fmt: skip
                continue
            place = self.links.place(seed.path)
            hiding = self.layout.above(place)
            if hiding is not None and not hiding.volume:
                raise SpecError(
                    f"`{escape(seed.path)}` ({seed.reason}) would be hidden by the tmpfs on `{escape(hiding.path)}`",
                    hint=f'put it elsewhere, or give `"{escape(hiding.path)}"` the kind `fixed` or `volume`',
                )
            if seed.type == "symlink":
                self._replace(Node(path=place, type="symlink", target=seed.target, evidence=evidence))
                continue
            allowed = 0o7777 if self.keeps_setuid(place) else 0o1777
            self._replace(
                Node(
                    path=place, type="file", content=seed.content, mode=seed.mode & allowed, uid=seed.uid,
                    gid=seed.gid, secret=seed.secret, evidence=evidence,
                )
            )  # fmt: skip

    def add_directory(self, place: str, *evidence: Evidence, owned: Ownership = _PLAIN) -> None:
        """Add a directory that something other than closure and seeds asks for, unless it is there or hidden."""
        if place not in self.nodes and not self.layout.hidden(place):
            decided = self._decided(place, owned)
            because = tuple(sorted(set(evidence)))
            self.nodes[place] = Node(path=place, type="directory", evidence=because, **decided._asdict())

    def add_file(self, node: Node) -> None:
        """Add a generated file in place of whatever is there, whose evidence is kept."""
        self._replace(node)

    def add_parents(self) -> None:
        """Add each directory that is missing above a node; BuildError where something else stands there."""
        for node in sorted(self.nodes.values(), key=lambda node: node.path):
            path = node.path
            while path != "/":
                path = path.rpartition("/")[0] or "/"
                above = self.nodes.get(path)
                if above is None:
                    self.add_directory(path, Evidence(kind="parent", because=node.path))
                elif above.type == "directory":
                    break
                else:
                    raise BuildError(
                        f"`{escape(node.path)}` cannot be made: `{escape(path)}` is a {above.type}, not a directory",
                        hint="leave one of the two out with `files.exclude`",
                    )

    def _merge(self, node: Node) -> None:
        """Add a node; one that is there already by another name stays, with the evidence of both."""
        known = self.nodes.get(node.path)
        if known is None:
            self.nodes[node.path] = node
            return
        if known.type != node.type:
            raise BuildError(
                f"`{escape(node.path)}` is needed both as {known.type} and as {node.type}",
                hint="the host changed while it was observed: build again",
            )
        evidence = tuple(sorted({*known.evidence, *node.evidence}))
        self.nodes[node.path] = msgspec.structs.replace(known, evidence=evidence)

    def _replace(self, node: Node) -> None:
        known = self.nodes.get(node.path)
        if known is not None and "directory" in (known.type, node.type) and known.type != node.type:
            raise SpecError(
                f"the spec makes `{escape(node.path)}` a {node.type}, and it is needed as a {known.type}",
                hint="give it another path",
            )
        because = known.evidence if known is not None else self._wanted.get(node.path, ())
        evidence = tuple(sorted({*node.evidence, *because})) if because else node.evidence
        self.nodes[node.path] = msgspec.structs.replace(node, evidence=evidence)

    def unresolved(self, runtime: Iterable[str]) -> Iterator[str]:
        """Links that lead to nothing: neither to a node nor to what lies in `runtime` or is made at launch."""
        there = tuple(runtime)
        for path in sorted(self.links.targets):
            if path not in self.nodes:
                continue
            end = self.links.end(path)
            if end is None or not self._comes(end, there):
                yield path

    def _comes(self, path: str, runtime: tuple[str, ...]) -> bool:
        """Whether a canonical path is in the rootfs, or in what the launch makes or mounts."""
        if path in self.nodes or self.layout.above(path, itself=True) is not None:
            return True
        return any(path == place or path.startswith(f"{place}/") for place in runtime)
