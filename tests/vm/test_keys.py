"""One branch of the kernel's code is found whichever way a compiler wrote it, and nothing is changed that is not it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from machine import needs

from stockade.vm import keys

#: tty_audit_add_data of Debian's 6.1.176, its last part: the copy, the comparison, the call that tells, the loop.
DEBIAN = bytes.fromhex(
    "41bc00100000488b75b84929fc4939dc4c0f47e349037d284c89e24c29e341ffd6498b45204c0165b84c01e049894520"
    "483d00100000750f48b8ad185060000000004c89efffd04885db75b0"
)

GATHER = """
#include <string.h>
struct buffer { long other[4]; unsigned long valid; unsigned char *data; };
void tell(struct buffer *);
void *allocate(unsigned long);
void gather(struct buffer *buffer, const unsigned char *data, unsigned long size)
{
    if (buffer->data == 0)
        buffer->data = allocate(4096);
    do {
        unsigned long run = 4096 - buffer->valid;
        if (run > size)
            run = size;
        memcpy(buffer->data + buffer->valid, data, run);
        buffer->valid += run;
        data += run;
        size -= run;
        if (buffer->valid == 4096)
            tell(buffer);
    } while (size != 0);
}
"""
DRIVER = """
#include <stdio.h>
#include <stdlib.h>
struct buffer { long other[4]; unsigned long valid; unsigned char *data; };
void gather(struct buffer *, const unsigned char *, unsigned long);
void *allocate(unsigned long size) { return malloc(size); }
void tell(struct buffer *buffer) { printf("%lu ", buffer->valid); buffer->valid = 0; }
int main(void)
{
    static unsigned char data[10000];
    struct buffer buffer = {{0}};
    gather(&buffer, data, 1);
    gather(&buffer, data, 3);
    gather(&buffer, data, 10000);
    printf("left %lu\\n", buffer.valid);
    return 0;
}
"""


def test_branch_of_debians_kernel_is_taken_out() -> None:
    at, fresh = keys.always_full(DEBIAN)
    assert (DEBIAN[at : at + 2], fresh) == (b"\x75\x0f", b"\x90\x90")


@pytest.mark.parametrize(
    ("code", "fresh"),
    [
        ("483d00100000 0f8500010000", "909090909090"),
        ("48817b2000100000 740c", "eb0c"),
        ("4981fc00100000 0f84 fbffffff", "e9fcffffff90"),
        ("4981fc00100000 0f84 ffffffff", "e90000000090"),
        ("49817c242000100000 7510", "9090"),
    ],
)
def test_each_form_of_the_branch_becomes_one_that_tells(code: str, fresh: str) -> None:
    data = b"\x41\xbc\x00\x10\x00\x00" + bytes.fromhex(code) + b"\xc3"
    at, given = keys.always_full(data)
    assert given == bytes.fromhex(fresh)
    assert data[at + len(given) :] == b"\xc3"


@pytest.mark.parametrize("code", [b"", b"\x90" * 300, DEBIAN + DEBIAN, b"\x48\x3d\x00\x20\x00\x00\x75\x0f"])
def test_code_without_that_one_branch_is_refused(code: bytes) -> None:
    with pytest.raises(ValueError, match="places where a full buffer is told"):
        keys.always_full(code)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the code of other machines is not known")
@pytest.mark.parametrize("level", ["-O1", "-O2", "-O3", "-Os"])
def test_what_a_compiler_makes_of_the_kernels_loop_tells_each_read_once_changed(tmp_path: Path, level: str) -> None:
    needs(("gcc", "gcc"), ("objcopy", "binutils"))
    (tmp_path / "gather.c").write_text(GATHER)
    (tmp_path / "driver.c").write_text(DRIVER)

    def run(*words: object) -> str:
        return subprocess.run(
            [os.fspath(word) for word in words],  # type: ignore[arg-type]
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip

    run("gcc", level, "-fno-pie", "-mcmodel=large", "-c", tmp_path / "gather.c", "-o", tmp_path / "gather.o")
    run("gcc", "-no-pie", "-mcmodel=large", tmp_path / "driver.c", tmp_path / "gather.o", "-o", tmp_path / "plain")
    run("objcopy", "-O", "binary", "-j", ".text", tmp_path / "gather.o", tmp_path / "code")
    assert run(tmp_path / "plain") == "4096 4096 left 1812\n"
    program = bytearray((tmp_path / "plain").read_bytes())
    code = (tmp_path / "code").read_bytes()
    at, fresh = keys.always_full(code)
    # Calls are filled in by the linker, the branch is not: it lies where the code around it lies.
    start = program.index(code[at - 6 : at + len(fresh) + 2])
    assert program.count(code[at - 6 : at + len(fresh) + 2]) == 1
    program[start + 6 : start + 6 + len(fresh)] = fresh
    (tmp_path / "changed").write_bytes(program)
    shutil.copymode(tmp_path / "plain", tmp_path / "changed")
    assert run(tmp_path / "changed") == "1 3 4096 4096 1808 left 0\n"


@pytest.mark.parametrize("where", [b"", b"zz 1", b"10 10", b"0 ffffffff", b"1 2 3"])
def test_what_a_guest_tells_is_not_believed(where: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        keys.tell_at_once([os.getpid()], where)


def test_no_memory_is_written_that_is_not_a_files_code() -> None:
    with pytest.raises(ValueError, match="no process of the guest holds"):
        keys.tell_at_once([os.getpid()], b"1000 1100")
