"""An assembler for classic BPF programs that filter system calls. Runs nothing.

Source: Documentation/networking/filter.rst and include/uapi/linux/{bpf_common,filter,seccomp}.h.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

__all__ = ["ARGUMENTS", "ARCHITECTURE", "MAXIMUM_LENGTH", "NUMBER", "Assembler", "Instruction"]

MAXIMUM_LENGTH = 4096  # BPF_MAXINSNS
_FARTHEST = 255        # jt and jf are one byte

# Offsets into struct seccomp_data: { int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]; }
NUMBER = 0
ARCHITECTURE = 4
ARGUMENTS = 16

_LOAD = 0x20    # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54     # BPF_ALU | BPF_AND | BPF_K
_JUMP = 0x05    # BPF_JMP | BPF_JA
_RETURN = 0x06  # BPF_RET | BPF_K
_TESTS = {"==": 0x15, ">=": 0x35, "&": 0x45}  # BPF_JMP | BPF_{JEQ,JGE,JSET} | BPF_K


class Instruction(NamedTuple):
    """struct sock_filter: operation, jump distances when true and when false, operand."""

    code: int
    when_true: int
    when_false: int
    operand: int


class Assembler:
    """Builds a program from its end to its beginning.

    A jump only goes forward, so what it leads to is already there and its distance is known. Each
    method puts instructions before those that exist and returns their place, which later ones
    can lead to. Places are counted from the end. A place too far for a conditional jump is
    reached over a copy of its return, or over an unconditional jump.
    """

    def __init__(self) -> None:
        self._backwards: list[Instruction] = []
        self._returns: dict[int, int] = {}

    def _put(self, code: int, operand: int, when_true: int = 0, when_false: int = 0) -> int:
        self._backwards.append(Instruction(code, when_true, when_false, operand))
        return len(self._backwards)

    def give(self, value: int) -> int:
        """End with `value`; an equal return that is still near is used again."""
        place = self._returns.get(value)
        # Half the reach, so that the jump which is about to lead there is near in all but odd cases.
        if place is None or len(self._backwards) - place > _FARTHEST // 2:
            place = self._returns[value] = self._put(_RETURN, value)
        return place

    def _nearer(self, place: int) -> int:
        target = self._backwards[place - 1]
        if target.code == _RETURN:
            return self._put(_RETURN, target.operand)
        return self._put(_JUMP, len(self._backwards) - place)

    def test(self, comparison: Literal["==", ">=", "&"], operand: int, *, then: int, otherwise: int) -> int:
        """Compare the accumulator with `operand` (unsigned) and go on at one of two places."""
        # One less for the first: the second may put one more instruction between.
        if len(self._backwards) - then > _FARTHEST - 1:
            then = self._nearer(then)
        if len(self._backwards) - otherwise > _FARTHEST:
            otherwise = self._nearer(otherwise)
        size = len(self._backwards)
        return self._put(_TESTS[comparison], operand, size - then, size - otherwise)

    def _before(self, code: int, operand: int, then: int) -> int:
        if then != len(self._backwards):
            self._nearer(then)
        return self._put(code, operand)

    def load(self, offset: int, *, then: int) -> int:
        """Read the 32-bit word at `offset` of struct seccomp_data and go on at `then`."""
        return self._before(_LOAD, offset, then)

    def mask(self, bits: int, *, then: int) -> int:
        """Keep only `bits` of the accumulator and go on at `then`."""
        return self._before(_AND, bits, then)

    def instructions(self) -> tuple[Instruction, ...]:
        """The program, in order; ValueError if it is longer than the kernel takes."""
        if len(self._backwards) > MAXIMUM_LENGTH:
            raise ValueError(f"{len(self._backwards)} instructions are more than the {MAXIMUM_LENGTH} of a filter")
        return tuple(reversed(self._backwards))

    def encode(self) -> bytes:
        """The program as an array of struct sock_filter, little endian."""
        return b"".join(struct.pack("<HBBI", *instruction) for instruction in self.instructions())
