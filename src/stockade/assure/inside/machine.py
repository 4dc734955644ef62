"""G1 to G12: ways out of a machine, tried by its root or by its service against the host."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import time
from collections.abc import Iterable

from .calls import error_name, opening
from .channels import abstract_socket, message_queue, metadata_route, shared_memory
from .kernel import i386_getpid, modules
from .processes import pid_descriptors, read_memory, signal_nothing, trace
from .results import MARK, Result, absent, held, reached, skipped, worst
from .world import World, found_marks, in_child

__all__ = ["PROBES"]

# Documentation/admin-guide/devices.txt, and arch/um/drivers/ubd_kern.c: sixteen minors for each disk.
_UBD_MAJOR, _UBD_MINORS, _UBD_DISKS = 98, 16, 8
_OWN_DISK = "ubda"
_FILE_SYSTEMS = ("hostfs", "humfs", "9p", "virtiofs")
_STEP = 1 << 20
_MOST_MEMORY = 256 << 20
_BLOCK = 4096
#: What user-mode networks give the host as an address.
_GATEWAYS = ("10.0.2.1", "10.0.2.2", "10.0.2.3")
_AF_VSOCK, _HOST_CID = 40, 2
_MODULES_DISABLED = "/proc/sys/kernel/modules_disabled"
_TIMEOUT_S = 1.0
# Numbers of calls, the same in every architecture, and the first kernel that has each (syscalls(2)).
_LATE_CALLS = ((457, (6, 8), "statmount"), (451, (6, 5), "cachestat"))


def host_file_systems(world: World) -> Result:
    with world.scratch() as place:
        if place is None:
            return skipped("no directory here can be written to")
        results = []
        directory = os.path.dirname(world.canary["file"])
        for kind in _FILE_SYSTEMS:
            for options in ("", "/", "../../..", directory):
                _, error = world.call("mount", b"none", place.encode(), kind.encode(), 0, options.encode())
                if error:
                    results.append(held(f"mount of {kind}: {error}"))
                    continue
                marks = []
                for name in (world.canary["file"], "/file"):
                    marks += found_marks(opening(place + name, read=4096)[1])
                world.call("umount2", place.encode(), 2)
                results.append(reached(f"{kind} can be mounted", marks=marks))
        return worst(results)


def _opened_node(world: World, device: int, name: str) -> Result:
    """A new block device node, opened; one that no driver is behind is no way anywhere."""
    with world.scratch() as own:
        # The machine's root has places that honour devices, where a scratch directory may be on one that does not.
        results = [_opened_at(place, device, name) for place in ("/dev", "/", own) if place is not None]
    return min(results, key=lambda result: (result["outcome"] != "reached", "EACCES" in result["detail"]))


def _opened_at(place: str, device: int, name: str) -> Result:
    path = f"{place}/.stockade-{os.urandom(6).hex()}"
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, device)
    except OSError as error:
        return held(f"mknod of {name}: {error_name(error.errno or 0)}")
    try:
        refused, _ = opening(path)
    finally:
        os.unlink(path)
    return held(f"open of a node for {name}: {refused}") if refused else reached(f"{name} can be opened")


def other_disks(world: World) -> Result:
    own, results = set(), []
    for line in opening("/proc/partitions", read=1 << 16)[1].decode("utf-8", "replace").splitlines()[2:]:
        major, minor, _, name = line.split()
        if name == _OWN_DISK:
            own.add((int(major), int(minor)))
        elif not name.startswith(("loop", "ram")):
            results.append(_opened_node(world, os.makedev(int(major), int(minor)), f"the disk {name}"))
    for number in range(_UBD_DISKS):
        device = (_UBD_MAJOR, number * _UBD_MINORS)
        if device not in own:
            results.append(_opened_node(world, os.makedev(*device), f"disk {number} of the machine"))
    return worst(results)


def disk_of_the_host(world: World) -> Result:
    disk = world.request["disk"]
    if disk is None:
        return skipped("the host's root is on no block device")
    return _opened_node(world, os.makedev(*disk), "the host's disk")


def write_to_the_image(world: World) -> Result:
    """The last block of the disk is written and put back; who looks into the image is outside."""
    try:
        disk = os.open(f"/dev/{_OWN_DISK}", os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
    except OSError as error:
        return held(f"open of its disk: {error_name(error.errno or 0)}")
    try:
        at = os.lseek(disk, 0, os.SEEK_END) - _BLOCK
        before = os.pread(disk, _BLOCK, at)
        mark = (MARK + os.urandom(16).hex()).encode()
        os.pwrite(disk, mark.ljust(_BLOCK, b"\0"), at)
        os.fsync(disk)
        answer = world.ask("image", offset=at, mark=mark.decode())
        os.pwrite(disk, before, at)
        os.fsync(disk)
    finally:
        os.close(disk)
    if answer != "unchanged":
        return reached(f"what was written to its disk: the image is {answer or 'not told'}")
    return held("what was written to its disk is not in the image")


def more_kernel(world: World) -> Result:
    results = [modules(world)]
    try:
        with open(_MODULES_DISABLED, "wb", buffering=0) as file:
            file.write(b"0")
        is_open = opening(_MODULES_DISABLED, read=16)[1].strip() == b"0"
        results.append(reached("modules can be allowed again") if is_open else held("modules stay locked"))
    except OSError as error:
        results.append(held(f"modules_disabled: {error_name(error.errno or 0)}"))
    return worst(results)


def kernel_memory(world: World) -> Result:
    results = []
    for path in ("/dev/mem", "/proc/kcore"):
        try:
            memory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            results.append(held(f"open of {path}: {error_name(error.errno or 0)}"))
            continue
        marks: set[str] = set()
        size = 0
        with open(memory, "rb", buffering=0) as file:
            overlap = b""
            with contextlib.suppress(OSError):
                while size < _MOST_MEMORY and (piece := file.read(_STEP)):
                    marks.update(found_marks(overlap + piece))
                    overlap = piece[-64:]
                    size += len(piece)
        results.append(reached(f"{size >> 20} MB of {path} can be read", marks=sorted(marks)))
    return worst(results)


def processes_of_the_host(world: World) -> Result:
    results = []
    pid = world.canary["pid"]
    seen = [entry for entry in os.listdir("/proc") if entry.isdecimal()] if os.path.isdir("/proc/self") else []
    for entry in seen:
        name = opening(f"/proc/{entry}/comm", read=64)[1].strip().decode("ascii", "replace")
        if name == world.canary["comm"]:
            results.append(reached("the process of the host stands in /proc"))
    if str(pid) in seen:
        return worst([*results, held(f"process {pid} here is the machine's own")])
    return worst([*results, *(probe(world) for probe in (signal_nothing, trace, read_memory, pid_descriptors))])


def ports_of_the_host(world: World) -> Result:
    told = world.canary
    places = [("127.0.0.1", told["port4"]), ("::1", told["port6"])]
    for gateway in dict.fromkeys((*_gateways(), *_GATEWAYS)):
        places += [(gateway, told["port4"]), (gateway, told["host_port"])]
    if told["host_port"]:
        places.append((told["host_address"], told["host_port"]))
    return worst(_connected(dict.fromkeys((address, port) for address, port in places if port)))


def _connected(places: Iterable[tuple[str, int]]) -> list[Result]:
    """All at once: what does not answer costs the time of one."""
    results, waiting = [], {}
    poll = select.poll()
    for address, port in places:
        what = f"connect to {address} port {port}"
        try:
            link = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            results.append(held(f"socket for {what}: {error_name(error.errno or 0)}"))
            continue
        link.setblocking(False)
        answer = error_name(link.connect_ex((address, port)))
        if answer in ("0", "EINPROGRESS"):
            waiting[link.fileno()] = link, what
            poll.register(link, select.POLLIN)
            continue
        results.append(held(f"{what}: {answer}"))
        link.close()
    deadline = time.monotonic() + _TIMEOUT_S
    while waiting and (left := deadline - time.monotonic()) > 0:
        for number, _ in poll.poll(left * 1000):
            link, what = waiting.pop(number)
            poll.unregister(number)
            try:
                results.append(reached(what, marks=found_marks(link.recv(4096))))
            except OSError as failure:
                results.append(held(f"{what}: {error_name(failure.errno or 0)}"))
            link.close()
    return results + [held(f"{what}: no answer") for _, what in waiting.values()]


def _gateways() -> list[str]:
    """Addresses of /proc/net/route."""
    found = []
    for line in opening("/proc/net/route", read=1 << 16)[1].decode("ascii", "replace").splitlines()[1:]:
        words = line.split()
        if len(words) > 2 and words[2] != "00000000":
            found.append(socket.inet_ntoa(int(words[2], 16).to_bytes(4, "little")))
    return found


def channels_of_the_host(world: World) -> Result:
    return worst([abstract_socket(world), shared_memory(world), message_queue(world)])


def host_side_socket(world: World) -> Result:
    try:
        link = socket.socket(_AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        return held(f"socket AF_VSOCK: {error_name(error.errno or 0)}")
    with link:
        link.settimeout(1.0)
        try:
            link.connect((_HOST_CID, 1))
        except OSError as error:
            return reached(f"there are sockets to the host; connect: {error_name(error.errno or 0)}")
    return reached("a socket to the host")


def calls_of_the_host(world: World) -> Result:
    """A call that the guest's kernel is too old for, and one of i386: an answer can only be the host's."""
    own, host = (_version(text) for text in (os.uname().release, world.request["host_release"]))
    number = next((call for call in _LATE_CALLS if own < call[1] <= host), None)
    results = []
    if number is None:
        results.append(absent("the host's kernel has no call that the guest's does not know"))
    else:
        value, error = world.call.raw(number[0], -1, 0, 0, 0)
        answered = reached(f"{number[2]}, which Linux {os.uname().release} does not have: {error or value}")
        results.append(held(f"{number[2]}: ENOSYS") if error == "ENOSYS" else answered)
    if world.architecture == "x86_64":
        answer = in_child(lambda: {"pid": os.getpid(), **i386_getpid()})
        got = answer.get("value", -1)
        if got > 0 and got != answer.get("pid"):
            results.append(reached(f"i386 getpid gave {got}"))
        else:
            results.append(held(f"i386 getpid: {answer.get('errno', got)}"))
    return worst(results)


def _version(text: str) -> tuple[int, int]:
    major, minor = (text.split("-")[0].split(".") + ["0"])[:2]
    return int(major), int(minor)


PROBES = {
    "G1": host_file_systems,
    "G2": other_disks,
    "G3": disk_of_the_host,
    "G4": write_to_the_image,
    "G5": more_kernel,
    "G6": kernel_memory,
    "G7": processes_of_the_host,
    "G8": ports_of_the_host,
    "G9": metadata_route,
    "G10": channels_of_the_host,
    "G11": host_side_socket,
    "G12": calls_of_the_host,
}
