"""Read an ext4 file system in a file: names, inodes, contents. Mounts nothing and trusts nothing that it reads.

Layout: Documentation/filesystems/ext4 of the kernel. Every number is checked against the file's size; a damaged or
hostile file system is a StateError.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from stockade.errors import StateError

__all__ = ["FileSystem", "Node"]

_MAGIC = 0xEF53
_EXTENT_MAGIC = 0xF30A
_EXTENTS_FLAG = 0x80000
# s_feature_incompat: what changes where things lie beyond what is read here.
_UNKNOWN_FEATURES = 0x1 | 0x8 | 0x10 | 0x100 | 0x8000 | 0x10000 | 0x20000
_RECOVER = 0x4
_DEPTH_MOST = 5
_ENTRIES_MOST = 4_000_000
_ROOT = 2
_FAST_LINK = 60
_EXTENTS_MOST = 1 << 20
_LARGEST_READ = 1 << 30
_LARGEST_TEXT = 64 << 20
_LARGEST_DIRECTORY = 32 << 20
_EXTENT = struct.Struct("<IHHI")
_INDEX = struct.Struct("<IIH")


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One inode. `extents` are first block in the file, number of blocks, first block on the disk (0 for zeros)."""

    inode: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    ctime: int
    links: int
    extents: tuple[tuple[int, int, int], ...] = ()
    target: str = ""
    device: int = 0

    @property
    def type(self) -> str:
        """ "file", "directory", "symlink" or "special"."""
        kind = stat.S_IFMT(self.mode)
        names = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
        return names.get(kind, "special")


class FileSystem:
    """The file system in the file `path`, as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._read_superblock()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> FileSystem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _bad(self, why: str) -> StateError:
        return StateError(f"the file system in `{self._path}` is damaged: {why}", hint="`e2fsck -fn` on it says more")

    def _at(self, offset: int, length: int) -> bytes:
        data = b""
        self._file.seek(offset)
        while len(data) < length:
            part = self._file.read(length - len(data))
            if not part:
                raise self._bad("it is cut off")
            data += part
        return data

    def _read_superblock(self) -> None:
        block = self._at(1024, 1024)
        if struct.unpack_from("<H", block, 56)[0] != _MAGIC:
            raise self._bad("it is no ext4 file system")
        features = struct.unpack_from("<I", block, 96)[0]
        if features & _UNKNOWN_FEATURES:
            raise StateError(
                f"the file system in `{self._path}` has unreadable features: {features & _UNKNOWN_FEATURES:#x}",
                hint="make it with plain ext4",
            )
        shift = struct.unpack_from("<I", block, 24)[0]
        if shift > 6:
            raise self._bad("its block size is impossible")
        self.block_size = 1024 << shift
        self.needs_recovery = bool(features & _RECOVER)
        self._inodes = struct.unpack_from("<I", block, 0)[0]
        self._per_group = struct.unpack_from("<I", block, 40)[0]
        self._inode_size = struct.unpack_from("<H", block, 88)[0]
        large = features & 0x80
        self._descriptor = struct.unpack_from("<H", block, 254)[0] if large else 32
        self._table = (struct.unpack_from("<I", block, 20)[0] + 1) * self.block_size
        if not self._per_group or self._inode_size < 128 or self._descriptor < 32 or self._inode_size > self.block_size:
            raise self._bad("its superblock is impossible")

    def _block(self, number: int) -> bytes:
        return self._at(number * self.block_size, self.block_size)

    def node(self, inode: int) -> Node:
        """The inode of that number."""
        if not 1 <= inode <= self._inodes:
            raise self._bad(f"inode {inode} does not exist")
        group, index = divmod(inode - 1, self._per_group)
        descriptor = self._at(self._table + group * self._descriptor, self._descriptor)
        start = struct.unpack_from("<I", descriptor, 8)[0]
        if self._descriptor >= 64:
            start |= struct.unpack_from("<I", descriptor, 40)[0] << 32
        raw = self._at(start * self.block_size + index * self._inode_size, 128)
        mode, uid, size, _, ctime, mtime, _, gid, links = struct.unpack_from("<HHIIIIIHH", raw, 0)
        flags = struct.unpack_from("<I", raw, 32)[0]
        uid |= struct.unpack_from("<H", raw, 120)[0] << 16
        gid |= struct.unpack_from("<H", raw, 122)[0] << 16
        body = raw[40:100]
        kind = stat.S_IFMT(mode)
        if kind in (stat.S_IFREG, stat.S_IFDIR):
            size |= struct.unpack_from("<I", raw, 108)[0] << 32
        target, device = "", 0
        extents: tuple[tuple[int, int, int], ...] = ()
        if kind == stat.S_IFLNK and size < _FAST_LINK and not flags & _EXTENTS_FLAG:
            target = body[:size].decode("utf-8", "surrogateescape")
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            device = struct.unpack_from("<I", body, 4)[0] or struct.unpack_from("<I", body, 0)[0]
        elif kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            if not flags & _EXTENTS_FLAG and size:
                raise self._bad(f"inode {inode} is laid out as ext2 does")
            extents = self._in_order(inode, body) if size else ()
        node = Node(
            inode=inode, mode=mode, uid=uid, gid=gid, size=size, mtime=mtime, ctime=ctime, links=links,
            extents=extents, target=target, device=device,
        )  # fmt: skip
        if kind == stat.S_IFLNK and extents:
            node = msgspec.structs.replace(node, target=self.read(node).decode("utf-8", "surrogateescape"))
        return node

    def _in_order(self, inode: int, body: bytes) -> tuple[tuple[int, int, int], ...]:
        """The extents of an inode. None is met twice, however the tree is tied; none begins before another ends."""
        found: list[tuple[int, int, int]] = []
        end = 0
        for first, length, start in self._extents(body, 0):
            if first < end or not length or len(found) == _EXTENTS_MOST:
                raise self._bad(f"the extents of inode {inode} are impossible")
            found.append((first, length, start))
            end = first + length
        return tuple(found)

    def _extents(self, block: bytes, depth: int) -> Iterator[tuple[int, int, int]]:
        magic, entries, _, below = struct.unpack_from("<HHHH", block, 0)
        if magic != _EXTENT_MAGIC or depth > _DEPTH_MOST or 12 + entries * 12 > len(block) or below > _DEPTH_MOST:
            raise self._bad("an extent tree is impossible")
        if not entries and (depth or below):
            raise self._bad("an extent tree has an empty branch")
        for number in range(entries):
            at = 12 + number * 12
            if below:
                _, low, high = _INDEX.unpack_from(block, at)
                yield from self._extents(self._block(high << 32 | low), depth + 1)
                continue
            first, length, high, low = _EXTENT.unpack_from(block, at)
            # Above 32768 it is allocated and not written: zeros.
            yield (first, length, high << 32 | low) if length <= 32768 else (first, length - 32768, 0)

    def read(self, node: Node) -> bytes:
        """The contents of a file, link or directory."""
        if node.size > _LARGEST_READ:
            raise self._bad(f"inode {node.inode} has {node.size} bytes")
        data = bytearray(node.size)
        for first, length, start in node.extents:
            if not start:
                continue
            offset = first * self.block_size
            count = min(length * self.block_size, node.size - offset)
            if count > 0:
                data[offset : offset + count] = self._at(start * self.block_size, count)
        return bytes(data)

    def entries(self, node: Node) -> Iterator[tuple[str, int]]:
        """Names and inodes in a directory, without `.` and `..`."""
        if node.size > _LARGEST_DIRECTORY:
            raise self._bad(f"directory {node.inode} has {node.size} bytes")
        data = self.read(node)
        at = 0
        while at + 8 <= len(data):
            inode, length, name_length = struct.unpack_from("<IHB", data, at)
            if length < 8 or length % 4 or at + length > len(data) or 8 + name_length > length:
                raise self._bad(f"directory {node.inode} is impossible")
            name = data[at + 8 : at + 8 + name_length]
            if inode and name not in (b".", b"..") and name and b"/" not in name and b"\0" not in name:
                yield name.decode("utf-8", "surrogateescape"), inode
            at += length

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Every path and its node, parents first; a directory that is met twice is entered once."""
        seen = {_ROOT}
        waiting = [("", self.node(_ROOT))]
        count = 0
        while waiting:
            path, directory = waiting.pop()
            for name, inode in sorted(self.entries(directory)):
                count += 1
                if count > _ENTRIES_MOST:
                    raise self._bad("it has too many names")
                node = self.node(inode)
                place = f"{path}/{name}"
                yield place, node
                if node.type == "directory" and inode not in seen:
                    seen.add(inode)
                    waiting.append((place, node))

    def find(self, path: str, links: int = 16) -> Node | None:
        """The node at `path`, links resolved within the file system; None where there is none."""
        node = self.node(_ROOT)
        trail: list[Node] = [node]
        parts = [part for part in path.split("/") if part and part != "."]
        while parts:
            part = parts.pop(0)
            if part == "..":
                trail = trail[:-1] or trail
                continue
            if trail[-1].type != "directory":
                return None
            inode = next((number for name, number in self.entries(trail[-1]) if name == part), None)
            if inode is None:
                return None
            node = self.node(inode)
            if node.type == "symlink":
                if not links:
                    return None
                links -= 1
                if node.target.startswith("/"):
                    trail = trail[:1]
                parts = [one for one in node.target.split("/") if one and one != "."] + parts
                continue
            trail.append(node)
        return trail[-1]

    def text(self, path: str) -> str:
        """The contents of the file at `path` as text; "" where there is no file."""
        node = self.find(path)
        if node is None or node.type != "file":
            return ""
        if node.size > _LARGEST_TEXT:
            raise self._bad(f"inode {node.inode} has {node.size} bytes")
        return self.read(node).decode("utf-8", "surrogateescape")
