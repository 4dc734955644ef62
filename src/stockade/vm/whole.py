"""What is there whole or not at all, at whatever moment its maker is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from stockade.errors import NotFoundError

__all__ = ["absent", "named", "new_file", "scratch"]

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_SCRATCH = re.compile(r"\.[a-z]+-(\d+)-[^/]*\Z")


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that gets the name `target` once it was written and synced. FileExistsError when there is one, at first.

    It has no name until then (open(2), O_TMPFILE), where the file system can do that; else a hidden one beside.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    name = ""
    try:
        try:
            descriptor = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o666, dir_fd=directory)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            name = f".{target.name[:200]}.{os.getpid()}"
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o666, dir_fd=directory)
        with open(descriptor, "r+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            source = name or f"/proc/self/fd/{descriptor}"
            # With a directory's descriptor this is linkat(2) with AT_SYMLINK_FOLLOW, which a file without a name needs.
            os.link(source, target.name, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        if name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
        os.close(directory)


def named(directory: Path, record: str) -> list[str]:
    """Names of what is whole in `directory`: directories with a file `record`. Hidden ones are not yet, or no more."""
    found = (path.parent.name for path in directory.glob(f"*/{record}"))
    return sorted(name for name in found if not name.startswith("."))


def absent(message: str, name: str, known: Sequence[str], *, listed_by: str) -> NotFoundError:
    """The error for a `name` that nothing has: `message`, the nearest of `known`, and the verb that lists them."""
    import difflib  # only for a name that is wrong

    near = difflib.get_close_matches(name, known, n=1)
    meant = f", did you mean `{near[0]}`?" if near else ""
    return NotFoundError(f"{message}{meant}", hint=f"`stockade {listed_by}` shows what there is")


@contextlib.contextmanager
def scratch(directory: Path, what: str) -> Iterator[Path]:
    """A directory in `directory` for `what` (lower case letters), gone afterwards. Those of the killed go first."""
    for path in directory.glob(f".{what}-*"):
        maker = _SCRATCH.match(path.name)
        if maker and not os.path.exists(f"/proc/{maker[1]}"):
            shutil.rmtree(path, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=f".{what}-{os.getpid()}-", dir=directory))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
