"""From a directory to an image: a copy of the tree with what a guest needs beside it, then the file system."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from stockade.contain import warden_path
from stockade.errors import HostError
from stockade.kernel import userns
from stockade.records.image import Image

from . import filesystem, images, kernels

__all__ = ["HOME", "INIT", "Addition", "Owned", "image_of"]

HOME = "/.stockade"
#: The warden in an image: PID 1 of its guests, and what carries out a plan in them.
INIT = f"{HOME}/init"
_MOUNT_POINTS = ("proc", "sys", "dev", "run", "tmp")
#: What Debian builds as modules and services want: IPv6.
_MODULES = ("kernel/net/ipv6/ipv6.ko",)


class Addition(msgspec.Struct, frozen=True, kw_only=True):
    """A file to add to an image: its contents, or the host's file that it is a copy of.

    `capability` is what its `security.capability` holds (capabilities(7)), b"" for none.
    """

    path: str
    mode: int = 0o600
    content: bytes = b""
    source: str = ""
    capability: bytes = b""


class Owned(msgspec.Struct, frozen=True, kw_only=True):
    """A directory of an image, made where it is missing, and whose it is."""

    path: str
    mode: int
    uid: int = 0
    gid: int = 0


def image_of(
    name: str, tree: Path, image: Image, *, additions: Sequence[Addition] = (), directories: Sequence[Owned] = (),
    copies: Mapping[str, str] | None = None, owners: Mapping[str, tuple[int, int]] | None = None,
    size: int | None = None, with_init: bool = True, modules: Sequence[str] = (),
) -> Image:  # fmt: skip
    """Make the image `name` of the directory `tree`, as its owner sees it; `image` says the rest.

    `copies` are directories of the tree to have once more elsewhere, by target. Times are all the same, so that the
    same tree gives the same image. `owners` are those of its paths but root's, for a caller with a single id: on disk
    all is that one's then. `modules` are names of kernel modules that its guests load. Errors as the file system has
    them, HostError for a module that no kernel of this host has.
    """
    wanted = [*additions, *_guest_files(modules)] if with_init else list(additions)
    ids = None if os.geteuid() == 0 else userns.subordinate() or userns.Single(uid=0, gid=0)

    def fill(disk: Path) -> Image:
        scratch = Path(tempfile.mkdtemp(prefix=".tree-", dir=disk.parent))
        try:
            _as_owner(
                ids, _make, tree, scratch / "root", wanted, list(directories), dict(copies or {}), disk, name, size,
                ids.count if isinstance(ids, userns.Range) else None,
                None if not isinstance(ids, userns.Single) else dict(owners or {}),
            )  # fmt: skip
        finally:
            _as_owner(ids, _remove, scratch)
        return image

    return images.add(name, fill)


def _as_owner(ids: userns.Range | userns.Single | None, function: Callable[..., None], *arguments: object) -> None:
    """Call it with the rights over files of `ids`: at once as root, else in a user namespace."""
    if ids is None:
        function(*arguments)
    else:
        userns.call(function, *arguments, ids=ids)


def _guest_files(modules: Sequence[str]) -> list[Addition]:
    """The warden, and the modules of this host's kernels; `modules` are those wanted beside the usual ones."""
    if not os.access(warden_path(), os.R_OK):
        raise HostError(f"`{warden_path()}` is missing", hint="install Stockade again")
    found = [Addition(path=f"{HOME}/init", mode=0o755, source=warden_path())]
    lacking = set(modules)
    for kernel in kernels.known():
        for root in kernels.MODULE_ROOTS:
            base = Path(root) / kernel.version
            for number, module in enumerate(_in_order(base, modules)):
                lacking.discard(os.path.basename(module).partition(".ko")[0])
                target = f"{HOME}/modules/{kernel.version}/{number:02}-{os.path.basename(module)}"
                found.append(Addition(path=target, mode=0o444, source=os.fspath(base / module)))
    if lacking:
        raise HostError(
            f"no User-Mode Linux kernel of this host has the module `{min(lacking)}`",
            hint=f"look for its name below `{kernels.MODULE_ROOTS[0]}`",
        )
    return list({addition.path: addition for addition in found}.values())


def _in_order(base: Path, more: Sequence[str]) -> list[str]:
    """The wanted modules and those they need, in the order in which they can be loaded (modules.dep(5))."""
    try:
        lines = (base / "modules.dep").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    needs = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    wanted = [module for module in _MODULES if module in needs]
    wanted += [module for module in needs if os.path.basename(module).partition(".ko")[0] in more]
    return list(dict.fromkeys(module for one in wanted for module in (*reversed(needs[one]), one)))


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _make(
    tree: Path, root: Path, additions: list[Addition], directories: list[Owned], copies: dict[str, str], disk: Path,
    name: str, size: int | None, caller: int | None, owners: dict[str, tuple[int, int]] | None,
) -> None:  # fmt: skip
    """As the owner of the tree's files: copy, add, make the file system; `caller` is the caller's own id in here.

    With `owners` no other id than the caller's exists in here: they are written into the file system afterwards.
    """
    copy_tree(tree, root, keep_owners=owners is None)
    for point in _MOUNT_POINTS:
        if not os.path.lexists(root / point):
            (root / point).mkdir(mode=0o755)
    (root / HOME[1:]).mkdir(mode=0o700, exist_ok=True)
    for target, source in copies.items():
        place = _below(root, target)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _below(root, source).is_dir():
            copy_tree(_below(root, source), place, keep_owners=owners is None)
        else:
            place.mkdir(mode=0o755)
    for owned in directories:
        place = _below(root, owned.path)
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        if owners is None:
            os.chown(place, owned.uid, owned.gid)
        else:
            owners[owned.path] = owned.uid, owned.gid
        place.chmod(owned.mode)
    for addition in additions:
        place = _below(root, addition.path)
        place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if addition.source:
            shutil.copyfile(addition.source, place)
        else:
            place.write_bytes(addition.content)
        place.chmod(addition.mode)
        if addition.capability:
            os.setxattr(place, "security.capability", addition.capability)
    _same_times(root)
    filesystem.make(root, disk, name=name, size=size)
    if owners:
        filesystem.give(disk, owners)
    if caller is not None:
        os.chown(disk, caller, caller)


def _below(root: Path, path: str) -> Path:
    """A place in the copy, whose directories are no symlinks: those of a tree of one's own, checked all the same."""
    place = root
    parts = [part for part in path.split("/") if part]
    for part in parts:
        if part == ".." or place.is_symlink():
            raise HostError(f"`{path}` does not lie in the image: `{place.relative_to(root)}` is a link")
        place = place / part
    return place


def copy_tree(source: Path, target: Path, *, keep_owners: bool = True) -> None:
    """Copy a tree with owners, modes, links, devices and capabilities; hard links become one file again."""
    _copy(source, target, {}, keep_owners)


def _copy(source: Path, target: Path, seen: dict[tuple[int, int], Path], keep_owners: bool) -> None:
    status = source.lstat()
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFDIR and status.st_nlink > 1:
        first = seen.setdefault((status.st_dev, status.st_ino), target)
        if first != target:
            os.link(first, target, follow_symlinks=False)
            return
    if kind == stat.S_IFLNK:
        target.symlink_to(source.readlink())
    elif kind == stat.S_IFDIR:
        target.mkdir(mode=0o700)
        for name in sorted(os.listdir(source)):
            _copy(source / name, target / name, seen, keep_owners)
    elif kind == stat.S_IFREG:
        shutil.copyfile(source, target)
    elif kind == stat.S_IFIFO or (kind in (stat.S_IFCHR, stat.S_IFBLK) and keep_owners):
        os.mknod(target, status.st_mode, status.st_rdev)
    else:
        return
    if keep_owners:
        os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    if kind != stat.S_IFLNK:
        for attribute in os.listxattr(source, follow_symlinks=False):
            if attribute == "security.capability":
                os.setxattr(target, attribute, os.getxattr(source, attribute))
        target.chmod(stat.S_IMODE(status.st_mode))


def _same_times(root: Path) -> None:
    when = int(os.environ.get("SOURCE_DATE_EPOCH", filesystem.TIME))
    for directory, below, files in os.walk(root, topdown=False):
        for name in (*below, *files):
            os.utime(os.path.join(directory, name), (when, when), follow_symlinks=False)
    os.utime(root, (when, when))
