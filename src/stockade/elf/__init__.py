"""ELF files, and ld.so's index of them: read without running anything, and written for a new root."""

from .reading import EM_386, EM_AARCH64, EM_RISCV, EM_X86_64, DlopenNote, ElfFile, read

__all__ = ["EM_386", "EM_AARCH64", "EM_RISCV", "EM_X86_64", "DlopenNote", "ElfFile", "read"]
