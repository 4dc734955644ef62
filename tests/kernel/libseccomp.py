"""libseccomp by ctypes: the oracle for numbers and for verdicts."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import NamedTuple

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # SCMP_ARCH_X86_64, SCMP_ARCH_AARCH64
ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
MASKED_EQ = 7
ATTRIBUTE_BAD_ARCHITECTURE = 2
ATTRIBUTE_OPTIMIZE = 8


def errno_action(number: int) -> int:
    return 0x00050000 | number


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("argument", ctypes.c_uint), ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64), ("second", ctypes.c_uint64),
    )  # fmt: skip


class OracleRule(NamedTuple):
    """One rule: what to do with the call of that number when every (argument, mask, value) matches."""

    action: int
    number: int
    matches: tuple[tuple[int, int, int], ...] = ()


def load() -> ctypes.CDLL:
    """The library; OSError when it is not installed."""
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Comparison),
    ]  # fmt: skip
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.seccomp_arch_remove.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    return library


def number(library: ctypes.CDLL, architecture: str, name: str) -> int:
    """Number by libseccomp's table; negative when it has none."""
    return int(library.seccomp_syscall_resolve_name_arch(ARCHITECTURES[architecture], name.encode()))


def program(library: ctypes.CDLL, default: int, rules: Iterable[OracleRule]) -> bytes:
    """The filter for the host's architecture, as libseccomp compiles it."""
    context = library.seccomp_init(default)
    assert context
    try:
        assert library.seccomp_attr_set(context, ATTRIBUTE_BAD_ARCHITECTURE, KILL_PROCESS) == 0
        assert library.seccomp_attr_set(context, ATTRIBUTE_OPTIMIZE, 2) == 0
        for rule in rules:
            array = (Comparison * len(rule.matches))(
                *(Comparison(argument, MASKED_EQ, mask, value) for argument, mask, value in rule.matches)
            )
            result = library.seccomp_rule_add_array(context, rule.action, rule.number, len(rule.matches), array)
            assert result == 0, (rule, os.strerror(-result))
        descriptor = os.memfd_create("oracle")
        try:
            assert library.seccomp_export_bpf(context, descriptor) == 0
            os.lseek(descriptor, 0, os.SEEK_SET)
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read()
        finally:
            os.close(descriptor)
    finally:
        library.seccomp_release(context)
