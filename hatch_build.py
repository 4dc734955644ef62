"""Compile the warden while the package is built. Compiles nothing when the package is installed or run."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILE_SECONDS = 300
PACKAGES = "`apt-get install make musl-tools` (or `gcc libc6-dev` for musl-tools)"


def compile_warden(directory: Path, target: Path) -> None:
    """Have `make` build the warden of `directory` into `target`; RuntimeError says what is missing or wrong."""
    try:
        result = subprocess.run(
            ["make", "--no-print-directory", "-C", str(directory), f"OUTPUT={target}"],
            capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise RuntimeError(f"the warden is compiled with `make`, which is not installed: {PACKAGES}") from error
    if result.returncode != 0:
        raise RuntimeError(f"the warden does not compile. A compiler is needed: {PACKAGES}\n{result.stderr}")


class WardenHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the warden to the wheel, and tags the wheel for this platform and any Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless this is a source distribution. `version` is "standard" or "editable"."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        compile_warden(root / "warden", root / "src" / "stockade" / "_warden" / "warden")
        build_data["pure_python"] = False
        # The warden is a static program: only the machine and the kernel matter, no Python ABI and no libc.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
