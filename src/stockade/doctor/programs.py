"""Programs that Stockade calls, each with what it is for and what brings it, as a table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

from stockade.records.host import Feature
from stockade.vm import kernels

__all__ = ["features"]

_VERSION_SECONDS = 10
# Also where an ordinary user's PATH does not lead, as on Debian.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


class Program(NamedTuple):
    """`version` are the arguments that make it tell its version; without any it is only looked for."""

    name: str
    package: str
    purpose: str
    cost: str
    version: tuple[str, ...] = ()
    required: bool = False


PROGRAMS = (
    Program("strace", "strace", "observing a service", "a jail is built only from a lock", ("-V",), required=True),
    Program("ssh-keygen", "openssh-client", "generating ssh keys", "recipes with ssh keys cannot be built"),
    Program("openssl", "openssl", "generating certificates", "recipes with TLS cannot be built", ("version",)),
    Program("pasta", "passt", "private networks with published ports", "no `mode = \"private\"` in `[network]`"),
    Program(
        "mke2fs", "e2fsprogs", "volumes with a size, and disk images for the wall `vm`",
        "no volume with a `size`, and no `vm` among the walls", ("-V",),
    ),
    Program("busybox", "busybox-static", "a guest's first programs", "no `vm` among the walls"),
    Program("mmdebstrap", "mmdebstrap", "Debian systems as images", "no Debian images", ("--version",)),
)  # fmt: skip


def features() -> Iterator[Feature]:
    """Yield one feature for each program, the warden's, and one for each kernel of the wall `vm`."""
    yield _warden()
    for program in PROGRAMS:
        yield _look(program)
    yield from _kernels()


def _kernels() -> Iterator[Feature]:
    """The UML kernel that guests use, or that there is none; then the others of this host."""
    purpose = "the wall `vm`"
    found = kernels.known(keep=False)
    if not found:
        yield Feature(
            name="linux.uml", purpose=purpose, state="absent", seen="not installed", cost="no `vm` among the walls",
            cure=f"`apt-get install {kernels.PACKAGE}`, or a kernel of `make ARCH=um` as `/opt/uml/VERSION/linux`",
        )  # fmt: skip
    for number, kernel in enumerate(found):
        directory = kernels.modules(kernel)
        seen = f"{kernel.path} {kernel.version}, {f'modules in {directory}' if directory else 'no modules'}"
        yield Feature(
            name="linux.uml" if number == 0 else f"kernel {kernel.version}", purpose=purpose, state="present",
            seen=seen if number == 0 else f"{seen}; used with `--kernel`",
        )  # fmt: skip


def _look(program: Program) -> Feature:
    path = shutil.which(program.name, path=_PATH)
    found = path is not None
    return Feature(
        name=program.name,
        purpose=program.purpose,
        state="present" if found else "absent",
        seen=_version(path, program.version) if path else "not installed",
        required=program.required,
        cost="" if found else program.cost,
        cure="" if found else f"`apt-get install {program.package}`",
    )


def _version(path: str, arguments: tuple[str, ...]) -> str:
    if not arguments:
        return path
    try:
        result = subprocess.run(
            [path, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}, which does not run: {error}"
    lines = (result.stdout or result.stderr).splitlines()
    match = re.search(rb"[0-9]+(?:\.[0-9A-Za-z_~+-]+)+", lines[0]) if lines else None
    return f"{path} {match[0].decode()}" if match else path


def _warden() -> Feature:
    path = str(resources.files("stockade").joinpath("_warden").joinpath("warden"))
    found = os.access(path, os.X_OK)
    return Feature(
        name="warden",
        purpose="launching jails, and being their first process",
        state="present" if found else "absent",
        seen=path if found else f"`{path}` is not there",
        required=True,
        cost="" if found else "no jail can be started",
        cure=""
        if found
        else "install Stockade again, with a C compiler: `apt-get install musl-tools`, then `pip install .`",
    )
