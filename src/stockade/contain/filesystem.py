"""The file system of a volume with a size: ext4 in one sparse file. Made from a directory, measured, mended."""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from stockade.errors import HostError, StateError

__all__ = ["Facts", "make", "marked", "measure", "mend", "remake"]

_TIMEOUT_S = 3600
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_BLOCK = 4096
_BLOCKS_PER_GROUP = 8 * _BLOCK  # one block is a group's bitmap
_BYTES_PER_FILE = 8192  # where the spec gives no number
_RESERVED_INODES = 10  # EXT4_GOOD_OLD_FIRST_INO - 1
_ROUNDING = 32  # inodes that mke2fs(8) may add to a group to fill a block of them

# All that the host's mke2fs.conf would choose. Not those that came after Linux 5.12.
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
# The file is new, so what was never written reads as zeros: neither journal nor inode tables have to be.
_EXTENDED = "lazy_journal_init=1,lazy_itable_init=1"

# Offsets in the superblock: Documentation/filesystems/ext4/super.rst.
_SUPERBLOCK, _MAGIC = 1024, 0xEF53
_ERRORS = 2  # EXT4_ERROR_FS
_MENDED = 3  # e2fsck(8): errors corrected, the system should be rebooted

# The mounts of these commands are in a namespace of their own, and end with it.
_ALONE = ("unshare", "--mount", "--propagation", "private", "--", "sh", "-ec")
_REMAKE = 'mount -t ext4 -o loop,nosuid,nodev,noexec "$1" "$2"; stat -c "%a %u %g" "$2"; shift 2; exec "$@"'


class Facts(NamedTuple):
    """What a file system says of itself: its size in bytes, and how many files it has room for in each group."""

    size: int
    inodes_per_group: int

    def holds(self, size: int, inodes: int) -> bool:
        """Whether it has `size` bytes, and room for `inodes` files and hardly more. 0 inodes: any number."""
        groups = -(-size // (_BLOCK * _BLOCKS_PER_GROUP))
        room = self.inodes_per_group * groups - _RESERVED_INODES
        if self.size < size - size % _BLOCK:
            return False
        return not inodes or inodes <= room <= inodes + groups * _ROUNDING


def make(tree: Path, image: Path, *, size: int, inodes: int) -> None:
    """Make the file `image` of `size` bytes with all that is in the directory `tree`, sockets and owners too.

    `inodes` is how many files it has room for, 0: one for each 8 KiB. StateError when `tree` does not fit, HostError
    without mke2fs(8), OSError for a full disk.
    """
    status = os.lstat(tree)
    _run(_mke2fs(tree, image, size, inodes), image, size)
    _finish(image, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)


def remake(image: Path, fresh: Path, *, size: int, inodes: int) -> None:
    """As `make`, with what is in the file system `image`, which nobody has mounted."""
    place = fresh.with_name(f"{fresh.name}.mount")
    place.mkdir(mode=0o700)
    try:
        command = [*_ALONE, _REMAKE, "sh", os.fspath(image), os.fspath(place), *_mke2fs(place, fresh, size, inodes)]
        mode, uid, gid = _run(command, fresh, size).split()[:3]
    finally:
        place.rmdir()
    _finish(fresh, int(mode, 8), int(uid), int(gid))


def measure(image: Path) -> Facts:
    """What the superblock of `image` says; StateError when there is none."""
    with open(image, "rb") as file:
        block = os.pread(file.fileno(), 1024, _SUPERBLOCK)
    if len(block) < 1024 or struct.unpack_from("<H", block, 56)[0] != _MAGIC:
        raise StateError(
            f"`{image}` holds no ext4 file system",
            hint="put the volume's file back, or remove it: a build and the start after it make a new one",
        )
    low, size_shift, inodes_per_group = (struct.unpack_from("<I", block, offset)[0] for offset in (4, 24, 40))
    high = struct.unpack_from("<I", block, 0x150)[0]
    return Facts(size=(high << 32 | low) << (10 + size_shift), inodes_per_group=inodes_per_group)


def marked(volumes: Path) -> list[Path]:
    """The file systems below `volumes` that the kernel has marked as damaged (EXT4_ERROR_FS)."""
    try:
        files = [entry.path for entry in os.scandir(volumes) if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []
    return [Path(file) for file in files if _state(file) & _ERRORS]


def _state(image: str) -> int:
    """s_state; 0 for what is no ext4 file system, or cannot be read."""
    try:
        with open(image, "rb", buffering=0) as file:
            magic, state = struct.unpack("<HH", os.pread(file.fileno(), 4, _SUPERBLOCK + 56))
    except (OSError, struct.error):
        return 0
    return int(state) if magic == _MAGIC else 0


def mend(image: Path) -> None:
    """Have e2fsck(8) mend what it mends without a question. StateError where that is not all."""
    done = _called(["e2fsck", "-f", "-p", os.fspath(image)])
    if done.returncode & ~_MENDED:
        raise StateError(
            f"the file system in `{image}` is damaged, and `e2fsck` does not mend it by itself",
            hint=f"keep a copy of it, then look at what `e2fsck -f {image}` asks",
        )


def _mke2fs(tree: Path, image: Path, size: int, inodes: int) -> list[str]:
    count = (inodes or size // _BYTES_PER_FILE) + _RESERVED_INODES
    return [
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-I", "256", "-m", "0", "-O", _FEATURES,
        "-N", str(count), "-E", _EXTENDED, "-d", os.fspath(tree), os.fspath(image), str(size // _BLOCK),
    ]  # fmt: skip


def _finish(image: Path, mode: int, uid: int, gid: int) -> None:
    """Owner and mode of the top, which mke2fs(8) does not copy; without lost+found, which only e2fsck(8) wants."""
    fields = (("mode", f"0{stat.S_IFDIR | mode:o}"), ("uid", str(uid)), ("gid", str(gid)))
    lines = ["rmdir lost+found", *(f"set_inode_field / {name} {value}" for name, value in fields)]
    done = _called(["debugfs", "-w", "-f", "/dev/stdin", os.fspath(image)], "\n".join((*lines, "")))
    # debugfs(8) always ends with 0; what went wrong is on its standard error, below its own name and version.
    wrong = [line for line in done.stderr.splitlines() if line and not line.startswith("debugfs ")]
    if wrong:
        raise StateError(f"the file system `{image}` could not be finished: {wrong[0]}")
    with open(image, "rb+") as file:
        os.chmod(file.fileno(), 0o600)
        os.fsync(file.fileno())


def _run(command: list[str], image: Path, size: int) -> str:
    """Standard output of a command that makes `image`."""
    done = _called(command)
    if done.returncode == 0:
        return done.stdout
    if "Could not allocate" in done.stderr:
        what = "files" if "allocate inode" in done.stderr else "bytes"
        raise StateError(
            f"what the volume holds does not fit into {size >> 20} MB: it has too many {what}",
            hint="give it a larger `size`, or more `inodes`, or remove what it need not hold; nothing was changed",
        )
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(image))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = lines[-1].strip() if lines else f"status {done.returncode}"
    raise StateError(
        f"`{command[0]}` failed on the file system of {size >> 20} MB in `{image}`: {said}",
        hint="nothing was changed; `stockade doctor` tells what this host lacks",
    )


def _called(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S,
            env={"PATH": _PATH, "LC_ALL": "C", "MKE2FS_CONFIG": os.devnull}, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise HostError(
            f"`{command[0]}` is not installed, and a volume with a size needs it", hint="`apt-get install e2fsprogs`"
        ) from error
