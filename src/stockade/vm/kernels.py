"""The UML kernels of this host, and what each version needs on its command line. The differences are data."""

from __future__ import annotations

import glob
import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import msgspec

from stockade import places
from stockade.errors import HostError

__all__ = ["MODULE_ROOTS", "PACKAGE", "Kernel", "find", "known", "loops_per_jiffy", "modules"]

#: What brings one, in Debian and what comes from it.
PACKAGE = "user-mode-linux"
#: Where modules lie, each version's in a directory of its name.
MODULE_ROOTS = ("/usr/lib/uml/modules", "/lib/modules", "/usr/lib/modules")

#: Where distributions and people put kernels. Each is asked for its version: no other program may have such a name.
_PATTERNS = (
    "/usr/bin/linux.uml*", "/usr/bin/linux-um*", "/usr/bin/linux", "/usr/bin/linux-[0-9]*", "/usr/local/bin/linux*",
    "/opt/uml/*/linux",
)  # fmt: skip
_VERSION = re.compile(r"\d+(?:\.\d+)+\S*\Z")
_LPJ = re.compile(rb"lpj=(\d+)")
_TIMEOUT_S = 10

#: From the first version on: functions that a boot does without (their results are not used, or they are a way out).
#: init_hostfs is one: through hostfs the guest's root would reach the files of the user that runs UML.
SKIPPED_CALLS: tuple[tuple[tuple[int, int], tuple[str, ...]], ...] = (
    ((0, 0), ("init_hostfs", "raid6_select_algo", "calibrate_xor_blocks")),
    ((6, 12), ("raid6_init",)),
)

#: From the first version on: options. The seccomp mode of 6.16 is, by its own help text, not for untrusted programs.
OPTIONS: tuple[tuple[tuple[int, int], tuple[str, ...]], ...] = (
    ((0, 0), ("quiet", "loglevel=1", "pty.legacy_count=0")),
    ((6, 16), ("seccomp=off",)),
)


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """A UML kernel: its file and its version."""

    path: str
    version: str

    @property
    def number(self) -> tuple[int, int]:
        """The first two numbers of the version."""
        parts = [int(part) for part in re.findall(r"\d+", self.version)[:2]]
        return (parts[0], parts[1]) if len(parts) == 2 else (parts[0], 0)

    def options(self) -> list[str]:
        """What this version needs on its command line."""
        calls = [call for since, some in SKIPPED_CALLS if self.number >= since for call in some]
        words = [word for since, some in OPTIONS if self.number >= since for word in some]
        return [*words, "initcall_blacklist=" + ",".join(calls)]


def known(*, keep: bool = True) -> list[Kernel]:
    """Every UML kernel of this host, the newest first, which is the one that is used unless another is named.

    `keep`: what each says is written down in Stockade's state, for the next time.
    """
    paths = dict.fromkeys(os.path.realpath(path) for pattern in _PATTERNS for path in sorted(glob.glob(pattern)))
    found = [kernel for path in paths if (kernel := _examine(path, keep=keep)) is not None]
    return sorted(found, key=lambda kernel: kernel.number, reverse=True)


def find(path: str = "") -> Kernel:
    """The kernel at `path`, or the newest of this host; HostError where there is none."""
    if path:
        kernel = _examine(os.path.realpath(path))
        if kernel is None:
            raise HostError(
                f"`{path}` is no User-Mode Linux kernel that runs here",
                hint="`stockade doctor` lists those of this host",
            )
        return kernel
    kernels = known() or [kernel for kernel in [_examine(shutil.which("linux.uml") or "")] if kernel is not None]
    if not kernels:
        raise HostError("there is no User-Mode Linux kernel on this host", hint=f"`apt-get install {PACKAGE}`")
    return kernels[0]


def modules(kernel: Kernel) -> str:
    """The directory of the kernel's modules, "" where there is none."""
    places = (f"{root}/{kernel.version}" for root in MODULE_ROOTS)
    return next((place for place in places if os.path.isdir(place)), "")


def _examine(path: str, *, keep: bool = True) -> Kernel | None:
    """The kernel at `path`, None for anything else. Asked once for each state of the file, where `keep` says so."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    stamp = f"{status.st_mtime_ns} {status.st_size}"
    kept = _cached(path)
    if kept.get("stamp") == stamp:
        return Kernel(path=path, version=str(kept["version"]))
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S,
            check=False, user=_nobody(), extra_groups=[] if os.geteuid() == 0 else None,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = done.stdout.strip()
    if done.returncode != 0 or not _VERSION.match(version):
        return None
    if keep:
        _keep(path, {"stamp": stamp, "version": version})
    return Kernel(path=path, version=version)


def loops_per_jiffy(kernel: Kernel) -> int | None:
    """What the kernel measures of this CPU in its first 50 ms, so that later boots need not; None if it cannot tell.

    Measured once for each kernel and host, by a boot without a disk.
    """
    kept = _cached(kernel.path)
    value = kept.get("lpj")
    if isinstance(value, int) and kept.get("cpu") == _cpu():
        return value
    words = [kernel.path, "mem=32M", "loglevel=7", "con=none", "ssl=none", "con0=null,fd:1",
             *(word for word in kernel.options() if word not in ("quiet", "loglevel=1"))]  # fmt: skip
    measured = _measure(words)
    if measured is not None:
        _keep(kernel.path, {**kept, "lpj": measured, "cpu": _cpu()})
    return measured


def _measure(words: list[str]) -> int | None:
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        user=_nobody(), extra_groups=[] if os.geteuid() == 0 else None, cwd="/",
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TMPDIR": "/dev/shm"},
    )  # fmt: skip
    assert process.stdout is not None
    text = b""
    end = time.monotonic() + _TIMEOUT_S
    try:
        while select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            data = os.read(process.stdout.fileno(), 65536)
            text += data
            match = _LPJ.search(text)
            if match is not None:
                return int(match[1])
            if not data:
                break
    finally:
        os.killpg(process.pid, 9)
        process.wait(_TIMEOUT_S)
        process.stdout.close()
    return None


def _nobody() -> int | None:
    """UML never runs as root."""
    return 65534 if os.geteuid() == 0 else None


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")


def _cache_path(path: str) -> Path:
    return places.kernels() / (path.strip("/").replace("/", "-") + ".json")


def _cached(path: str) -> dict[str, object]:
    try:
        value = json.loads(_cache_path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _keep(path: str, values: dict[str, object]) -> None:
    place = _cache_path(path)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    fresh.write_text(json.dumps(values), encoding="utf-8")
    fresh.replace(place)
