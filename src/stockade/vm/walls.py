"""What stands around UML: nothing but another user and a pid namespace, or a jail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from stockade.records.guest import Guest

from .kernels import Kernel

__all__ = ["Around", "around"]


class Around(msgspec.Struct, frozen=True, kw_only=True):
    """How the keeper starts UML: its path there, and what else the orders hold."""

    kernel: str
    orders: dict[str, Any]


def around(guest: Guest, kernel: Kernel, machine: Path) -> Around:
    """The walls around the guest's UML process, as its record names them."""
    return Around(
        kernel=kernel.path,
        orders={"plan": None, "base": "", "records": [],
                "environment": {"PATH": "/usr/bin:/bin", "HOME": "/", "TMPDIR": "/dev/shm"}},
    )  # fmt: skip
