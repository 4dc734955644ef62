"""Start UML from its keeper. UML is always an ordinary user's, in a pid namespace that dies with the keeper."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import signal
import stat
from typing import IO, Any, NoReturn

from stockade.contain import wire
from stockade.contain.spawn import spawn
from stockade.kernel.libc import check, function, syscall

__all__ = ["Machine", "descendants", "start_machine"]

_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_ADDR_NO_RANDOMIZE = 0x0040000

_prctl = function("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)
_personality = function("personality", ctypes.c_ulong)


class Machine:
    """A running UML. `pid`: its first process, outside; `watch`: a descriptor that wakes when it may have ended.

    `lacked_memory`, once it has: how many processes the host's kernel killed at the memory limit of the jail around it.
    """

    def __init__(
        self, pid: int, watch: int, *, leash: int | None = None, init: int | None = None, report: IO[str] | None = None
    ) -> None:
        self.pid = init if init is not None else pid
        self.watch = watch
        self.code: int | None = None
        self.ended = False
        self.lacked_memory = 0
        self._child = pid
        self._leash = leash
        self._report = report
        self.least = 1 << 20

    def reap(self) -> None:
        """See whether it has ended."""
        pid, status = os.waitpid(self._child, os.WNOHANG)
        if pid:
            self._is_over(status)

    def _is_over(self, status: int) -> None:
        self.code = os.waitstatus_to_exitcode(status)
        self.ended = True
        if self._report is not None:
            with self._report:
                for line in self._report:
                    word, _, rest = line.partition(" ")
                    if word == "memory":
                        self.lacked_memory += int(rest)

    def kill(self) -> None:
        """End it and every process of it: with its first process the kernel ends the namespace."""
        if self.ended:
            return
        if self._leash is not None:
            os.close(self._leash)
            self._leash = None
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
        self._is_over(os.waitpid(self._child, 0)[1])

    def processes(self) -> list[int]:
        """Every process of the machine: those of the pid namespace are descendants of the child."""
        return descendants(self._child)

    def memory(self) -> str:
        """Path of the guest's memory, a file without a name that its processes hold; "" if there is none."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{pid}/fd"):
                    path = f"/proc/{pid}/fd/{number}"
                    if os.readlink(path).endswith(" (deleted)"):
                        status = os.stat(path)
                        if stat.S_ISREG(status.st_mode) and status.st_nlink == 0 and status.st_size >= self.least:
                            return path
        return ""


def descendants(pid: int) -> list[int]:
    """A process and all that come from it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{task}/children", encoding="ascii") as file:
                    found += [int(word) for word in file.read().split()]
    return found


def start_machine(orders: dict[str, Any], given: list[int]) -> Machine:
    """Start UML with the descriptors `given` as 3, 4, … on its CPU and without address randomisation."""
    before = os.sched_getaffinity(0)
    persona = _personality(0xFFFFFFFF)
    if orders["cpu"] is not None:
        os.sched_setaffinity(0, {orders["cpu"]})
    _personality(persona | _ADDR_NO_RANDOMIZE)
    try:
        output = os.open(orders["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if orders["plan"] is not None:
                return _walled(orders, given, output)
            return _plain(orders, given, output)
        finally:
            os.close(output)
    finally:
        _personality(persona)
        os.sched_setaffinity(0, before)


def _walled(orders: dict[str, Any], given: list[int], output: int) -> Machine:
    """Behind the walls of a compiled plan, by the warden; it ends the jail when the leash's other end closes."""
    status_reader, status_writer = os.pipe()
    leash_reader, leash_writer = os.pipe()
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    records = [
        wire.text(wire.BASE, orders["base"]),
        wire.text(wire.ARGV, *orders["argv"]),
        *(wire.record(wire.PASS, number, 3 + place) for place, number in enumerate(given)),
        wire.record(wire.STATUS, status_writer),
        wire.record(wire.LEASH, leash_reader),
        wire.record(wire.LIFELINE),
        *(bytes.fromhex(text) for text in orders["records"]),
    ]
    try:
        pid = spawn(
            orders["plan"], records, streams=(null, output, output), inherit=(*given, status_writer, leash_reader),
            wrapper=orders.get("wrapper", ()),
        )  # fmt: skip
    finally:
        for number in (status_writer, leash_reader, null):
            os.close(number)
    init = None
    report = open(status_reader, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 - the machine's from here on
    for line in report:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "init":
            init = int(rest.split()[0])
        elif word == "failed":
            os.waitpid(pid, 0)
            raise RuntimeError(f"the wall around the guest could not be made: {rest}")
        elif word == "exec":
            return Machine(pid, os.pidfd_open(pid), leash=leash_writer, init=init, report=report)
    os.waitpid(pid, 0)
    raise RuntimeError("the wall around the guest could not be made: the warden ended early")


def _plain(orders: dict[str, Any], given: list[int], output: int) -> Machine:
    """Without a jail: another user and a pid namespace, and nothing else."""
    root = os.geteuid() == 0
    go_reader, go_writer = os.pipe()
    # As the last pair may stand at the numbers that the child needs, everything is moved up first.
    high = [_moved_up(number) for number in (output, *given)]
    flags = signal.SIGCHLD | _CLONE_NEWPID | (0 if root else _CLONE_NEWUSER)
    zero = ctypes.c_ulong(0)
    uid, gid = os.geteuid(), os.getegid()
    pid = check(syscall(_CLONE[platform.machine()], ctypes.c_ulong(flags), zero, zero, zero, zero), "clone")
    if pid == 0:
        os.close(go_writer)
        _become(orders, high, go_reader, root)
    for number in high:
        os.close(number)
    os.close(go_reader)
    if not root:
        # user_namespaces(7): the one own id, after setgroups is given up.
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/{pid}/{file}", "w", encoding="ascii") as target:
                target.write(text)
    os.write(go_writer, b"g")
    os.close(go_writer)
    return Machine(pid, os.pidfd_open(pid))


def _moved_up(number: int) -> int:
    return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 64)


def _become(orders: dict[str, Any], high: list[int], go: int, root: bool) -> NoReturn:
    """In the child: become UML. Nothing is imported and nothing returns."""
    try:
        if os.read(go, 1) != b"g":
            os._exit(125)
        if root:
            os.setgroups([])
            os.setresgid(orders["gid"], orders["gid"], orders["gid"])
            os.setresuid(orders["uid"], orders["uid"], orders["uid"])
        # A change of ids clears the death signal, so it comes after.
        check(_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(high[0], 1)
        os.dup2(high[0], 2)
        for place, number in enumerate(high[1:]):
            os.dup2(number, 3 + place)
        os.closerange(3 + len(high) - 1, 4096)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.execve(orders["argv"][0], orders["argv"], orders["environment"])
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(125)
