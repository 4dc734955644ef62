"""What the setuid and file-capability helpers run: say which rights they have."""

from __future__ import annotations

import json
import os
import sys

from .rights import capability_sets
from .world import World

__all__ = ["main"]


def main(path: str) -> None:
    """Print the effective uid and the permitted capabilities."""
    with open(path, encoding="utf-8") as file:
        sets = capability_sets(World(json.load(file)))
    sys.stdout.write(json.dumps([os.geteuid(), sets["permitted"]]))
