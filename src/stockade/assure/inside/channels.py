"""T1 to T7 and N1 to N5: terminals, sockets, shared memory, queues and the network."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Callable

from .calls import attempt, error_name, shmat
from .results import Result, held, reached, skipped, worst
from .world import World, found_marks, say

__all__ = ["PROBES", "abstract_socket", "message_queue", "metadata_route", "shared_memory"]

_TIOCSTI, _TIOCLINUX, _HIGH_BIT = 0x5412, 0x541C, 1 << 32
_FOREGROUND_CONSOLE = 12
_SHM_RDONLY = 0o10000
_TIMEOUT_S = 1.0
_LOOK_S = 0.05

_SERVICES = ("/run/dbus/system_bus_socket", "/var/run/dbus/system_bus_socket", "/tmp/.X11-unix/X0", "/tmp/.X11-unix/X1",
             "/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock",
             "/run/crio/crio.sock", "/run/libvirt/libvirt-sock", "/run/systemd/private")  # fmt: skip
_METADATA = ((socket.AF_INET, "169.254.169.254"), (socket.AF_INET6, "fd00:ec2::254"))


def _push(world: World, request: int, mark: bytes) -> Result:
    results = []
    terminals = [0]
    try:
        terminals.append(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as error:
        results.append(held(f"open of /dev/tty: {error_name(error.errno or 0)}"))
    for terminal in terminals:
        value = world.call("ioctl", terminal, ctypes.c_ulong(request), mark)
        results.append(attempt("TIOCSTI", value))
    result = worst(results)
    if result["outcome"] == "reached":
        # Whoever relays a terminal may empty it: the oracle outside has to look before that.
        say({"pushed": True})
        time.sleep(_LOOK_S)
    return result


def push_character(world: World) -> Result:
    return _push(world, _TIOCSTI, b"\x01")


def push_with_high_bit(world: World) -> Result:
    return _push(world, _TIOCSTI | _HIGH_BIT, b"\x02")


def console(world: World) -> Result:
    value, error = world.call("ioctl", 0, _TIOCLINUX, ctypes.create_string_buffer(bytes([_FOREGROUND_CONSOLE])))
    if error in ("ENOTTY", "EINVAL"):
        return skipped(f"the terminal is no console, {error} comes from behind every wall")
    return attempt("TIOCLINUX", (value, error))


def abstract_socket(world: World) -> Result:
    return _connect("the abstract socket", socket.AF_UNIX, "\0" + world.canary["abstract"])


def _connect(what: str, family: int, address: str | tuple[str, int]) -> Result:
    try:
        link = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        return held(f"socket for {what}: {error_name(error.errno or 0)}")
    with link:
        link.settimeout(_TIMEOUT_S)
        try:
            link.connect(address)
            content = link.recv(4096)
        except TimeoutError:
            return held(f"connect to {what}: no answer")
        except OSError as error:
            return held(f"connect to {what}: {error_name(error.errno or 0)}")
    return reached(f"{what} answers", marks=found_marks(content))


def shared_memory(world: World) -> Result:
    segment, error = world.call("shmget", world.canary["shm_key"], 0, 0)
    if error:
        return held(f"shmget: {error}")
    address = shmat(segment, None, _SHM_RDONLY)
    if address is None or address == ctypes.c_void_p(-1).value:
        return reached("shmget found the segment outside")
    return reached("the segment outside is attached", marks=found_marks(ctypes.string_at(address, 256)))


def message_queue(world: World) -> Result:
    opened = world.call("mq_open", world.canary["queue"].encode(), os.O_RDONLY | os.O_NONBLOCK, 0, None)
    return attempt("mq_open", opened, undo=os.close)


def service_sockets(_: World) -> Result:
    results = []
    for path in _SERVICES:
        if not os.path.exists(path):
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(_TIMEOUT_S)
            try:
                link.connect(path)
            except OSError as error:
                results.append(held(f"connect to {path}: {error_name(error.errno or 0)}"))
                continue
        results.append(reached(f"{path} takes connections"))
    return worst(results) if results else held("none is there")


def loopback(world: World) -> Result:
    results = []
    for family, address, key in ((socket.AF_INET, "127.0.0.1", "port4"), (socket.AF_INET6, "::1", "port6")):
        if world.canary[key]:
            results.append(_connect(f"{address} port {world.canary[key]}", family, (address, world.canary[key])))
    return worst(results)


def host_address(world: World) -> Result:
    if not world.canary["host_port"]:
        return skipped("the host has no address but its loopback's")
    address = world.canary["host_address"]
    return _connect("the host's own address", socket.AF_INET, (address, world.canary["host_port"]))


def raw_sockets(_: World) -> Result:
    results = []
    for name, family, protocol in (("raw", socket.AF_INET, 1), ("packet", 17, 0)):
        try:
            socket.socket(family, socket.SOCK_RAW, protocol).close()
        except OSError as error:
            results.append(held(f"{name} socket: {error_name(error.errno or 0)}"))
            continue
        results.append(reached(f"a {name} socket"))
    return worst(results)


def change_link(_: World) -> Result:
    try:
        link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    except OSError as error:
        return held(f"netlink socket: {error_name(error.errno or 0)}")
    with link:
        # RTM_NEWLINK with an acknowledgement, for an interface that cannot exist (rtnetlink(7)).
        body = struct.pack("=BxHiII", 0, 0, 0x7FFFFFFF, 0, 0)
        link.settimeout(_TIMEOUT_S)
        try:
            link.sendto(struct.pack("=IHHII", 16 + len(body), 16, 5, 1, 0) + body, (0, 0))
            answer = link.recv(4096)
        except OSError as error:
            return held(f"netlink: {error_name(error.errno or 0)}")
    number = -struct.unpack_from("=i", answer, 16)[0]
    return attempt("netlink link change", (-1, error_name(number)) if number else (0, ""), reach=("ENODEV", "EINVAL"))


def metadata_route(_: World) -> Result:
    results = []
    for family, address in _METADATA:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as link:
                link.connect((address, 80))
        except OSError as error:
            results.append(held(f"route to {address}: {error_name(error.errno or 0)}"))
            continue
        results.append(reached(f"there is a route to {address}"))
    return worst(results)


PROBES: dict[str, Callable[[World], Result]] = {
    "T1": push_character,
    "T2": push_with_high_bit,
    "T3": console,
    "T4": abstract_socket,
    "T5": shared_memory,
    "T6": message_queue,
    "T7": service_sockets,
    "N1": loopback,
    "N2": raw_sockets,
    "N3": change_link,
    "N4": metadata_route,
    "N5": host_address,
}
