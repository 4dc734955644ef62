"""System call numbers by name, for each architecture that Stockade knows. Makes no system call."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from ..errors import HostError

__all__ = ["ARCHITECTURES", "AUDIT_ARCH", "host_architecture", "known", "numbers"]

#: AUDIT_ARCH_* of include/uapi/linux/audit.h: ELF machine | 64 bit | little endian.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

#: In the order of the columns of `syscalls.txt`.
ARCHITECTURES = ("x86_64", "aarch64")

_TABLE = Path(__file__).with_name("syscalls.txt")


@functools.cache
def _tables() -> dict[str, dict[str, int]]:
    tables: dict[str, dict[str, int]] = {architecture: {} for architecture in ARCHITECTURES}
    for line in _TABLE.read_text(encoding="ascii").splitlines():
        if line.startswith("#"):
            continue
        name, *columns = line.split()
        for architecture, column in zip(ARCHITECTURES, columns, strict=True):
            if column != "-":
                tables[architecture][name] = int(column)
    return tables


def numbers(architecture: str) -> dict[str, int]:
    """Number of each system call of `architecture` by name; HostError for an architecture without a table."""
    try:
        return _tables()[architecture]
    except KeyError:
        raise HostError(
            f"there is no system call table for the architecture `{architecture}`",
            hint=f"Stockade has tables for {' and '.join(f'`{name}`' for name in ARCHITECTURES)}; "
            "`policy.syscalls.preset = \"none\"` does without a filter",
        ) from None


@functools.cache
def known() -> frozenset[str]:
    """Names of the system calls of all architectures."""
    return frozenset(name for table in _tables().values() for name in table)


def host_architecture() -> str:
    """Architecture of the running kernel, as uname(2) calls it."""
    return os.uname().machine
