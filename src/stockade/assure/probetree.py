"""The probes' own tree: an interpreter, what it needs, the probes and two helpers. It enters a jail as one mount.

The rootfs stays as it is: the interpreter is started by the tree's own copy of its dynamic linker, with the tree's own
libraries. The helpers are further copies of that linker, one setuid root, one with a file capability.
"""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from stockade.errors import HostError
from stockade.kernel import userns
from stockade.resolve import ldso

__all__ = ["HELPERS", "REQUEST", "ProbeTree", "make", "remove"]

REQUEST = "request.json"

_INSIDE = Path(__file__).with_name("inside")
_TIMEOUT_S = 30

# VFS_CAP_REVISION_2 with the effective flag, and CAP_NET_RAW: five words (include/uapi/linux/capability.h).
_NET_RAW = b"".join(word.to_bytes(4, "little") for word in (0x02000001, 1 << 13, 0, 0, 0))

#: The helpers by kind: their place in the tree, mode and `security.capability`.
HELPERS = {"setuid": ("helpers/setuid", 0o4555, b""), "capable": ("helpers/capable", 0o555, _NET_RAW)}

_LIST = (
    "import sys; sys.path.insert(0, sys.argv[1]); import inside.runner, inside.helper, inside.beside, canaryprocess\n"
    "for module in list(sys.modules.values()):\n"
    "    print(getattr(module, '__file__', None) or '')"
)


@dataclass(frozen=True)
class ProbeTree:
    """A tree on disk. `helpers` are their file names by kind; none where the caller has one id only."""

    path: Path
    interpreter: str
    helpers: dict[str, str]

    def command(self, place: str) -> tuple[str, ...]:
        """The interpreter's command line, when the tree is mounted on `place`."""
        return (f"{place}/loader", "--library-path", f"{place}/libraries", f"{place}/bin/{self.interpreter}")

    def run(self, place: str) -> tuple[str, ...]:
        """The command line that carries out the request in the tree."""
        return self.call(place, "inside.runner", f"{place}/{REQUEST}")

    def call(self, place: str, module: str, *arguments: str) -> tuple[str, ...]:
        """The command line that calls `main` of one of the tree's modules."""
        program = f"import sys; sys.path.insert(0, sys.argv[1]); from {module} import main; main(*sys.argv[2:])"
        return (*self.command(place), "-I", "-S", "-B", "-c", program, place, *arguments)


def make(directory: Path, ids: userns.Range | userns.Single | None) -> ProbeTree:
    """Make the tree in the new directory `directory`.

    `ids` own the helpers: None for root, whose files the mount hands to the jail's ids. HostError where this
    interpreter cannot be copied.
    """
    interpreter = Path(os.path.realpath(sys.executable))
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    files = _modules()
    objects = [os.fspath(interpreter), *(name for name in files if name.endswith(".so"))]
    loader = ldso.closure(objects[0]).interpreter
    if loader is None:
        raise HostError(
            f"the interpreter `{interpreter}` is linked statically, and the probes need one with a dynamic linker",
            hint="install Stockade for the distribution's own Python",
        )
    _copy(Path(loader), directory / "loader", 0o555)
    _copy(interpreter, directory / "bin" / interpreter.name, 0o555)
    for program in objects:
        for library in ldso.closure(program).libraries:
            _copy(Path(library.real), directory / "libraries" / library.name.rpartition("/")[2], 0o444)
    _library(directory, files)
    helpers = {} if isinstance(ids, userns.Single) else {kind: place for kind, (place, _, _) in HELPERS.items()}
    if helpers:
        _with(ids, _helpers, directory)
    return ProbeTree(directory, interpreter.name, helpers)


def remove(tree: ProbeTree, ids: userns.Range | userns.Single | None) -> None:
    """Remove what `make` made."""
    if tree.helpers:
        _with(ids, shutil.rmtree, tree.path / "helpers")
    shutil.rmtree(tree.path)


def _with(ids: userns.Range | userns.Single | None, function: object, *arguments: object) -> None:
    if ids is None:
        function(*arguments)  # type: ignore[operator]
    else:
        userns.call(function, *arguments, ids=ids)  # type: ignore[arg-type]


def _modules() -> list[str]:
    """Files of all modules that the probes import, as the interpreter itself tells them."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", _LIST, os.fspath(_INSIDE.parent)],
        capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise HostError(
            f"the interpreter `{sys.executable}` cannot run the probes: {done.stderr.strip().splitlines()[-1:]}",
            hint="install Stockade for the distribution's own Python",
        )
    return [line for line in done.stdout.splitlines() if line and not line.startswith(f"{_INSIDE.parent}/")]


def _library(directory: Path, files: list[str]) -> None:
    """Python's own library below lib/, so that the interpreter finds it by itself, and the probes."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = directory / "lib" / version
    (home / "lib-dynload").mkdir(parents=True)
    standard = Path(os.path.realpath(sysconfig.get_path("stdlib")))
    for name in files:
        source = Path(os.path.realpath(name))
        if source.suffix == ".so":
            _copy(source, home / "lib-dynload" / source.name, 0o444)
            continue
        target = home / source.relative_to(standard)
        _copy(source, target, 0o444)
        _compile(source, target)
    for source in (*sorted(_INSIDE.glob("*.py")), _INSIDE.with_name("canaryprocess.py")):
        target = directory / source.relative_to(_INSIDE.parent)
        _copy(source, target, 0o444)
        _compile(source, target)


def _compile(source: Path, target: Path) -> None:
    cached = target.parent / "__pycache__" / f"{target.stem}.{sys.implementation.cache_tag}.pyc"
    given = source.parent / "__pycache__" / cached.name
    if given.exists() and not source.is_relative_to(_INSIDE.parent):
        _copy(given, cached, 0o444)
    else:
        py_compile.compile(
            os.fspath(source), os.fspath(cached), doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )  # fmt: skip
        cached.chmod(0o444)


def _copy(source: Path, target: Path, mode: int) -> None:
    if target.exists():
        return
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    target.parent.chmod(0o755)
    shutil.copyfile(source, target)
    status = source.stat()
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    target.chmod(mode)


def _helpers(directory: Path) -> None:
    """Runs with the rights over the ids that own the helpers."""
    helpers = directory / "helpers"
    helpers.mkdir(mode=0o755)
    helpers.chmod(0o755)
    for place, mode, capability in HELPERS.values():
        shutil.copyfile(directory / "loader", directory / place)
        os.chown(directory / place, 0, 0)
        os.chmod(directory / place, mode)
        if capability:
            os.setxattr(directory / place, "security.capability", capability)
