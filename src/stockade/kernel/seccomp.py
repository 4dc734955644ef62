"""Compile a policy into a system call filter, and say what it does with a call. Loads no filter.

The filter is an allowlist. First it compares the architecture: a call of a foreign one (i386 by
`int $0x80`) kills the process, for its numbers mean other calls. A number with the x32 bit is answered
ENOSYS, as by a kernel without x32. Then a binary search over the numbers leads to the verdict, so
that a call costs a handful of instructions; the kernel remembers calls that are always allowed and
runs no filter for them (seccomp_cache_prepare, Linux 5.11). A number without a name here is
ENOSYS: a libc that tries a newer call falls back.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Literal

from ..errors import SpecError
from ..records.policy import Verdict
from .bpf import ARCHITECTURE, ARGUMENTS, NUMBER, Assembler
from .presets import Rule, Selection, group_of, rules, select
from .syscalls import AUDIT_ARCH, known, numbers

__all__ = ["Mode", "compile_filter", "explain", "explain_all"]

# enforce: refuse with the errno. log: allow, and log what would be refused. trace: stop for a tracer with the errno.
Mode = Literal["enforce", "log", "trace"]

# SECCOMP_RET_* of seccomp(2).
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000
_TRACE = 0x7FF00000
_LOG = 0x7FFC0000
_ALLOW = 0x7FFF0000

_X32_BIT = 0x40000000  # __X32_SYSCALL_BIT

_Verdict = tuple[Rule, ...] | str  # the rules to pass (none: allowed), or the name of an errno


def _verdicts(selection: Selection) -> dict[str, _Verdict]:
    """Verdict on every call by name."""
    verdicts: dict[str, _Verdict] = {name: group_of()[name].errno for name in known() - selection.calls}
    for name in selection.calls:
        verdicts[name] = tuple(rule for rule in rules() if name in rule.calls)
    return verdicts


def _ranges(verdicts: dict[str, _Verdict], architecture: str) -> list[tuple[int, _Verdict]]:
    """First number and verdict of each run of numbers with one verdict, from 0 on, sorted."""
    by_number = {number: verdicts[name] for name, number in numbers(architecture).items()}
    ranges: list[tuple[int, _Verdict]] = []
    for number in range(max(by_number) + 2):
        verdict = by_number.get(number, "ENOSYS")
        if not ranges or ranges[-1][1] != verdict:
            ranges.append((number, verdict))
    return ranges


class _Compiler:
    def __init__(self, selection: Selection, mode: Mode) -> None:
        self._selection = selection
        self._mode = mode
        self._program = Assembler()

    def _refuse(self, name: str) -> int:
        number = getattr(errno, name)
        match self._mode:
            case "enforce":
                return self._program.give(_ERRNO | number)
            case "trace":
                return self._program.give(_TRACE | number)
            case "log":
                return self._program.give(_LOG)

    def _rule(self, rule: Rule, passed: int) -> int:
        """Place that applies `rule` and goes on at `passed` when the call passes it."""
        program = self._program
        allowed = self._selection.permitted(rule)
        refused = self._refuse(rule.errno)
        place, hit = (refused, passed) if allowed is not None else (passed, refused)
        for value in reversed(rule.refuse if allowed is None else allowed):
            place = program.test("==", value, then=hit, otherwise=place)
        if rule.mask != 0xFFFFFFFF:
            place = program.mask(rule.mask, then=place)
        place = program.load(ARGUMENTS + 8 * rule.argument, then=place)
        if rule.when is not None:
            argument, value = rule.when
            place = program.test("==", value, then=place, otherwise=passed)
            place = program.load(ARGUMENTS + 8 * argument, then=place)
        return place

    def _verdict(self, verdict: _Verdict) -> int:
        if isinstance(verdict, str):
            return self._refuse(verdict)
        place = self._program.give(_ALLOW)
        for rule in reversed(verdict):
            place = self._rule(rule, place)
        return place

    def _search(self, ranges: list[tuple[int, _Verdict]]) -> int:
        """Place that finds the verdict of the number in the accumulator, which is in `ranges`."""
        if len(ranges) == 1:
            return self._verdict(ranges[0][1])
        if len(ranges) == 3 and ranges[0][1] == ranges[2][1] and ranges[2][0] == ranges[1][0] + 1:
            inner, outer = self._verdict(ranges[1][1]), self._verdict(ranges[0][1])
            return self._program.test("==", ranges[1][0], then=inner, otherwise=outer)
        middle = len(ranges) // 2
        high, low = self._search(ranges[middle:]), self._search(ranges[:middle])
        return self._program.test(">=", ranges[middle][0], then=high, otherwise=low)

    def compile(self, architecture: str) -> bytes:
        program = self._program
        place = self._search(_ranges(_verdicts(self._selection), architecture))
        place = program.test("&", _X32_BIT, then=program.give(_ERRNO | errno.ENOSYS), otherwise=place)
        place = program.load(NUMBER, then=place)
        foreign = program.give(_KILL_PROCESS)
        place = program.test("==", AUDIT_ARCH[architecture], then=place, otherwise=foreign)
        program.load(ARCHITECTURE, then=place)
        return program.encode()


def compile_filter(
    preset: str,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    *,
    architecture: str,
    chroot: bool = False,
    allow_ptrace: bool = False,
    mode: Mode = "enforce",
) -> bytes:
    """The filter of a policy, as an array of struct sock_filter for `architecture`.

    `preset`, `add` and `remove` are those of the spec's `policy.syscalls`; the preset "none" gives no
    instructions: no filter. `chroot` and `allow_ptrace` are `presets.select`'s. In the modes "log" and "trace" the
    refusals change, the check of the architecture stays. SpecError for words that a policy cannot hold,
    HostError for an architecture without a table.
    """
    if preset == "none":
        if tuple(add) or tuple(remove):
            raise SpecError(
                "`policy.syscalls` adds or removes system calls where the preset `none` allows them all",
                hint="name another preset, or drop `add` and `remove`",
            )
        return b""
    selection = select(preset, add, remove, chroot=chroot, allow_ptrace=allow_ptrace)
    return _Compiler(selection, mode).compile(architecture)


def _explain(name: str, preset: str, selection: Selection) -> Verdict:
    group = group_of().get(name)
    if group is None:
        return Verdict(
            name=name, outcome="refused", errnos=("ENOSYS",), never=True,
            why="no call of that name is known: answered as by a kernel that does not have it",
        )  # fmt: skip
    if name in selection.calls:
        conditions = [rule for rule in rules() if name in rule.calls]
        if not conditions:
            return Verdict(name=name, outcome="allowed", group=group.name, why=group.about)
        return Verdict(
            name=name, outcome="conditional", group=group.name,
            errnos=tuple(dict.fromkeys(rule.errno for rule in conditions)),
            why="; ".join(rule.about for rule in conditions),
        )  # fmt: skip
    why = group.about if group.never else f"not part of the preset `{preset}` as this policy has it: {group.about}"
    return Verdict(
        name=name, outcome="refused", errnos=(group.errno,), group=group.name, why=why, never=group.never
    )


def explain(
    name: str,
    preset: str = "default",
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    *,
    chroot: bool = False,
    allow_ptrace: bool = False,
) -> Verdict:
    """What the filter of that policy does with the call `name`, and why. Errors as `compile_filter`."""
    return explain_all((name,), preset, add, remove, chroot=chroot, allow_ptrace=allow_ptrace)[0]


def explain_all(
    names: Iterable[str],
    preset: str = "default",
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    *,
    chroot: bool = False,
    allow_ptrace: bool = False,
) -> tuple[Verdict, ...]:
    """`explain` for several calls, such as those that a trace holds, in their order."""
    if preset == "none":
        return tuple(
            Verdict(name=name, outcome="allowed", why="the preset `none` filters nothing") for name in names
        )
    selection = select(preset, add, remove, chroot=chroot, allow_ptrace=allow_ptrace)
    return tuple(_explain(name, preset, selection) for name in names)
