"""The first process of a view: makes the namespaces, then starts and reaps what it is told. Chooses nothing.

Runs as a program of its own (`main`), so that a view can be opened from any thread of a large process.
When the channel to the caller closes it ends, and the kernel ends everything in its pid namespace.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import stat
import sys
from typing import Any, NoReturn

from ..kernel import beneath
from ..kernel.listening import listener
from ..kernel.mount import (
    AT_EMPTY_PATH,
    AT_RECURSIVE,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    MS_REC,
    OPEN_TREE_CLONE,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
)
from ..kernel.namespaces import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    loopback_address,
    loopback_up,
    setns,
    unshare,
)
from ..records.publish import FIRST_GIVEN
from .protocol import Message, receive, send
from .seeding import place, plant
from .viewtree import ROOT_LINK, TRACE_DIRECTORY, Tree

__all__ = ["main"]

_PRIORITY = re.compile(rb"^<[0-9]{1,3}>")


def main(descriptor: int) -> NoReturn:
    """Make a view as the first message on `descriptor` says, and serve it until the channel closes."""
    os.set_inheritable(descriptor, False)  # whoever has it orders this process about
    channel = socket.socket(fileno=descriptor)
    order, received = receive(channel)
    given = dict(zip(order["descriptors"], received, strict=True))
    step = "namespaces"
    try:
        _user_namespace(order, given, channel)
        root = _service_root(given["mount"]) if "mount" in given else None
        if "network" in given:
            setns(given["network"], CLONE_NEWNET)
        unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | (0 if "network" in given else CLONE_NEWNET))
        step = "mounts"
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        if "network" not in given:
            loopback_up()
    except OSError as error:
        _fail(channel, step, error)
    pid = os.fork()
    if pid:
        channel.close()
        os.waitpid(pid, 0)
        os._exit(0)
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tree = Tree(
            ordinary=order["ordinary"],
            new_network="network" not in given,
            seeds=order["seeds"],
            service_root=root,
        )
        scratch = tree.build()
        log = os.open(f"{TRACE_DIRECTORY}/log", os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
        # A service that has given up root opens /dev/stderr, which is this file, by name.
        os.fchmod(log, 0o666)
        init = _Init(channel, log)
    except OSError as error:
        _fail(channel, "mounts", error)
    send(channel, {"ready": True}, (scratch, log, os.pidfd_open(1)))
    init.serve()


def _fail(channel: socket.socket, step: str, error: OSError) -> NoReturn:
    send(channel, _failure(step, error))
    os._exit(1)


def _failure(step: str, error: OSError) -> Message:
    return {
        "error": step,
        "errno": error.errno or 0,
        "text": error.strerror or str(error),
        "path": error.filename or "",
    }


def _user_namespace(order: Message, given: dict[str, int], channel: socket.socket) -> None:
    if "user" in given:
        setns(given["user"], CLONE_NEWUSER)
        if _maps_zero():
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        return
    if not order["ordinary"]:
        return
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    if order["range"]:
        send(channel, {"unshared": True})
        receive(channel)
        return
    # user_namespaces(7): without a helper only the own id can be mapped, after setgroups is given up.
    inner_uid, inner_gid = order["single"]
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inner_uid} {uid} 1"), ("gid_map", f"{inner_gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _maps_zero() -> bool:
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return any(line.split()[0] == "0" for line in file)


def _service_root(namespace: int) -> int:
    """A detached, read-only copy of the mount tree that is `/` of another mount namespace."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pid = os.fork()
    if pid == 0:
        try:
            setns(namespace, CLONE_NEWNS)
            tree = open_tree(None, "/", OPEN_TREE_CLONE | AT_RECURSIVE)
            mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, attr_set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
            send(theirs, {}, (tree,))
        except OSError as error:
            send(theirs, _failure("service root", error))
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        message, descriptors = receive(ours)
    os.waitpid(pid, 0)
    if not descriptors:
        raise OSError(message["errno"], f"service root: {message['text']}", message["path"])
    return descriptors[0]


class _Init:
    """PID 1: answers requests in order, reaps every orphan, writes what comes to /dev/log into the log."""

    def __init__(self, channel: socket.socket, log: int) -> None:
        self._channel = channel
        self._log = log
        self._status: dict[int, int] = {}
        self._wake_out, wake_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_in)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._syslog.bind("/dev/log")
        os.chmod("/dev/log", 0o666)

    def serve(self) -> NoReturn:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._wake_out, select.POLLIN)
        poll.register(self._syslog, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._channel.fileno():
                    try:
                        self._answer()
                    except (EOFError, ConnectionError):
                        os._exit(0)
                elif descriptor == self._wake_out:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_out, 4096)
                    self._reap()
                else:
                    os.write(self._log, _PRIORITY.sub(b"", self._syslog.recv(65536)).rstrip(b"\n\0") + b"\n")

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            descriptor = self._status.pop(pid, None)
            if descriptor is not None:
                # EPIPE: the caller has stopped waiting.
                with contextlib.suppress(BrokenPipeError):
                    os.write(descriptor, json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                os.close(descriptor)

    def _answer(self) -> None:
        request, descriptors = receive(self._channel)
        operation = getattr(self, "_do_" + request.pop("do"))
        try:
            answer, passed = operation(request, descriptors)
        except OSError as error:
            answer, passed = _failure("request", error), ()
        send(self._channel, answer, passed)
        for descriptor in passed:
            os.close(descriptor)

    def _do_spawn(self, request: Message, descriptors: list[int]) -> tuple[Message, tuple[int, ...]]:
        standard, (status, gate), sockets = descriptors[:3], descriptors[3:5], descriptors[5:]
        pid = os.fork()
        if pid == 0:
            _become(request, standard, sockets, status, gate)
        self._status[pid] = status
        for descriptor in (*standard, gate, *sockets):
            os.close(descriptor)
        return {"pid": pid}, (os.pidfd_open(pid),)

    def _do_seed(self, request: Message, _: list[int]) -> tuple[Message, tuple[int, ...]]:
        for seed in request["seeds"]:
            plant(seed)
        return {}, ()

    def _do_socket(self, request: Message, _: list[int]) -> tuple[Message, tuple[int, ...]]:
        """Show a socket of the service's root at its own path, where nothing stands.

        Its name is the service's choice, of which clients must get nothing but a socket: the inode is mounted, no
        link is made that leads to whatever stands there later.
        """
        path = place(request["path"])
        with contextlib.ExitStack() as stack:
            root = os.open(ROOT_LINK, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, root)
            found = beneath.openat2(root, request["path"], os.O_PATH | os.O_CLOEXEC, resolve=beneath.RESOLVE_IN_ROOT)
            stack.callback(os.close, found)
            if stat.S_ISSOCK(os.fstat(found).st_mode) and not os.path.lexists(path):
                tree = open_tree(found, "", OPEN_TREE_CLONE | AT_EMPTY_PATH)
                stack.callback(os.close, tree)
                plant({"path": path, "type": "file", "content": "", "mode": 0o600, "uid": 0, "gid": 0, "target": ""})
                move_mount(tree, path)
        return {}, ()

    def _do_listen(self, request: Message, _: list[int]) -> tuple[Message, tuple[int, ...]]:
        """Open a socket in the view's network, of an address that this gets where it lacks it, and may get it."""
        address, port, datagrams = request["address"], request["port"], request["datagrams"]
        try:
            made = listener(address, port, datagrams=datagrams)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or not request["adds"]:
                raise
            loopback_address(address)
            made = listener(address, port, datagrams=datagrams)
        return {}, (made.detach(),)

    def _do_which(self, request: Message, _: list[int]) -> tuple[Message, tuple[int, ...]]:
        name = request["name"]
        if "/" in name:
            path = _join(request["directory"], name)
            return {"path": path if os.path.exists(path) else None}, ()
        for directory in request["path"].split(":"):
            # execvp(3): an empty entry is the current directory.
            path = _join(_join(request["directory"], directory), name)
            if os.access(path, os.X_OK) and not os.path.isdir(path):
                return {"path": path}, ()
        return {"path": None}, ()

    def _do_exists(self, request: Message, _: list[int]) -> tuple[Message, tuple[int, ...]]:
        root = os.open(ROOT_LINK, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(beneath.openat2(root, request["path"], os.O_PATH, resolve=beneath.RESOLVE_IN_ROOT))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP):
                raise
            return {"exists": False}, ()
        finally:
            os.close(root)
        return {"exists": True}, ()

    def _do_processes(self, _: Message, __: list[int]) -> tuple[Message, tuple[int, ...]]:
        found = map(_process, filter(str.isdecimal, os.listdir("/proc")))
        return {"processes": [process for process in found if process is not None]}, ()

    def _do_kill(self, request: Message, _: list[int]) -> tuple[Message, tuple[int, ...]]:
        with contextlib.suppress(ProcessLookupError):
            # pid -1 from PID 1 is every process of the view but itself (kill(2)).
            os.kill(request["pid"], request["signal"])
        return {}, ()


def _join(directory: str, path: str) -> str:
    return path if path.startswith("/") else f"{directory}/{path}"


def _process(name: str) -> Message | None:
    try:
        with open(f"/proc/{name}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    command = text[text.index(b"(") + 1 : text.rindex(b")")]
    fields = text[text.rindex(b")") + 2 :].split()
    return {
        "pid": int(name),
        "parent": int(fields[1]),
        "state": fields[0].decode(),
        "command": os.fsdecode(command),
        "ticks": int(fields[11]) + int(fields[12]),
    }


def _become(request: dict[str, Any], standard: list[int], sockets: list[int], status: int, gate: int) -> NoReturn:
    """In the child: take on everything that `request` says and execute its program."""
    step = "start"
    try:
        # Beyond the numbers that are passed on, and no higher: the limit of open files may be low.
        first_free = FIRST_GIVEN + len(sockets)
        status, gate, *sockets = (
            fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, first_free) for descriptor in (status, gate, *sockets)
        )
        environment = dict(request["environment"])
        if sockets:
            environment["LISTEN_PID"] = str(os.getpid())
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        for target, descriptor in enumerate(standard):
            os.dup2(descriptor, target)
        for target, descriptor in enumerate(sockets, FIRST_GIVEN):
            os.dup2(descriptor, target)
        os.umask(request["umask"])
        step = "directory"
        os.chdir(request["directory"])
        step = "affinity"
        if request["processor"] is not None:
            os.sched_setaffinity(0, {request["processor"]})
        if os.read(gate, 1) == b"":
            os._exit(0)
        step = "ids"
        if request["root"]:
            # An ordinary user's view: execve(2) keeps capabilities for uid 0 only, and what follows needs them.
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        step = "execve"
        os.execve(request["program"], request["arguments"], environment)
    except OSError as error:
        os.write(status, json.dumps(_failure(step, error)).encode() + b"\n")
    finally:
        os._exit(127)


if __name__ == "__main__":
    main(int(sys.argv[1]))
