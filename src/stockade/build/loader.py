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

__all__ = ["CACHE", "CONFIGURATION", "configured", "host_directories", "is_loader", "make_cache"]

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
        status, output = _run_inside(root, program, ["ldconfig", "-X", "-i", "-C", path, "-f", CONFIGURATION])
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


def _run_inside(root: Root, program: int, arguments: list[str]) -> tuple[int, str]:
    """Run a static `program` with `root` as its root; its status and what it wrote to stderr."""
    output_out, output_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for number, descriptor in enumerate((null, null, output_in)):
                os.dup2(descriptor, number)
            os.fchdir(root.descriptor)
            os.chroot(".")
            # By descriptor: the program is not in the new root.
            os.execve(program, arguments, {"PATH": "/"})
        except OSError as error:
            os.write(output_in, f"{error}".encode(errors="replace"))
        finally:
            os._exit(127)
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
