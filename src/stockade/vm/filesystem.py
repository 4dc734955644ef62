"""Make an ext4 file system of a directory tree: one sparse file, with a journal, the same to the bit every time."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

from stockade.errors import HostError, StateError

from .ext4 import FileSystem

__all__ = ["give", "make"]

_TIMEOUT_S = 600
_MEGABYTE = 1 << 20
_LEAST = 24 * _MEGABYTE
#: Every time in the file system, unless SOURCE_DATE_EPOCH says another: 2000-01-01.
TIME = 946684800
_NAMESPACE = uuid.UUID("6f0ea6d4-6bd4-5a3c-9d0c-0a4b1b1d5c3e")
# orphan_file and metadata_csum_seed came after 6.1's e2fsck; lazy init would leave writes for the first mount.
_FEATURES = "^orphan_file,^metadata_csum_seed,metadata_csum,64bit,extent"


def make(tree: Path, target: Path, *, name: str, size: int | None = None) -> None:
    """Write the file system with the contents of `tree` to `target`, `size` bytes large (default: what fits, and room).

    Owners, modes and devices are those of the tree as the caller sees them: an ordinary user calls this in a user
    namespace. StateError when it does not fit, HostError without mke2fs(8).
    """
    used, entries = _measure(tree)
    wanted = size if size is not None else max(_LEAST, used + used // 4 + 24 * _MEGABYTE)
    wanted = -(-wanted // _MEGABYTE) * _MEGABYTE
    seed = str(uuid.uuid5(_NAMESPACE, name))
    when = os.environ.get("SOURCE_DATE_EPOCH", str(TIME))
    command = [
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", _FEATURES, "-L", name[:16], "-U", seed,
        "-N", str(entries + entries // 4 + 1024), "-J", "size=4",
        "-E", f"hash_seed={seed},lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0",
        "-d", os.fspath(tree),
        os.fspath(target), str(wanted // 4096),
    ]  # fmt: skip
    environment = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "E2FSPROGS_FAKE_TIME": when, "SOURCE_DATE_EPOCH": when,
                   "MKE2FS_SYNC": "0", "MKE2FS_CONFIG": os.devnull}  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S,
            env=environment, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise HostError("`mke2fs` is not installed", hint="`apt-get install e2fsprogs`") from error
    if done.returncode != 0:
        target.unlink(missing_ok=True)
        raise StateError(
            f"no file system of {wanted // _MEGABYTE} MB could be made of `{tree}`: {done.stderr.strip()}",
            hint="give a larger `--size`, or make room on the host's disk",
        )
    _same_times(target, when)


def _same_times(image: Path, when: str) -> None:
    """mke2fs(8) copies times that no tree can be given, of the last change, or that it changes as it reads."""
    with FileSystem(image) as system:
        inodes = sorted({2, *(node.inode for _, node in system.walk())})
    lines = [f"set_inode_field <{inode}> {field} @{when}" for inode in inodes for field in ("atime", "ctime")]
    _change(image, lines, "times", when)


def give(image: Path, owners: Mapping[str, tuple[int, int]]) -> None:
    """Write owners into the file system of `image`: paths and their uid and gid. StateError when one cannot be set."""
    lines = []
    for path, (uid, gid) in sorted(owners.items()):
        if any(character in path for character in '"\n\\'):
            raise StateError(f"`{path}` cannot be given an owner", hint="give it a plain name")
        lines += [f'set_inode_field "{path}" uid {uid}', f'set_inode_field "{path}" gid {gid}']
    _change(image, lines, "owners", os.environ.get("SOURCE_DATE_EPOCH", str(TIME)))


def _change(image: Path, lines: list[str], what: str, when: str) -> None:
    """Carry out commands of debugfs(8). StateError for the first thing that it says against one."""
    done = subprocess.run(
        ["debugfs", "-w", "-f", "/dev/stdin", os.fspath(image)], input="\n".join(lines) + "\n", capture_output=True,
        text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
        env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin", "E2FSPROGS_FAKE_TIME": when},
    )  # fmt: skip
    # debugfs(8) always ends with 0; what went wrong is on its standard error, below its own name and version.
    wrong = [line for line in done.stderr.splitlines() if line and not line.startswith("debugfs ")]
    if wrong:
        raise StateError(f"{what} could not be written into `{image}`: {wrong[0]}")


def _measure(tree: Path) -> tuple[int, int]:
    """Bytes in whole blocks and number of entries of a tree."""
    used, entries = 0, 0
    for directory, below, files in os.walk(tree):
        entries += len(below) + len(files)
        used += 4096 * (1 + len(below))
        for name in files:
            used += -(-os.lstat(os.path.join(directory, name)).st_size // 4096) * 4096
    return used, entries
