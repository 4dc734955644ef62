"""What the setuid and file-capability helpers run: say which rights they have."""

from __future__ import annotations

import os

from .calls import Kernel, capability_sets

__all__ = ["main"]


def main(capget: str, prctl: str) -> None:
    """Write the effective uid and the mask of the permitted capabilities; the arguments are two calls' numbers."""
    sets = capability_sets(Kernel({"capget": int(capget), "prctl": int(prctl)}))
    os.write(1, f"{os.geteuid()} {sets['permitted']}".encode())
