"""The plan of a rootfs: ordered operations, from records alone. Applies nothing and reads no file."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterator

import msgspec

from stockade.errors import BuildError
from stockade.records.closure import Closure, Entry, Evidence
from stockade.records.lock import LockDirectory
from stockade.records.seed import Seed
from stockade.records.spec import Spec
from stockade.records.text import escape

from . import loader
from .accounts import AccountFiles
from .layout import Layout, layout
from .links import Links
from .operations import CopyFile, MakeDirectory, MakeSymlink, Operation, WriteFile
from .permissions import ID_COUNT, Ownership
from .tree import Node, Tree

__all__ = ["HostFacts", "Plan", "plan", "proc_of"]


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan must know of the host.

    `mounts`: type of each source of the spec's mounts. `capabilities`: `security.capability` of files that may keep
    it. `library_directories`: those of its ld.so.conf. `libraries`: what its libraries say of themselves.
    `configurations`: texts that an ld.so.conf may include. `id_count`: ids that the jail can have. `single`: uid and
    gid that own everything, where the jail has only one id.
    """

    mounts: dict[str, str] = {}
    capabilities: dict[str, bytes] = {}
    library_directories: tuple[str, ...] = ()
    libraries: dict[str, loader.Library] = {}
    configurations: dict[str, str] = {}
    id_count: int = ID_COUNT
    single: tuple[int, int] | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to make a rootfs.

    `nodes` has a node for each operation, in the same order. `unresolved` lists symlinks that lead to nothing.
    """

    operations: tuple[Operation, ...]
    nodes: tuple[Node, ...]
    directories: tuple[LockDirectory, ...]
    proc: str
    unresolved: tuple[str, ...] = ()


def proc_of(closure: Closure, spec: Spec) -> str:
    """What the jail sees of /proc: "none", "pid" or "full"."""
    if spec.policy.proc != "auto":
        return spec.policy.proc
    if not closure.proc:
        return "none"
    return "pid" if closure.proc_subset else "full"


def plan(
    closure: Closure, spec: Spec, seeds: Collection[Seed], accounts: AccountFiles, *, host: HostFacts
) -> Plan:
    """The operations for `closure` and `seeds`, in the order in which they can be carried out.

    `accounts` resolves owners that the spec names. SpecError and BuildError for what cannot be a rootfs.
    """
    links, made = _placed(closure, spec, seeds, accounts)
    shown = _dereferenced(closure, links, made)
    if shown is not closure:
        links, made = _placed(shown, spec, seeds, accounts)
    tree = Tree(spec, links, made, accounts)
    tree.add_closure(shown)
    tree.add_seeds(seeds)
    proc = proc_of(closure, spec)
    _add_launched(tree, spec, made, proc, host)
    _add_loader(tree, host)
    tree.add_directory(links.resolve(spec.service.directory), Evidence(kind="spec", detail="`service.directory`"))
    tree.add_directory("/", Evidence(kind="generated", detail="the root"))
    tree.add_parents()
    nodes = sorted(tree.nodes.values(), key=_order)
    mounts = [links.resolve(mount.target) for mount in spec.mounts]
    return Plan(
        operations=tuple(_operation(tree, node, host) for node in nodes),
        nodes=tuple(nodes),
        directories=tuple(_checked_directory(found, host) for found in made.locked()),
        proc=proc,
        unresolved=tuple(tree.unresolved(["/proc", "/dev", "/sys", *mounts])),
    )


def _placed(
    closure: Closure, spec: Spec, seeds: Collection[Seed], accounts: AccountFiles
) -> tuple[Links, Layout]:
    targets = {entry.path: entry.target or "" for entry in closure.entries if entry.type == "symlink"}
    targets.update((seed.path, seed.target) for seed in seeds if seed.type == "symlink")
    links = Links(targets, replaced=[seed.path for seed in seeds if seed.type == "file"])
    files = [links.place(entry.path) for entry in closure.entries if entry.type == "file"]
    files += [links.place(seed.path) for seed in seeds if seed.type != "directory"]
    return links, layout(closure, spec, links, accounts, files)


def _dereferenced(closure: Closure, links: Links, made: Layout) -> Closure:
    """`closure` with links to files that a tmpfs would hide turned into those files.

    The case is /etc/resolv.conf, where a resolver keeps the file itself below /run.
    """
    hidden = {
        place: entry
        for place, entry in ((links.place(entry.path), entry) for entry in closure.entries if entry.type == "file")
        if made.hidden(place)
    }
    if not hidden:
        return closure
    entries: list[Entry] = []
    shown: set[str] = set()
    for entry in closure.entries:
        end = links.end(entry.path) if entry.type == "symlink" else None
        if end is not None and end in hidden and not made.hidden(links.place(entry.path)):
            file = hidden[end]
            evidence = tuple(sorted({*entry.evidence, *file.evidence}))
            entries.append(msgspec.structs.replace(file, path=entry.path, evidence=evidence))
            shown.add(file.path)
        else:
            entries.append(entry)
    kept = tuple(entry for entry in entries if entry.type != "file" or entry.path not in shown)
    return msgspec.structs.replace(closure, entries=kept)


def _add_launched(tree: Tree, spec: Spec, made: Layout, proc: str, host: HostFacts) -> None:
    """Add the mount points of what is mounted at launch, and the fixed directories of the layout."""
    for place, fixed in made.fixed.items():
        evidence = fixed.evidence[0] if fixed.evidence else Evidence(kind="spec", detail="`directories`")
        tree.add_directory(place, evidence, owned=Ownership(fixed.mode, fixed.uid, fixed.gid))
    for place, launched in made.launched.items():
        detail = f"mount point of volume {launched.volume}" if launched.volume else "mount point of a tmpfs"
        evidence = Evidence(kind="generated", detail=detail)
        if launched.volume:
            tree.add_directory(place, evidence, owned=Ownership(launched.mode, launched.uid, launched.gid))
        else:
            # Its mode and owner are the tmpfs's: what lies under it is only a place.
            known = tree.nodes.pop(place, None)
            tree.add_directory(place, evidence, *(known.evidence if known is not None else ()))
    tree.add_directory("/dev", Evidence(kind="generated", detail="mount point of the devices"))
    if proc != "none":
        tree.add_directory("/proc", Evidence(kind="generated", detail="mount point of proc"))
    for mount in spec.mounts:
        place = tree.links.resolve(mount.target)
        evidence = Evidence(kind="spec", detail="target of `mounts`", because=mount.source)
        if place in tree.nodes or tree.layout.hidden(place):
            continue
        if host.mounts.get(mount.source) == "file":
            tree.add_file(Node(path=place, type="file", content=b"", mode=0o444, evidence=(evidence,)))
        else:
            tree.add_directory(place, evidence)


def _add_loader(tree: Tree, host: HostFacts) -> None:
    """Add ld.so.conf and ld.so's cache, if glibc's loader is in the tree."""
    files = [path for path, node in tree.nodes.items() if node.type != "directory"]
    cache, configuration = tree.links.place(loader.CACHE), tree.links.resolve(loader.CONFIGURATION)
    if not any(loader.is_loader(path) for path in files):
        tree.nodes.pop(cache, None)
        return
    known = tree.nodes.get(configuration)
    content = known.content if known is not None else None
    if content is None:
        content = loader.configured([tree.links.resolve(path) for path in host.library_directories], files)
        evidence = Evidence(kind="generated", detail="directories of the jail's libraries")
        tree.add_file(Node(path=configuration, type="file", content=content, mode=0o444, evidence=(evidence,)))
    named = loader.directories(
        loader.CONFIGURATION, lambda path: _text(tree.nodes.get(tree.links.resolve(path)), host),
        lambda pattern: _matching(tree, pattern),
    )  # fmt: skip
    searched = [tree.links.resolve(path) for path in (*named, *loader.DEFAULT)]
    content = loader.cache(searched, dict(_libraries(tree, host)))
    evidence = Evidence(kind="generated", detail="cache of the jail's libraries")
    tree.add_file(Node(path=cache, type="file", content=content, mode=0o444, evidence=(evidence,)))


def _matching(tree: Tree, pattern: str) -> list[str]:
    """The paths of the tree that a glob(7) pattern matches: its wildcards do not match a slash."""
    place = tree.links.place(pattern)
    return [path for path in fnmatch.filter(tree.nodes, place) if path.count("/") == place.count("/")]


def _text(node: Node | None, host: HostFacts) -> str:
    """What a file of the tree will say to ldconfig(8)."""
    if node is None or node.type != "file":
        return ""
    return host.configurations.get(node.source or "", "") if node.content is None else os.fsdecode(node.content)


def _libraries(tree: Tree, host: HostFacts) -> Iterator[tuple[str, loader.Library]]:
    """The libraries of the tree by path, and the links to them."""
    for path, node in tree.nodes.items():
        end = tree.links.end(path) if node.type == "symlink" else path
        there = tree.nodes.get(end) if end is not None else None
        if there is not None and there.source in host.libraries:
            yield path, host.libraries[there.source]


def _order(node: Node) -> tuple[int, str, str]:
    """Directories first, parents before children; of the rest, those of one directory stand together."""
    if node.type == "directory":
        return 0, node.path, ""
    above, _, name = node.path.rpartition("/")
    return 1, above, name


def _operation(tree: Tree, node: Node, host: HostFacts) -> Operation:
    uid, gid = host.single or (node.uid, node.gid)
    if max(uid, gid) >= host.id_count:
        raise _too_many(node.path, max(uid, gid), host)
    if node.type == "directory":
        return MakeDirectory(path=node.path, mode=node.mode, uid=uid, gid=gid)
    if node.type == "symlink":
        return MakeSymlink(path=node.path, target=node.target, uid=uid, gid=gid)
    if node.source is not None:
        capabilities = host.capabilities.get(node.source, b"") if tree.keeps_setuid(node.path) else b""
        return CopyFile(
            path=node.path, source=node.source, mode=node.mode, uid=uid, gid=gid, capabilities=capabilities,
            size=node.size,
        )  # fmt: skip
    return WriteFile(path=node.path, content=node.content or b"", mode=node.mode, uid=uid, gid=gid)


def _checked_directory(found: LockDirectory, host: HostFacts) -> LockDirectory:
    if host.single is not None:
        return msgspec.structs.replace(found, uid=host.single[0], gid=host.single[1])
    if max(found.uid, found.gid) >= host.id_count:
        raise _too_many(found.path, max(found.uid, found.gid), host)
    return found


def _too_many(path: str, number: int, host: HostFacts) -> BuildError:
    return BuildError(
        f"`{escape(path)}` belongs to the id {number}, and the jail has the ids 0 to {host.id_count - 1}",
        hint="give it another owner in `files.owners`, or its account a lower `uid` in `[[accounts]]`",
    )
