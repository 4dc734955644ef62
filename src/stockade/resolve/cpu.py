"""What glibc derives from the processor: library subdirectories and `$PLATFORM`. Reads /proc/cpuinfo, nothing else."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

from stockade.elf import EM_386, EM_AARCH64, EM_X86_64

__all__ = ["Processor", "processor"]

# x86-64 psABI, table "Micro-Architecture Levels", in the kernel's spelling of the flags.
_LEVELS = (
    ("x86-64-v2", {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}),
    ("x86-64-v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)
# glibc, sysdeps/x86/cpu-features.c: on Intel's processors alone these flags change the platform and add a subdirectory.
_HASWELL = {"avx2", "bmi1", "bmi2", "abm", "movbe", "popcnt", "fma"}
_AVX512_1 = {"avx512cd", "avx512bw", "avx512dq", "avx512vl"}


class Processor(NamedTuple):
    """`platform` is `$PLATFORM`; `hwcaps` the glibc-hwcaps subdirectories, best first;

    `legacy` the subdirectories that glibc before 2.37 searches in every directory, in its order.
    """

    platform: str
    hwcaps: tuple[str, ...]
    legacy: tuple[str, ...]


def _subsets(names: list[str]) -> tuple[str, ...]:
    """Every subset of `names` as a relative path, the fullest first (glibc 2.36, _dl_important_hwcaps)."""
    chosen = itertools.product((True, False), repeat=len(names))
    paths = ("/".join(itertools.compress(names, mask)) for mask in chosen)
    return tuple(dict.fromkeys(path for path in paths if path))


@functools.cache
def processor(machine: int) -> Processor:
    """What the dynamic linker for the ELF `machine` derives from this host's processor."""
    if machine == EM_X86_64:
        return _x86_64(*_cpuinfo())
    if machine == EM_386:
        return Processor("i686", (), _subsets(["tls", "i686", "sse2"]))
    if machine == EM_AARCH64:
        return Processor("aarch64", (), _subsets(["tls", "aarch64"]))
    return Processor("", (), _subsets(["tls"]))


def _x86_64(vendor: str, flags: frozenset[str]) -> Processor:
    hwcaps: list[str] = []
    for name, needs in _LEVELS:
        if not needs <= flags:
            break
        hwcaps.insert(0, name)
    intel = vendor == "GenuineIntel"
    platform = "haswell" if intel and flags >= _HASWELL else "x86_64"
    extra = ["avx512_1"] if intel and flags >= _AVX512_1 else []
    return Processor(platform, tuple(hwcaps), _subsets(["tls", platform, *extra, "x86_64"]))


def _cpuinfo() -> tuple[str, frozenset[str]]:
    """Vendor and flags of the first processor."""
    vendor, flags = "", frozenset[str]()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.startswith("vendor_id"):
                    vendor = value.strip()
                elif key.startswith("flags"):
                    flags = frozenset(value.split())
                    break
    except OSError:
        pass  # without /proc only the baseline is known to be there
    return vendor, flags
