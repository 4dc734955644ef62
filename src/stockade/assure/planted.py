"""F19: a symlink planted where the launcher looks. Nothing runs inside: the launcher itself is put to it."""

from __future__ import annotations

import os
import shutil
import subprocess

import msgspec

from stockade import contain
from stockade.errors import WallError
from stockade.records.launch import Bind
from stockade.records.proof import ProbeResult

from .canaries import Canaries
from .catalogue import catalogue
from .walls import Workplace

__all__ = ["chroot_follows", "planted"]


def planted(place: Workplace, canaries: Canaries) -> ProbeResult:
    """A root, and a volume, that are symlinks to the canary's directory: the launcher must refuse both."""
    link = place.path / "planted"
    link.symlink_to(canaries.directory)
    plan = place.plan(place.spec)
    volume = Bind(source=os.fspath(link), target="/dev", own=True)
    said = []
    try:
        for what, changed in (
            ("a root", msgspec.structs.replace(plan, root="planted")),
            ("a volume", msgspec.structs.replace(plan, mounts=(volume, *plan.mounts))),
        ):
            try:
                with contain.launch_generation(
                    place.path, name=place.spec.name, argv=("/file",), plan=contain.encode(changed),
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                ):  # fmt: skip
                    return _result("escaped", f"{what} that is a symlink was followed")
            except WallError as error:
                if "ELOOP" not in error.message:
                    return _result("escaped", f"{what} that is a symlink was followed, and then: {error.message}")
                said.append(f"{what} that is a symlink: {error.message}")
    finally:
        link.unlink()
    return _result("held", "; ".join(said))


def chroot_follows(canaries: Canaries) -> ProbeResult:
    """What chroot(1) does with a planted root: it is shown by what it then cannot find there."""
    link = canaries.directory / "planted"
    link.symlink_to("/")
    try:
        done = subprocess.run(
            ["chroot", link, shutil.which("cat") or "/bin/cat", canaries.directory / "file"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False,
        )  # fmt: skip
    finally:
        link.unlink()
    if canaries.marks["file"].encode() in done.stdout:
        return _result("escaped", "a root that is a symlink was followed")
    return _result("held", done.stderr.decode(errors="replace").strip())


def _result(outcome: str, detail: str) -> ProbeResult:
    row = catalogue()["F19"]
    return msgspec.convert({"id": row.id, "title": row.title, "outcome": outcome, "detail": detail}, ProbeResult)
