"""Capability names, masks, and the sets that a service is given. Changes no process.

Source: capabilities(7) and include/uapi/linux/capability.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import SpecError
from ..records.policy import CapabilitySets

__all__ = ["NAMES", "format_mask", "last_capability", "mask", "names", "parse_mask", "sets_for"]

#: Names in lower case without `cap_`; a name's place is its number.
NAMES: tuple[str, ...] = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)  # fmt: skip

_NUMBERS = {name: number for number, name in enumerate(NAMES)}
_LAST_CAPABILITY = Path("/proc/sys/kernel/cap_last_cap")


def _number(name: str) -> int:
    number = _NUMBERS.get(name)
    if number is not None:
        return number
    import difflib  # only errors need it

    plain = name.lower().removeprefix("cap_")
    near = [plain] if plain in _NUMBERS else difflib.get_close_matches(plain, NAMES, n=1)
    raise SpecError(
        f"there is no capability `{name}`",
        hint=f"did you mean `{near[0]}`?" if near else "names are those of capabilities(7), lower case, without `cap_`",
    )


def mask(capabilities: Iterable[str]) -> int:
    """Bit mask of the named capabilities; SpecError for an unknown name."""
    bits = 0
    for name in capabilities:
        bits |= 1 << _number(name)
    return bits


def names(bits: int) -> tuple[str, ...]:
    """Names of the bits set in `bits`, by number; a bit without a name here is its number in decimal."""
    numbers = (number for number in range(bits.bit_length()) if bits >> number & 1)
    return tuple(NAMES[number] if number < len(NAMES) else str(number) for number in numbers)


def parse_mask(text: str) -> int:
    """Bit mask from the hexadecimal text of a `Cap…:` line in /proc/PID/status; ValueError if it is none."""
    return int(text.strip(), 16)


def format_mask(bits: int) -> str:
    """`bits` as /proc/PID/status writes a capability set: 16 hexadecimal digits."""
    return f"{bits:016x}"


def last_capability(source: Path = _LAST_CAPABILITY) -> int:
    """Number of the last capability that the running kernel knows; OSError where /proc is hidden."""
    return int(source.read_text(encoding="ascii"))


def sets_for(capabilities: Iterable[str], *, uid: int) -> CapabilitySets:
    """Capability sets with which a service that may use `capabilities` is executed as `uid`.

    Root gets its permitted set from the bounding set at execve; another id keeps only ambient
    capabilities, which must be inheritable too (capabilities(7), "Transformation of capabilities
    during execve()").
    """
    bits = mask(capabilities)
    carried = 0 if uid == 0 else bits
    return CapabilitySets(bounding=bits, permitted=bits, effective=bits, inheritable=carried, ambient=carried)
