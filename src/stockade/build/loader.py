"""The cache of ld.so for a rootfs. Runs the host's ldconfig with the rootfs as its root."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import select
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from stockade.errors import BuildError, HostError
from stockade.kernel.beneath import Root

__all__ = ["CACHE", "CONFIGURATION", "configured", "host_directories", "is_library", "is_loader", "make_cache"]

CACHE = "/etc/ld.so.cache"
CONFIGURATION = "/etc/ld.so.conf"

_LIBRARY = re.compile(r".+\.so(\.|\Z)")
# Names of glibc's dynamic loader (the psABI of each architecture); musl's reads no cache.
_LOADER = re.compile(r"ld-linux[\w-]*\.so\.\d+|ld64\.so\.\d+|ld-\d+\.\d+\.so|ld\.so\.1")
_TIMEOUT_S = 60
_AUXILIARY = "/var/cache/ldconfig/aux-cache"


def is_loader(path: str) -> bool:
    """Whether `path` has the name of glibc's loader, so that a cache is of use."""
    return _LOADER.fullmatch(path.rpartition("/")[2]) is not None


def is_library(path: str) -> bool:
    """Whether `path` has the name of a library, as those have that ldconfig(8) looks at."""
    return _LIBRARY.match(path.rpartition("/")[2]) is not None


def host_directories(configuration: Path = Path(CONFIGURATION)) -> tuple[str, ...]:
    """Directories of the host's ld.so.conf with its includes, in order (ldconfig(8))."""
    return tuple(dict.fromkeys(_directories(configuration, depth=0)))


def _directories(configuration: Path, *, depth: int) -> Iterator[str]:
    try:
        text = os.fsdecode(configuration.read_bytes())
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return
    for line in text.split("\n"):
        words = line.partition("#")[0].split()
        if words[:1] == ["include"] and depth < 8:
            for pattern in words[1:]:
                for name in sorted(glob.glob(str(configuration.parent / pattern))):
                    yield from _directories(Path(name), depth=depth + 1)
        elif words[:1] != ["hwcap"]:
            for word in " ".join(words).replace(":", " ").replace(",", " ").split():
                directory = word.partition("=")[0].rstrip("/")
                if directory.startswith("/"):
                    yield directory


def configured(directories: Iterable[str], files: Iterable[str]) -> bytes:
    """Content of a rootfs's ld.so.conf: those of `directories` in which one of `files` is a library.

    Both as canonical paths of the rootfs; the order of `directories` is kept.
    """
    holding = {directory for directory, _, name in (path.rpartition("/") for path in files) if _LIBRARY.match(name)}
    hwcaps = {directory.partition("/glibc-hwcaps/")[0] for directory in holding}
    wanted = [directory for directory in dict.fromkeys(directories) if directory in holding | hwcaps]
    return os.fsencode("".join(f"{directory}\n" for directory in wanted))


def _ldconfig() -> int:
    """A descriptor of ldconfig; Ubuntu's is a script around `ldconfig.real`."""
    search = ["/usr/sbin", "/sbin", *os.environ.get("PATH", "").split(":")]
    for name in ("ldconfig.real", "ldconfig"):
        for directory in filter(os.path.isabs, search):
            with contextlib.suppress(OSError):
                return os.open(Path(directory, name), os.O_RDONLY | os.O_CLOEXEC)
    raise HostError(
        "`ldconfig` is not installed, and dynamic programs need a cache of their libraries",
        hint="install it: `apt-get install libc-bin`",
    )


def make_cache(root: Root, path: str) -> None:
    """Have ldconfig write `path` of `root` from the libraries there and its ld.so.conf.

    BuildError with ldconfig's own words when it fails.
    """
    program = _ldconfig()
    try:
        # With -r it makes the directory its root, by chroot(2) where it may.
        inside = ["-r", f"/proc/self/fd/{root.descriptor}"]
        status, output = _run(root, program, ["ldconfig", "-X", "-i", "-C", path, "-f", CONFIGURATION, *inside])
    finally:
        os.close(program)
    _remove_auxiliary(root)
    if status != 0 and os.strerror(errno.ENOSPC) in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    if status != 0:
        raise BuildError(
            f"`ldconfig` ended with status {status} on the new root: {output or 'no message'}",
            hint="a damaged library in a directory of `/etc/ld.so.conf` does that; `files.exclude` leaves it out",
        )


def _run(root: Root, program: int, arguments: list[str]) -> tuple[int, str]:
    """Run a `program` that inherits the descriptor of `root`; its status and what it wrote to stderr."""
    output_out, output_in = os.pipe()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    # Copied on itself a descriptor stays open across the exec (posix_spawn_file_actions_adddup2(3)).
    pairs = ((null, 0), (null, 1), (output_in, 2), (root.descriptor, root.descriptor))
    try:
        # Other threads make files meanwhile, so nothing of Python's may run in the child.
        pid = os.posix_spawn(
            f"/proc/self/fd/{program}", arguments, {"PATH": "/"},
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for source, target in pairs],
        )  # fmt: skip
    finally:
        os.close(null)
        os.close(output_in)
    chunks = []
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while select.select([output_out], [], [], max(0.0, deadline - time.monotonic()))[0]:
            chunk = os.read(output_out, 65536)
            if not chunk:
                break
            chunks.append(chunk)
        else:
            os.kill(pid, signal.SIGKILL)
            chunks.append(f"no end within {_TIMEOUT_S} s".encode())
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(output_out)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), os.fsdecode(b"".join(chunks)).strip()


def _remove_auxiliary(root: Root) -> None:
    """Remove ldconfig's own cache of file times, which it writes where it finds the directory for it."""
    with contextlib.suppress(FileNotFoundError):
        above, name = root.parent(_AUXILIARY)
        os.unlink(name, dir_fd=above)
