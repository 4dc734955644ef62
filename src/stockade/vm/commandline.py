"""The command line of a guest's kernel. Pure: from records to words."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stockade.records.image import ImageStart

from .kernels import Kernel

__all__ = ["CONSOLE_FD", "LINE_FD", "Interface", "words"]

#: Numbers of the descriptors that the kernel finds its console and its serial line on.
CONSOLE_FD = 3
LINE_FD = 4
FIRST_WIRE_FD = 5

_DEPTH = 128


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface: `transport` with its options as the vector driver takes them, and the guest's address."""

    transport: str
    address: str
    gateway: str = ""
    mtu: int = 65520

    def device(self, number: int) -> str:
        """The word that makes the device."""
        return f"vec{number}:transport={self.transport},depth={_DEPTH},gro=1,mtu={self.mtu}"

    def setting(self, number: int) -> str:
        """The word that tells the guest's PID 1 to bring it up."""
        return f"stockade_net{number}=vec{number},{self.address},{self.gateway},"


def words(
    kernel: Kernel,
    *,
    name: str,
    memory: int,
    lpj: int | None,
    start: ImageStart,
    walls: Sequence[str],
    interfaces: Sequence[Interface] = (),
    dns: str = "",
    read_only: bool = False,
    wait: bool = False,
    record: bool = False,
    disk: str = "disk.cow",
    base: str = "base",
) -> list[str]:
    """The kernel's words after its path. `disk` and `base` are relative to UML's working directory.

    `walls` are those inside of the guest's own. `memory` in bytes. `wait`: the service starts when it is told to.
    """
    found = [
        *kernel.options(),
        f"mem={memory >> 10}K",
        "umid=uml",
        "uml_dir=run/",
        f"ubd0={disk},{base}",
        "root=/dev/ubda",
        "rootfstype=ext4",
        "ro" if read_only else "rw",
        "con=none",
        f"con0=fd:{CONSOLE_FD},fd:{CONSOLE_FD}",
        "ssl=none",
        f"init={start.init}",
        *start.options,
    ]
    if lpj is not None:
        found.append(f"lpj={lpj}")
    if start.has_line:
        found += [f"ssl0=fd:{LINE_FD},fd:{LINE_FD}", "stockade_line=/dev/ttyS0"]
        settings = _settings(start, name, walls, dns, wait, record)
        found += [f"stockade_{key}={value}" for key, value in settings.items() if value]
        found += [interface.setting(number) for number, interface in enumerate(interfaces)]
    found += [interface.device(number) for number, interface in enumerate(interfaces)]
    return found


def _settings(start: ImageStart, name: str, walls: Sequence[str], dns: str, wait: bool, record: bool) -> dict[str, str]:
    inner = "jail" if walls[-1:] == ("jail",) and len(walls) > 1 else "vm"
    return {
        "hostname": name[:63],
        "plan": start.plan.get(inner, ""),
        "mounts": start.mounts if inner == "vm" else "",
        "program": start.program,
        "system": start.system,
        "syslog": "1" if start.plan and inner == "vm" else "",
        "stop_signal": str(start.stop_signal),
        "stop_ms": str(start.stop_ms),
        "end": "1" if start.end else "",
        "wait": "1" if wait else "",
        "dns": dns,
        "record": "1" if record else "",
    }
