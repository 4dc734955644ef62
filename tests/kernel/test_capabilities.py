"""Capability names and sets, against the machine's header, libcap's file and the running kernel."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from child import in_child, libc

from stockade.errors import SpecError
from stockade.kernel import capabilities
from stockade.records.policy import CapabilitySets

HEADER = Path("/usr/include/linux/capability.h")


@pytest.mark.skipif(not HEADER.exists(), reason="no kernel headers: `apt install linux-libc-dev`")
def test_names_and_numbers_are_those_of_the_header() -> None:
    defined = re.findall(r"^#define CAP_([A-Z_]+)\s+(\d+)$", HEADER.read_text(), re.MULTILINE)
    expected = {name.lower(): int(number) for name, number in defined}
    assert len(expected) >= 41
    assert {name: number for number, name in enumerate(capabilities.NAMES)} == expected


def test_the_running_kernel_knows_no_capability_without_a_name() -> None:
    last = capabilities.last_capability()
    # capability.h: a number is valid when PR_CAPBSET_READ of prctl(2) takes it.
    assert libc.prctl(23, ctypes.c_ulong(last), 0, 0, 0) >= 0
    assert libc.prctl(23, ctypes.c_ulong(last + 1), 0, 0, 0) == -1
    assert last < len(capabilities.NAMES)


def test_a_mask_has_the_bit_of_each_name() -> None:
    assert capabilities.mask([]) == 0
    assert capabilities.mask(["chown"]) == 1
    assert capabilities.mask(["net_bind_service", "setuid", "net_bind_service"]) == 1 << 10 | 1 << 7
    assert capabilities.mask(capabilities.NAMES) == (1 << 41) - 1


@pytest.mark.parametrize("bits", [0, 1, 1 << 40, 0x1FFFFFFFFFF, 0xA80425FB])
def test_names_of_a_mask_make_the_mask_again(bits: int) -> None:
    assert capabilities.mask(capabilities.names(bits)) == bits


def test_a_bit_of_a_later_kernel_is_told_by_number() -> None:
    assert capabilities.names(1 << 50 | 1) == ("chown", "50")


def test_masks_read_and_write_as_in_proc() -> None:
    line = re.search(r"^CapBnd:\t(.*)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line is not None
    assert capabilities.format_mask(capabilities.parse_mask(line[1])) == line[1]
    assert capabilities.parse_mask("00000000a80425fb\n") == 0xA80425FB


@pytest.mark.parametrize(
    ("name", "near"),
    [("CAP_NET_ADMIN", "net_admin"), ("cap_setuid", "setuid"), ("net_bind_servce", "net_bind_service")],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(name: str, near: str) -> None:
    with pytest.raises(SpecError) as caught:
        capabilities.mask([name])
    assert caught.value.message == f"there is no capability `{name}`"
    assert caught.value.hint == f"did you mean `{near}`?"


def test_root_has_its_capabilities_from_the_bounding_set_and_nothing_ambient() -> None:
    assert capabilities.sets_for(["setuid", "chown"], uid=0) == CapabilitySets(
        bounding=0x81, permitted=0x81, effective=0x81, inheritable=0, ambient=0
    )


def test_another_id_has_exactly_the_policy_as_ambient() -> None:
    assert capabilities.sets_for(["net_bind_service"], uid=33) == CapabilitySets(
        bounding=0x400, permitted=0x400, effective=0x400, inheritable=0x400, ambient=0x400
    )
    assert capabilities.sets_for([], uid=33) == CapabilitySets()


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def apply(sets: CapabilitySets, uid: int) -> None:
    """What the launch does with the sets, by capabilities(7)."""

    def checked(result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno(), "capabilities")

    for number in range(capabilities.last_capability() + 1):
        if not sets.bounding >> number & 1:
            checked(libc.prctl(24, ctypes.c_ulong(number), 0, 0, 0))  # PR_CAPBSET_DROP
    checked(libc.prctl(8, ctypes.c_ulong(1), 0, 0, 0))  # PR_SET_KEEPCAPS
    checked(libc.setresgid(uid, uid, uid))
    checked(libc.setresuid(uid, uid, uid))
    words = [(value >> shift) & 0xFFFFFFFF for shift in (0, 32) for value in (
        sets.effective, sets.permitted, sets.inheritable,
    )]  # fmt: skip
    checked(libc.capset(ctypes.byref(_Header(0x20080522, 0)), (ctypes.c_uint32 * 6)(*words)))
    for number in range(capabilities.last_capability() + 1):
        if sets.ambient >> number & 1:
            checked(libc.prctl(47, ctypes.c_ulong(2), ctypes.c_ulong(number), 0, 0))  # PR_CAP_AMBIENT_RAISE


@pytest.mark.skipif(
    not capabilities.parse_mask(Path("/proc/self/status").read_text().partition("CapEff:\t")[2].split()[0]) >> 8 & 1,
    reason="dropping from the bounding set needs CAP_SETPCAP: run as root",
)
@pytest.mark.parametrize("uid", [0, 65534])
@pytest.mark.parametrize("names", [(), ("net_bind_service", "kill")])
def test_an_executed_program_has_exactly_the_policy(uid: int, names: tuple[str, ...]) -> None:
    sets = capabilities.sets_for(names, uid=uid)

    def work() -> dict[str, str]:
        import subprocess

        apply(sets, uid)
        status = subprocess.run(["/bin/cat", "/proc/self/status"], capture_output=True, text=True, timeout=10).stdout
        return dict(re.findall(r"^Cap(\w+):\t(.*)$", status, re.MULTILINE))

    found = {name: capabilities.parse_mask(text) for name, text in in_child(work).items()}
    policy = capabilities.mask(names)
    carried = policy if uid else 0
    assert found == {"Inh": carried, "Prm": policy, "Eff": policy, "Bnd": policy, "Amb": carried}
