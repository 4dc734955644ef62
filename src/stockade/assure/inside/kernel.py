"""K1 to K17: the kernel's own levers."""

from __future__ import annotations

import ctypes
import glob
import mmap
import os
import socket
import struct

from .calls import attempt, error_name, opening
from .results import Result, absent, held, reached, worst
from .world import World, in_child

__all__ = ["PROBES", "i386_getpid", "modules"]

_CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/*", "/cgroup", "/cgroup/*")
_X32 = 0x40000000
_I386_GETPID = 20
_BAD_COUNT = 0x7FFFFFFF


def _levers(*patterns: str) -> Result:
    """Opened for writing, and closed again."""
    results = []
    for pattern in patterns:
        for path in sorted(glob.glob(pattern)) or [pattern]:
            error, _ = opening(path, os.O_WRONLY)
            if not error:
                results.append(reached(f"{path} can be opened for writing"))
            elif error != "ENOENT" or "*" not in pattern:
                results.append(held(f"open of {path} for writing: {error}"))
    return worst(results) if results else held("there is none: ENOENT")


def core_pattern(_: World) -> Result:
    return _levers("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe")


def sysrq(_: World) -> Result:
    return _levers("/proc/sysrq-trigger")


def uevent_helper(_: World) -> Result:
    return _levers("/sys/kernel/uevent_helper")


def binary_formats(_: World) -> Result:
    return _levers("/proc/sys/fs/binfmt_misc/register")


def release_agent(_: World) -> Result:
    return _levers(*(f"{place}/release_agent" for place in _CGROUPS))


def allowed_devices(_: World) -> Result:
    return _levers(*(f"{place}/devices.allow" for place in _CGROUPS))


def modules(world: World) -> Result:
    empty = ctypes.create_string_buffer(16)
    return worst([
        attempt("init_module", world.call("init_module", empty, 0, b""), reach=("ENOEXEC", "EFAULT", "EINVAL")),
        attempt("finit_module", world.call("finit_module", -1, b"", 0), reach=("EBADF", "EINVAL")),
    ])  # fmt: skip


def other_kernel(world: World) -> Result:
    return attempt("kexec_load", world.call("kexec_load", 0, _BAD_COUNT, None, 0), reach=("EINVAL", "EFAULT", "EBUSY"))


def bpf(world: World) -> Result:
    # An array of one entry: type, key size, value size, entries (bpf(2)).
    attributes = (ctypes.c_uint32 * 32)(2, 4, 4, 1)
    return attempt("bpf map create", world.call("bpf", 0, attributes, 128), undo=os.close)


def performance(world: World) -> Result:
    # A software clock of this process, without the kernel's part (perf_event_open(2)).
    attributes = ctypes.create_string_buffer(struct.pack("=II32xQ64x", 1, 112, 1 | 1 << 5 | 1 << 6), 112)
    return attempt("perf_event_open", world.call("perf_event_open", attributes, 0, -1, -1, 0), undo=os.close)


def io_ring(world: World) -> Result:
    parameters = ctypes.create_string_buffer(120)
    return worst([
        attempt("io_uring_setup", world.call("io_uring_setup", 1, parameters), undo=os.close),
        attempt("io_uring_setup", world.call("io_uring_setup", 1, None), reach=("EFAULT",)),
    ])  # fmt: skip


def page_faults(world: World) -> Result:
    return attempt("userfaultfd", world.call("userfaultfd", os.O_CLOEXEC | 1), undo=os.close)


def raw_hardware(world: World) -> Result:
    results = []
    if "iopl" in world.call.numbers:
        results.append(attempt("iopl", world.call("iopl", 3)))
    for path in ("/dev/mem", "/dev/port", "/proc/kcore"):
        error, content = opening(path, read=4 if path == "/proc/kcore" else 0)
        if error:
            results.append(held(f"open of {path}: {error}"))
        elif path == "/proc/kcore" and not content:
            results.append(held(f"{path} is masked"))
        else:
            results.append(reached(f"{path} can be opened"))
    return worst(results)


def debug_files(_: World) -> Result:
    results = []
    for path in ("/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/security"):
        try:
            names = os.listdir(path)
        except OSError as error:
            results.append(held(f"list of {path}: {error_name(error.errno or 0)}"))
            continue
        results.append(reached(f"{path} can be listed") if names else held(f"{path} is empty"))
    return worst(results)


def whole_machine(world: World) -> Result:
    name = os.uname().nodename.encode()
    return worst([
        attempt("reboot with bad magic", world.call("reboot", 0, 0, 0, None), reach=("EINVAL",)),
        attempt("settimeofday of nothing", world.call("settimeofday", None, None)),
        attempt("sethostname to the same name", world.call("sethostname", name, len(name))),
    ])  # fmt: skip


def other_calls(world: World) -> Result:
    if world.architecture != "x86_64":
        return absent("only x86 has calls of other architectures")
    getpid = world.call.numbers["getpid"]
    value, error = world.call.raw(getpid | _X32)
    x32 = held(f"x32 getpid: {error}") if error else reached(f"x32 getpid gave {value}")
    answer = in_child(i386_getpid)
    if answer.get("value", -1) > 0:
        return worst([x32, reached("i386 getpid succeeded")])
    return worst([x32, held(f"i386 getpid: {answer.get('errno', answer.get('value'))}")])


def i386_getpid() -> dict[str, int]:
    # mov eax, 20; int 0x80; ret
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8" + _I386_GETPID.to_bytes(4, "little") + b"\xcd\x80\xc3")
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    return {"value": int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())}


def socket_families(_: World) -> Result:
    results = []
    for name, family, kind in (("AF_ALG", 38, socket.SOCK_SEQPACKET), ("AF_VSOCK", 40, socket.SOCK_STREAM),
                               ("AF_PACKET", 17, socket.SOCK_RAW)):  # fmt: skip
        try:
            socket.socket(family, kind).close()
        except OSError as error:
            results.append(held(f"socket {name}: {error_name(error.errno or 0)}"))
            continue
        results.append(reached(f"socket {name} succeeded"))
    return worst(results)


PROBES = {
    "K1": core_pattern,
    "K2": sysrq,
    "K3": uevent_helper,
    "K4": binary_formats,
    "K5": release_agent,
    "K6": allowed_devices,
    "K7": modules,
    "K8": other_kernel,
    "K9": bpf,
    "K10": performance,
    "K11": io_ring,
    "K12": page_faults,
    "K13": raw_hardware,
    "K14": debug_files,
    "K15": whole_machine,
    "K16": other_calls,
    "K17": socket_families,
}
