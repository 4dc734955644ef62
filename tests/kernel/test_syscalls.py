"""The tables of system calls against the machine's headers and against libseccomp."""

from __future__ import annotations

import ctypes
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import libseccomp
import pytest

from stockade.errors import HostError
from stockade.kernel import syscalls

TABLE = Path(syscalls.__file__).with_name("presets.toml")

# What arch/arm64/include/uapi/asm/unistd.h asks of the generic header.
ARM64 = (
    "__BITS_PER_LONG=64", "__ARCH_WANT_RENAMEAT", "__ARCH_WANT_NEW_STAT", "__ARCH_WANT_SET_GET_RLIMIT",
    "__ARCH_WANT_SYS_CLONE3", "__ARCH_WANT_MEMFD_SECRET",
)  # fmt: skip


def header_numbers(header: str, *definitions: str) -> dict[str, int]:
    """Numbers in a header, as the C preprocessor sees it."""
    try:
        answer = subprocess.run(
            ["gcc", "-E", "-dM", *(f"-D{definition}" for definition in definitions), "-include", header, "-"],
            input="", capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("gcc is not installed: `apt install gcc`")
    if answer.returncode != 0:
        pytest.skip(f"no `{header}` here: `apt install linux-libc-dev`")
    macros = {words[1]: words[2] for words in map(str.split, answer.stdout.splitlines()) if len(words) == 3}
    found = {}
    for macro, value in macros.items():
        if macro.startswith("__NR_") and macro not in ("__NR_syscalls", "__NR_arch_specific_syscall"):
            while value in macros:
                value = macros[value]
            found[macro.removeprefix("__NR_")] = int(value)
    return found


@pytest.mark.parametrize(
    ("architecture", "header", "definitions"),
    [("x86_64", "asm/unistd_64.h", ()), ("aarch64", "asm-generic/unistd.h", ARM64)],
)
def test_every_number_of_the_header_is_in_the_table(
    architecture: str, header: str, definitions: tuple[str, ...]
) -> None:
    expected = header_numbers(header, *definitions)
    assert len(expected) > 300
    table = syscalls.numbers(architecture)
    assert {name: table.get(name) for name in expected} == expected
    newest = max(expected.values())
    # uretprobe and uprobe came later, with numbers of a gap.
    later = {"uretprobe", "uprobe"}
    assert {name for name, number in table.items() if number <= newest} - later == set(expected)


@pytest.mark.parametrize("architecture", syscalls.ARCHITECTURES)
def test_libseccomp_gives_the_same_numbers(architecture: str, oracle: ctypes.CDLL) -> None:
    table = syscalls.numbers(architecture)
    theirs = {name: libseccomp.number(oracle, architecture, name) for name in table}
    known_to_both = {name: number for name, number in theirs.items() if number >= 0}
    assert len(known_to_both) > 300
    assert {name: table[name] for name in known_to_both} == known_to_both


@pytest.mark.parametrize("architecture", syscalls.ARCHITECTURES)
def test_no_number_is_given_twice(architecture: str) -> None:
    table = syscalls.numbers(architecture)
    assert [number for number, count in Counter(table.values()).items() if count > 1] == []


def test_every_call_stands_in_exactly_one_group() -> None:
    with TABLE.open("rb") as file:
        groups = tomllib.load(file)["groups"]
    count = Counter(call for group in groups.values() for call in group["calls"].split())
    assert set(count) == set(syscalls.known())
    assert [call for call, times in count.items() if times > 1] == []


def test_an_architecture_without_a_table_is_an_error_that_names_those_with_one() -> None:
    with pytest.raises(HostError) as caught:
        syscalls.numbers("sparc64")
    assert caught.value.message == "there is no system call table for the architecture `sparc64`"
    assert "`x86_64` and `aarch64`" in (caught.value.hint or "")
