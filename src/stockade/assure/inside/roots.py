"""F1 to F7: ways above the root directory."""

from __future__ import annotations

import array
import os
import socket
from typing import Any

from .calls import error_name, opening
from .results import Result, held, reached, skipped, worst
from .world import World, found_marks, in_child

__all__ = ["PROBES"]

_UP = 64


def climb(world: World) -> dict[str, Any]:
    """From the current directory as far up as `..` goes: the top's identity, and whether the canary stands below it."""
    for _ in range(_UP):
        os.chdir("..")
    status = os.stat(".")
    _, content = opening("." + world.canary["file"], read=4096)
    return {"top": [status.st_dev, status.st_ino], "marks": found_marks(content)}


def judged(how: str, answer: dict[str, Any]) -> Result:
    """A climb that ended at the own root got nowhere."""
    if "errno" in answer:
        return held(f"{how}: {answer['errno']}")
    own = os.stat("/")
    if answer["top"] == [own.st_dev, own.st_ino] and not answer["marks"]:
        return held(f"{how}: the top is the jail's own root")
    return reached(f"{how}: the top is another directory", **answer)


def chroot_and_climb(world: World) -> Result:
    def work() -> dict[str, Any]:
        os.chdir("/")
        os.chroot("/dev")
        return climb(world)

    return judged("chroot and `..`", in_child(work))


def chroot_and_fchdir(world: World) -> Result:
    def work() -> dict[str, Any]:
        kept = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        os.chroot("/dev")
        os.chdir("/")
        os.fchdir(kept)
        return climb(world)

    return judged("chroot and a kept descriptor", in_child(work))


def descriptor_over_socket(world: World) -> Result:
    def work() -> dict[str, Any]:
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        sender = os.fork()
        if sender == 0:
            directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [directory]))
            other.sendmsg([b"x"], [rights])
            os._exit(0)
        os.chroot("/dev")
        os.chdir("/")
        _, ancillary, _, _ = mine.recvmsg(1, socket.CMSG_SPACE(4))
        os.waitpid(sender, 0)
        os.fchdir(array.array("i", ancillary[0][2])[0])
        return climb(world)

    return judged("chroot and a passed descriptor", in_child(work))


def inherited_descriptor(world: World) -> Result:
    results = []
    for number in range(1024):
        try:
            os.fstat(number)
        except OSError:
            continue
        try:
            up = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=number)
        except OSError as error:
            results.append(held(f"openat({number}, ..): {error_name(error.errno or 0)}"))
            continue
        status = os.fstat(up)
        found = {"top": [status.st_dev, status.st_ino], "marks": []}

        def work(up: int = up) -> dict[str, Any]:
            os.fchdir(up)
            return climb(world)

        results.append(reached(f"descriptor {number} is a directory", **found | in_child(work)))
        os.close(up)
    return worst(results) if results else held("no descriptor is open")


def moved_directory(world: World) -> Result:
    with world.scratch() as place:
        if place is None:
            return skipped("no directory here can be written to")
        os.makedirs(f"{place}/root/inner")
        os.mkdir(f"{place}/out")

        def work() -> dict[str, Any]:
            ready_out, ready_in = os.pipe()
            os.chdir(f"{place}/root/inner")
            mover = os.fork()
            if mover == 0:
                os.close(ready_in)
                if os.read(ready_out, 1):
                    os.rename(f"{place}/root/inner", f"{place}/out/inner")
                os._exit(0)
            try:
                os.chroot(f"{place}/root")
                os.write(ready_in, b"x")
            finally:
                os.close(ready_in)
                os.waitpid(mover, 0)
            return climb(world)

        return judged("chroot and a directory that moves", in_child(work))


def proc_mounted(world: World) -> Result:
    with world.scratch() as place:
        if place is None:
            return skipped("no directory here can be written to")
        _, error = world.call("mount", b"proc", place.encode(), b"proc", 0, None)
        if error:
            return held(f"mount of proc: {error}")
        marks, tops = _walk(world, place)
        world.call("umount2", place.encode(), 2)
        return reached("proc can be mounted", marks=marks, tops=tops)


def _walk(world: World, proc: str) -> tuple[list[str], list[list[int]]]:
    """Through every process's root and directory."""
    own = os.stat("/")
    marks: list[str] = []
    tops: list[list[int]] = []
    for entry in os.listdir(proc):
        if not entry.isdecimal():
            continue
        for link in ("root", "cwd"):
            try:
                status = os.stat(f"{proc}/{entry}/{link}")
            except OSError:
                continue
            if (status.st_dev, status.st_ino) != (own.st_dev, own.st_ino) and link == "root":
                tops.append([status.st_dev, status.st_ino])
                marks += found_marks(opening(f"{proc}/{entry}/root{world.canary['file']}", read=4096)[1])
            if link == "cwd":
                marks += found_marks(opening(f"{proc}/{entry}/cwd/file", read=4096)[1])
        try:
            numbers = os.listdir(f"{proc}/{entry}/fd")
        except OSError:
            continue
        for number in numbers:
            marks += found_marks(opening(f"{proc}/{entry}/fd/{number}/file", read=4096)[1])
    return sorted(set(marks)), tops


def links_of_processes(world: World) -> Result:
    if not os.path.isdir("/proc/self"):
        return held("there is no /proc: ENOENT")
    marks, tops = _walk(world, "/proc")
    if marks or tops:
        return reached("root, cwd or fd of a process leads elsewhere", marks=marks, tops=tops)
    return held("root, cwd and fd of every process here: EACCES, or the own root")


PROBES = {
    "F1": chroot_and_climb,
    "F2": chroot_and_fchdir,
    "F3": descriptor_over_socket,
    "F4": inherited_descriptor,
    "F5": moved_directory,
    "F6": proc_mounted,
    "F7": links_of_processes,
}
