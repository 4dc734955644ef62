"""F8 to F21: devices, mounts, handles, links and what is left behind for the host."""

from __future__ import annotations

import ctypes
import os
import stat

from .calls import attempt, error_name, opening
from .results import Result, absent, held, reached, skipped, worst
from .world import World, found_marks

__all__ = ["PROBES"]

# include/uapi/linux/mount.h and fcntl.h
_MS_RDONLY, _MS_REMOUNT, _MS_BIND = 1, 32, 4096
_MNT_DETACH = 2
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY = 1
_AT_FDCWD = -100

_MEMORY = os.makedev(1, 1)
_NODES = ("mem", "kmem", "port", "fuse", "net/tun", "kvm", "vhost-net", "vsock", "loop-control", "mapper/control",
          "uinput", "console", "tty0")  # fmt: skip


def _node(world: World, kind: int, device: int, name: str) -> Result:
    with world.scratch() as place:
        if place is None:
            return skipped("no directory here can be written to")
        path = f"{place}/node"
        try:
            os.mknod(path, kind | 0o600, device)
        except OSError as error:
            return held(f"mknod of {name}: {error_name(error.errno or 0)}")
        refused, _ = opening(path)
        if refused in ("ENXIO", "ENODEV"):
            return absent(f"this kernel has no {name} behind the node: {refused}")
        if refused:
            return held(f"open of a new node for {name}: {refused}")
        return reached(f"{name} can be opened through a new node")


def disk_node(world: World) -> Result:
    disk = world.request["disk"]
    if disk is None:
        return skipped("the host's root is on no block device")
    return _node(world, stat.S_IFBLK, os.makedev(*disk), "the host's disk")


def memory_node(world: World) -> Result:
    return _node(world, stat.S_IFCHR, _MEMORY, "/dev/mem")


def existing_nodes(world: World) -> Result:
    results = []
    disk = tuple(world.request["disk"] or ())
    names = dict.fromkeys((*_NODES, *(name for name in sorted(os.listdir("/dev")) if _is_block(f"/dev/{name}"))))
    for name in names:
        path = f"/dev/{name}"
        error, _ = opening(path)
        if error == "ENOENT":
            continue
        if error:
            results.append(held(f"open of {path}: {error}"))
            continue
        device = os.stat(path).st_rdev
        kind = "the host's disk" if (os.major(device), os.minor(device)) == disk else "a device of the host"
        results.append(reached(f"{path}, {kind}, can be opened"))
    return worst(results) if results else held("no such node is there: ENOENT")


def _is_block(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def new_mounts(world: World) -> Result:
    with world.scratch() as place:
        if place is None:
            return skipped("no directory here can be written to")
        target = place.encode()

        def undo(_: int) -> object:
            return world.call("umount2", target, _MNT_DETACH)

        return worst([
            attempt("mount of a tmpfs", world.call("mount", b"probe", target, b"tmpfs", 0, None), undo=undo),
            attempt("bind mount of /", world.call("mount", b"/", target, None, _MS_BIND, None), undo=undo),
        ])  # fmt: skip


def new_mount_calls(world: World) -> Result:
    return worst([
        attempt("fsopen", world.call("fsopen", b"tmpfs", 1), undo=os.close),
        attempt("open_tree", world.call("open_tree", _AT_FDCWD, b"/", _OPEN_TREE_CLONE), undo=os.close),
        attempt("move_mount", world.call("move_mount", -1, b"", -1, b"", 0), reach=("EBADF", "ENOENT", "EINVAL")),
        attempt("fsmount", world.call("fsmount", -1, 0, 0), reach=("EBADF",)),
    ])  # fmt: skip


def pivot(world: World) -> Result:
    return attempt("pivot_root", world.call("pivot_root", b"/", b"/"), reach=("EBUSY", "EINVAL"))


def writable_again(world: World) -> Result:
    tree = world.tree.encode()

    def undo(_: int) -> object:
        return world.call("mount", None, tree, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY, None)

    attribute = (ctypes.c_uint64 * 4)(0, _MOUNT_ATTR_RDONLY, 0, 0)
    return worst([
        attempt("remount", world.call("mount", None, tree, None, _MS_REMOUNT | _MS_BIND, None), undo=undo),
        attempt("mount_setattr", world.call("mount_setattr", _AT_FDCWD, tree, 0, attribute, 32), undo=undo),
    ])  # fmt: skip


def masks_off(world: World) -> Result:
    masks = [path for path in world.request["masks"] if os.path.lexists(path)]
    if not masks:
        return skipped("nothing is masked here")
    return worst(
        attempt(f"umount of {path}", world.call("umount2", path.encode(), _MNT_DETACH), reach=("EINVAL",))
        for path in masks
    )


def by_handle(world: World) -> Result:
    handle = world.canary["handle"]
    if handle is None:
        return skipped("the file system of the tree gives no file handles")
    content = bytes.fromhex(handle["bytes"])
    raw = len(content).to_bytes(4, "little") + handle["type"].to_bytes(4, "little", signed=True) + content
    place = os.open(world.tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        descriptor, error = world.call("open_by_handle_at", place, raw, os.O_RDONLY)
    finally:
        os.close(place)
    if error:
        return held(f"open_by_handle_at: {error}")
    with open(descriptor, "rb") as file:
        return reached("open_by_handle_at opened a file outside", marks=found_marks(file.read(4096)))


def overlay_and_fuse(world: World) -> Result:
    with world.scratch() as place:
        if place is None:
            return skipped("no directory here can be written to")
        target = place.encode()

        def undo(_: int) -> object:
            return world.call("umount2", target, _MNT_DETACH)

        mounted = world.call("mount", b"overlay", target, b"overlay", _MS_RDONLY, b"lowerdir=/dev:/etc")
        results = [attempt("mount of an overlay", mounted, undo=undo)]
    error, _ = opening("/dev/fuse", os.O_RDWR)
    results.append(held(f"open of /dev/fuse: {error}") if error else reached("/dev/fuse can be opened"))
    return worst(results)


def hard_link(world: World) -> Result:
    with world.scratch() as place:
        if place is None:
            return skipped("no directory here can be written to")
        try:
            os.link(world.canary["file"], f"{place}/link")
        except OSError as error:
            return held(f"link: {error_name(error.errno or 0)}")
        return reached("a hard link to a file outside", marks=found_marks(opening(f"{place}/link", read=4096)[1]))


def launchers_program(world: World) -> Result:
    results = []
    for path in ("/proc/1/exe", *world.request["launchers"]):
        try:
            link = os.readlink(path) if path.startswith("/proc") else path
        except OSError as error:
            results.append(held(f"readlink of {path}: {error_name(error.errno or 0)}"))
            continue
        refused, _ = opening(path, os.O_WRONLY)
        if refused in ("", "ETXTBSY"):
            results.append(reached(f"{path} ({link}) opened for writing: {refused or 'success'}"))
        else:
            results.append(held(f"open of {path} for writing: {refused}"))
    return worst(results)


def setuid_left_behind(world: World) -> Result:
    if os.geteuid() != 0:
        return skipped("only root inside can make a file of root's")
    with world.scratch() as place:
        if place is None:
            return skipped("no directory here can be written to")
        path = f"{place}/setuid"
        os.chmod(place, 0o755)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        try:
            os.fchmod(descriptor, 0o4755)
        except OSError as error:
            return held(f"chmod: {error_name(error.errno or 0)}")
        finally:
            os.close(descriptor)
        answer = world.ask("owner", path=path)
        if answer.startswith("0 4"):
            return reached("the host sees a setuid file of its root")
        return held(f"on the host the file has owner and mode {answer}")


PROBES = {
    "F8": disk_node,
    "F9": memory_node,
    "F10": existing_nodes,
    "F11": new_mounts,
    "F12": new_mount_calls,
    "F13": pivot,
    "F14": writable_again,
    "F15": masks_off,
    "F16": by_handle,
    "F17": overlay_and_fuse,
    "F18": hard_link,
    "F20": launchers_program,
    "F21": setuid_left_behind,
}
