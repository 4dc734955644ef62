"""The file system of a view, made in the current mount namespace. Writes nothing on the host's file systems.

An overlay over each of the host's mounts with files (`lowerdir=/` alone would leave every mount below
it empty), and afresh /dev, /proc, /sys, /run and /tmp.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..kernel.mount import (
    AT_RECURSIVE,
    MNT_DETACH,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    mount,
    mount_setattr,
    move_mount,
    pivot_root,
    umount2,
)
from .hostmounts import FRESH, HostMount, parse, visible
from .seeding import SeedMessage, closed_above, own, place, plant

__all__ = ["RUN", "ROOT_LINK", "TRACE_DIRECTORY", "Tree"]

#: What Stockade itself has inside a view.
RUN = "/run/stockade"
ROOT_LINK = f"{RUN}/root"
TRACE_DIRECTORY = f"{RUN}/trace"

_STAGING = "/tmp"
_ROOT = f"{_STAGING}/root"
_SIZE = "size=50%"
_TRACE_SIZE = "size=25%"
_FLAGS = {"nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC}

#: Name, major and minor number (Documentation/admin-guide/devices.txt).
_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
_DEVICE_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)

#: Below /run: directories of one session, of namespaces, or of our own, that no service of a view shares.
_NO_SKELETON = frozenset(("/run/user", "/run/stockade", "/run/credentials", "/run/netns", "/run/snapd"))
_MOST_DIRECTORIES = 4096

#: errno of an overlay mount that no other directory would do better with.
_NO_OVERLAY = frozenset((errno.ENODEV, errno.EPERM))


@dataclass
class Tree:
    """One view's file system while it is being made.

    `ordinary` is an ordinary user's: overlays by top-level directory, because an overlay over a
    directory with a locked mount beneath it is refused (mount_namespaces(7)), and seeds written
    before the overlays are mounted, as that user may not create files in the host's directories.
    """

    ordinary: bool
    new_network: bool
    seeds: Sequence[SeedMessage]
    service_root: int | None
    _layers: int = 0

    def build(self) -> int:
        """Make the tree and pivot into it; a descriptor of TRACE_DIRECTORY. OSError names what failed."""
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = parse(file.read())
        seeded = {place(seed["path"]) for seed in self.seeds if seed["type"] != "directory"}
        # Nothing can be written over a file that is a mount point (unlink(2): EBUSY).
        sources = _open(item for item in visible(mounts) if item.point not in seeded)
        mount("stockade", _STAGING, "tmpfs", MS_NOSUID | MS_NODEV, f"{_SIZE},mode=0755")
        for name in ("upper", "work", "root"):
            os.mkdir(f"{_STAGING}/{name}")
        if self.ordinary:
            _tmpfs(_ROOT, MS_NODEV, f"{_SIZE},mode=0755")
            closed = {path for seed in self.seeds if (path := closed_above(seed))}
            self._directories("/", {item.point for item in mounts} | closed, seeded, closed)
        else:
            for item, source in sources:
                self._layer(source, item.point, item.flags)
        self._fresh()
        for _, source in sources:
            os.close(source)
        os.chdir(_ROOT)
        pivot_root(".", ".")
        umount2(".", MNT_DETACH)
        os.chdir("/")
        for seed in self.seeds:
            if not (self.ordinary and os.path.lexists(seed["path"]) and seed["type"] != "directory"):
                plant(seed)
        return os.open(TRACE_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _directories(self, directory: str, points: set[str], seeded: set[str], closed: set[str]) -> None:
        """Show each entry of the host's `directory`: an overlay, or made anew where one of `points` lies beneath.

        What stands in the place of one of `seeded` is left out, directories in `closed` are made anew and stay empty.
        """
        for entry in _entries(directory):
            path, target = entry.path, _ROOT + entry.path
            if path in FRESH or path in seeded:
                continue
            if entry.is_symlink():
                os.symlink(os.readlink(path), target)
            elif not entry.is_dir():
                with contextlib.suppress(PermissionError):
                    self._bind(path, target)
            elif path in closed or any(point.startswith(f"{path}/") for point in points):
                os.mkdir(target)
                _like(target, os.stat(path))
                if path in closed:
                    continue
                with contextlib.suppress(PermissionError):
                    self._directories(path, points, seeded, closed)
            else:
                self._visible_directory(path, target)

    def _visible_directory(self, path: str, target: str) -> None:
        os.mkdir(target)
        try:
            source = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except PermissionError:
            return
        flags = _statvfs_flags(path)
        self._layer(source, path, flags)
        os.close(source)

    def _layer(self, source: int, point: str, flags: frozenset[str]) -> None:
        """Show the directory or file `source` at `point`: copy-on-write, or as it is and read-only."""
        target = _ROOT if point == "/" else _ROOT + point
        lower = f"/proc/self/fd/{source}"
        if not stat.S_ISDIR(os.stat(lower).st_mode) or "ro" in flags:
            self._bind(lower, target)
            return
        upper, work = (f"{_STAGING}/{part}/{self._layers}" for part in ("upper", "work"))
        self._layers += 1
        os.mkdir(upper)
        os.mkdir(work)
        _like(upper, os.stat(lower))
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        staged = self.ordinary and self._stage(point, upper)
        # overlayfs.rst: trusted.* attributes, which renaming a lower directory needs, are root's alone.
        options += ",userxattr" if self.ordinary else ",redirect_dir=on"
        try:
            mount("overlay", target, "overlay", sum(_FLAGS.get(flag, 0) for flag in flags), options)
        except OSError as error:
            if point == "/" or staged or error.errno in _NO_OVERLAY:
                raise OSError(error.errno, f"overlay: {os.strerror(error.errno or 0)}", point) from error
            self._bind(lower, target)

    def _stage(self, point: str, upper: str) -> bool:
        """Write the seeds that lie below `point` into its upper layer, with the parents' modes of the host.

        Whether there are any.
        """
        staged = False
        for seed in self.seeds:
            path = place(seed["path"])
            if not path.startswith(f"{point}/"):
                continue
            steps = path[len(point) + 1 :].split("/")
            host, made = point, upper
            for step in steps[:-1]:
                host, made = f"{host}/{step}", f"{made}/{step}"
                if not os.path.lexists(made):
                    os.mkdir(made, 0o755)
                    own(made, 0, 0)
                    if os.path.isdir(host):
                        _like(made, os.stat(host))
            plant({**seed, "path": f"{made}/{steps[-1]}"})
            staged = True
        return staged

    def _bind(self, source: str, target: str) -> None:
        if not os.path.lexists(target):
            if stat.S_ISDIR(os.stat(source).st_mode):
                os.mkdir(target)
            else:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
        mount(source, target, None, MS_BIND | MS_REC)
        mount_setattr(None, target, AT_RECURSIVE, attr_set=MOUNT_ATTR_RDONLY)

    def _fresh(self) -> None:
        for path in FRESH:
            with contextlib.suppress(FileExistsError):
                os.mkdir(_ROOT + path)
        self._dev()
        self._proc()
        self._sys()
        _tmpfs(f"{_ROOT}/run", MS_NOSUID | MS_NODEV, f"{_SIZE},mode=0755")
        _skeleton("/run", f"{_ROOT}/run")
        _tmpfs(f"{_ROOT}/tmp", MS_NOSUID | MS_NODEV, f"{_SIZE},mode=1777")
        os.mkdir(_ROOT + RUN)
        os.mkdir(_ROOT + TRACE_DIRECTORY)
        # An ordinary user reads what the namespace's root, another id of the host, writes there.
        mode = "mode=0755" if self.ordinary else "mode=0700"
        mount("stockade", _ROOT + TRACE_DIRECTORY, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"{_TRACE_SIZE},{mode}")
        if self.service_root is None:
            os.symlink("/", _ROOT + ROOT_LINK)
        else:
            os.mkdir(_ROOT + ROOT_LINK)
            move_mount(self.service_root, _ROOT + ROOT_LINK)

    def _dev(self) -> None:
        dev = f"{_ROOT}/dev"
        _tmpfs(dev, MS_NOSUID | MS_NOEXEC, "size=1m,mode=0755")
        for name, major, minor in _DEVICES:
            path = f"{dev}/{name}"
            if self.ordinary:
                # mknod(2) of a device is never allowed in a user namespace.
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
                mount(f"/dev/{name}", path, None, MS_BIND)
            else:
                os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
                os.chmod(path, 0o666)
        for name, target in _DEVICE_LINKS:
            os.symlink(target, f"{dev}/{name}")
        for name in ("pts", "shm"):
            os.mkdir(f"{dev}/{name}")
        options = "newinstance,ptmxmode=0666,mode=0620"
        try:
            mount("devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, f"{options},gid={_tty_group()}")
        except OSError:
            mount("devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, options)
        _tmpfs(f"{dev}/shm", MS_NOSUID | MS_NODEV, f"{_SIZE},mode=1777")

    def _proc(self) -> None:
        proc = f"{_ROOT}/proc"
        mount("proc", proc, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        if self.new_network:
            with contextlib.suppress(OSError), open(f"{proc}/sys/net/ipv4/ip_unprivileged_port_start", "w") as file:
                file.write("0")
        for path in _writable_for_root(proc):
            mount(path, path, None, MS_BIND)
            mount_setattr(None, path, 0, attr_set=MOUNT_ATTR_RDONLY)

    def _sys(self) -> None:
        target = f"{_ROOT}/sys"
        try:
            mount("sysfs", target, "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
        except PermissionError:
            self._bind("/sys", target)


def _tmpfs(target: str, flags: int, options: str) -> None:
    """An empty tmpfs that belongs to the view's root, where it has one."""
    mount("stockade", target, "tmpfs", flags, options)
    own(target, 0, 0)


def _open(mounts: Iterable[HostMount]) -> list[tuple[HostMount, int]]:
    """A descriptor of each mount's root; without those that a later mount above them hides."""
    found = []
    for item in mounts:
        try:
            descriptor = os.open(item.point, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
            ids = [int(line.split()[1]) for line in file if line.startswith("mnt_id:")]
        if ids == [item.id]:
            found.append((item, descriptor))
        else:
            os.close(descriptor)
    return found


def _statvfs_flags(path: str) -> frozenset[str]:
    bits = os.statvfs(path).f_flag
    names = {"ro": os.ST_RDONLY, "nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
    return frozenset(name for name, bit in names.items() if bits & bit)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as found:
        return sorted(found, key=lambda entry: entry.name)


def _like(path: str, status: os.stat_result) -> None:
    """Give `path` the owner and mode in `status`."""
    own(path, status.st_uid, status.st_gid)
    os.chmod(path, stat.S_IMODE(status.st_mode))


def _writable_for_root(proc: str) -> list[str]:
    """The entries of /proc, beside those of processes, through which uid 0 alone changes the kernel."""
    paths = []
    for entry in _entries(proc):
        if entry.name.isdecimal() or entry.is_symlink():
            continue
        if entry.is_dir() or entry.stat(follow_symlinks=False).st_mode & 0o222:
            paths.append(entry.path)
    return paths


def _skeleton(source: str, target: str) -> None:
    """Copy the directories and symlinks of the host's `source`, with owners and modes, and no file."""
    pending = [(source, target)]
    count = 0
    while pending:
        directory, copy = pending.pop()
        try:
            entries = _entries(directory)
        except PermissionError:
            continue
        for entry in entries:
            path = f"{copy}/{entry.name}"
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), path)
            elif entry.is_dir() and entry.path not in _NO_SKELETON and count < _MOST_DIRECTORIES:
                count += 1
                os.mkdir(path)
                _like(path, entry.stat(follow_symlinks=False))
                pending.append((entry.path, path))


def _tty_group() -> int:
    try:
        with open("/etc/group", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                name, _, number, *_ = [*line.split(":"), "", "", ""]
                if name == "tty" and number.isdecimal():
                    return int(number)
    except OSError:
        pass
    return 5
