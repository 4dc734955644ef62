"""Archives of sparse files: one tar, compressed with zstd, written and read whole or not at all."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from stockade.errors import HostError, StateError

from .whole import new_file

__all__ = ["pack", "unpack"]

_TIMEOUT_S = 3600
_MEMBERS_MOST = 64
_CHUNK = 65536


def pack(directory: Path, members: Sequence[str], target: Path) -> None:
    """Write `members` of `directory` to the new archive `target`. FileExistsError when it is there."""
    command = ["tar", "--create", "--sparse", "--zstd", "--format=gnu", "--numeric-owner", "--owner=0", "--group=0",
               "--mode=0600", "--directory", os.fspath(directory), "--", *members]  # fmt: skip
    with new_file(target) as out:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, timeout=_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            raise StateError(
                f"`{target}` could not be written: {done.stderr.decode('utf-8', 'replace').strip()}",
                hint="make room on the disk, and see that `tar` and `zstd` are installed",
            )


def unpack(source: Path, directory: Path, allowed: Sequence[str]) -> list[str]:
    """Unpack the archive into `directory`: regular files of the names in `allowed` alone, whatever else it holds.

    StateError for an archive that is damaged or holds anything else.
    """
    command = ["zstd", "-dcq", "--", os.fspath(source)]
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise HostError("`zstd` is not installed", hint="`apt-get install zstd`") from error
    found: list[str] = []
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if not member.isreg() or member.name not in allowed or len(found) >= _MEMBERS_MOST:
                    raise StateError(
                        f"`{source}` holds `{member.name}`, which has no place in such an archive",
                        hint="get it again from where it was exported",
                    )
                _write(archive, member, directory / member.name)
                found.append(member.name)
    except (tarfile.TarError, EOFError) as error:
        raise StateError(f"`{source}` is damaged: {error}", hint="get it again from where it was exported") from error
    finally:
        process.kill()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
    return found


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write a member's contents, with holes for zeros."""
    source = archive.extractfile(member)
    assert source is not None  # a regular file
    with source, open(target, "xb", buffering=0) as file:
        at = 0
        while data := source.read(_CHUNK):
            if data.count(0) != len(data):
                os.pwrite(file.fileno(), data, at)
            at += len(data)
        os.ftruncate(file.fileno(), at)
