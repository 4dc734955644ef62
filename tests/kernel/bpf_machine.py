"""An interpreter of classic BPF over struct seccomp_data, written from filter.rst alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence

_WORD = 0xFFFFFFFF


def decode(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("<HBBI", program))


def run(program: Sequence[tuple[int, int, int, int]], number: int, architecture: int, arguments: Sequence[int]) -> int:
    """What the program returns for one call; every access and jump is checked as the kernel's checker does."""
    padded = [*arguments, *([0] * (6 - len(arguments)))]
    data = struct.pack("<IIQ6Q", number & _WORD, architecture, 0, *(value & 0xFFFFFFFFFFFFFFFF for value in padded))
    accumulator = 0
    place = 0
    while True:
        code, when_true, when_false, operand = program[place]
        place += 1
        match code:
            case 0x20:
                assert operand % 4 == 0 and operand < len(data)
                (accumulator,) = struct.unpack_from("<I", data, operand)
            case 0x54:
                accumulator &= operand
            case 0x05:
                place += operand
            case 0x15:
                place += when_true if accumulator == operand else when_false
            case 0x25:
                place += when_true if accumulator > operand else when_false
            case 0x35:
                place += when_true if accumulator >= operand else when_false
            case 0x45:
                place += when_true if accumulator & operand else when_false
            case 0x06:
                return operand
            case _:
                raise AssertionError(f"the kernel's checker knows no seccomp instruction {code:#x}")
