"""A throwaway copy-on-write view of the host, to run a service or its clients in. Changes nothing on the host."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from ..errors import HostError, ObserveError, ServiceError
from ..kernel.capabilities import NAMES, last_capability
from ..kernel.namespaces import reason, refusal
from ..kernel.pidfd import pid_of
from ..kernel.userns import subordinate
from ..records.publish import variables
from ..records.seed import Seed
from . import idmap
from .hostmounts import FRESH
from .process import Process
from .protocol import Message, receive, send
from .reach import HOST_REACHING
from .seeding import SeedMessage

__all__ = ["View"]

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from stockade.observe.viewinit import main; main(int(sys.argv[2]))"
)
_OPEN_TIMEOUT_S = 30.0
_REQUEST_TIMEOUT_S = 60.0


class View:
    """One open view. Use `with View.open(…) as view`; at its end everything in it dies and vanishes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._first = -1
        self.scratch = -1
        """Descriptor of the directory that is /run/stockade/trace in the view: memory, gone with it."""
        self.log = -1
        """Descriptor of a file in it, open for appending: for the service's output, and what comes to /dev/log."""
        self._by_range = False
        self.apart = False
        """Whether /run/stockade/root is another root than the view's own: the service runs elsewhere."""
        self._own_network = True
        self.manages_ids = True
        """Whether processes can be started as other ids: root, or a user with a subordinate range."""

    @classmethod
    def open(
        cls,
        *,
        seeds: Sequence[Seed] = (),
        network_of: int | None = None,
        service_root_of: int | None = None,
        single: tuple[int, int] | None = None,
    ) -> View:
        """A new view with `seeds` written into it.

        `network_of` and `service_root_of` are host ids of a process: the view shares its network
        namespace, and shows its root, read-only, at /run/stockade/root (a link to `/` otherwise). `single` is
        what an ordinary user without a range has as uid and gid, instead of the own ones. HostError where this host
        allows no view.
        """
        view = cls()
        view.apart = service_root_of is not None
        try:
            view._start(seeds, network_of, service_root_of, single or (os.geteuid(), os.getegid()))
        except BaseException:
            view.close()
            raise
        return view

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the view, and the view."""
        if self._first >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._helper is not None:
            try:
                self._helper.wait(_OPEN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._helper.kill()
                self._helper.wait()
            self._helper = None
        for name in ("_first", "scratch", "log"):
            descriptor = getattr(self, name)
            if descriptor >= 0:
                os.close(descriptor)
                setattr(self, name, -1)

    def _start(
        self, seeds: Sequence[Seed], network_of: int | None, service_root_of: int | None, single: tuple[int, int]
    ) -> None:
        ordinary = os.geteuid() != 0
        ids = subordinate() if ordinary and network_of is None else None
        self.manages_ids = not ordinary or ids is not None
        self._by_range = ids is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel = ours
        ours.settimeout(_OPEN_TIMEOUT_S)
        paths = json.dumps([os.path.abspath(path) for path in sys.path])
        with contextlib.ExitStack() as stack, theirs:
            errors = os.memfd_create("stockade-view")
            stack.callback(os.close, errors)
            given: dict[str, int] = {}
            for name, kind, pid in (("network", "net", network_of), ("mount", "mnt", service_root_of)):
                if pid is not None:
                    given[name] = _namespace(pid, kind)
                    stack.callback(os.close, given[name])
            if "network" in given:
                self._own_network = os.fstat(given["network"]).st_ino != os.stat("/proc/self/ns/net").st_ino
            if ordinary and network_of is not None:
                # setns(2) into a network namespace takes CAP_SYS_ADMIN in the user namespace that owns it.
                given["user"] = _namespace(network_of, "user")
                stack.callback(os.close, given["user"])
            self._helper = subprocess.Popen(
                [sys.executable or "/usr/bin/python3", "-I", "-S", "-c", _BOOT, paths, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            )
            theirs.close()
            order = {
                "descriptors": list(given),
                "ordinary": ordinary,
                "range": ids is not None,
                "single": single,
                "seeds": [_message(seed) for seed in seeds],
            }
            try:
                send(ours, order, tuple(given.values()))
                answer, descriptors = receive(ours)
                if "unshared" in answer and ids is not None:
                    idmap.apply(self._helper.pid, ids, uid=os.geteuid(), gid=os.getegid())
                    send(ours, {})
                    answer, descriptors = receive(ours)
            except (EOFError, ConnectionError, TimeoutError) as error:
                self._helper.kill()
                self._helper.wait()
                raise ObserveError(
                    f"the helper process of the view failed: {_tail(errors) or error}",
                    hint="this is a fault of Stockade or of its installation; report it with `-vv`",
                ) from error
        if "error" in answer:
            raise _host_error(answer)
        self.scratch, self.log, self._first = descriptors
        if "user" in given:
            self.manages_ids = True
        ours.settimeout(_REQUEST_TIMEOUT_S)

    @property
    def pid(self) -> int:
        """Host id of the view's first process."""
        return pid_of(self._first)

    def _request(self, do: str, descriptors: tuple[int, ...] = (), **message: Any) -> tuple[Message, list[int]]:
        with self._lock:
            if self._channel is None:
                raise ObserveError("the view is closed")
            try:
                send(self._channel, {"do": do, **message}, descriptors)
                answer, received = receive(self._channel)
            except (EOFError, ConnectionError, TimeoutError) as error:
                raise ObserveError(f"the first process of the view is gone: {error}") from error
        if "error" in answer:
            raise OSError(answer["errno"], answer["text"], answer["path"] or None)
        return answer, received

    def seed(self, seeds: Iterable[Seed]) -> None:
        """Write more files, resolved inside the view; OSError names what could not be written."""
        self._request("seed", seeds=[_message(seed) for seed in seeds])

    def show_socket(self, path: str) -> None:
        """Show the socket `path` of the service's root at the same path here, unless something stands there.

        OSError where the root has no such path, or it cannot be mounted.
        """
        self._request("socket", path=path)

    def listen(self, address: str, port: int, *, datagrams: bool) -> int:
        """A socket in the view's network, bound to a numeric address and a port, for a service to take over.

        An address that a network of its own lacks is given to its loopback; the host's is left as it is. OSError where
        it cannot be bound.
        """
        return self._request("listen", address=address, port=port, datagrams=datagrams, adds=self._own_network)[1][0]

    def exists(self, path: str) -> bool:
        """Whether `path` is there, as the service's root has it."""
        return bool(self._request("exists", path=path)[0]["exists"])

    def which(self, program: str, *, environment: Mapping[str, str], directory: str = "/") -> str | None:
        """The path that execvp(3) would execute for `program`, None if there is none."""
        path = environment.get("PATH", os.defpath)
        found: str | None = self._request("which", name=program, path=path, directory=directory)[0]["path"]
        return found

    def processes(self) -> list[Message]:
        """Every process: `pid` and `parent` as the view has them, `state`, `command`, and `ticks` of CPU time."""
        found: list[Message] = self._request("processes")[0]["processes"]
        return found

    def kill(self, inner: int, number: int) -> None:
        """Send a signal to the process with that id in the view, -1 for all; nothing happens if it is gone."""
        self._request("kill", pid=inner, signal=int(number))

    def spawn(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: str = "/",
        uid: int | None = None,
        gid: int | None = None,
        groups: Sequence[int] = (),
        umask: int = 0o022,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        before: Sequence[str] = (),
        processor: int | None = None,
        gate: int | None = None,
        services: bool = True,
        sockets: Sequence[int] = (),
    ) -> Process:
        """Start a program; descriptors left out are /dev/null, ids left out the view's own.

        With `services` it has none of the capabilities in HOST_REACHING. `before` is a command that
        executes the rest of its arguments (a tracer). `processor` pins it to one CPU. With a `gate` it waits, still
        with every right, until a byte can be read from that descriptor, and ends if it closes. `sockets` it gets as 3,
        4, …, and is told so as `records.publish.variables` has it. ServiceError where there is no such program.
        """
        program = self.which(arguments[0], environment=environment, directory=directory)
        if program is None:
            raise _no_program(arguments[0], environment)
        if self._by_range and uid is None:
            # As root's clients: they read what is the service's alone, and what the caller may read.
            uid = gid = 0
        command = [*before, *self._prefix(uid, gid, groups, services=services), program, *arguments[1:]]
        launched = self._program(command[0], environment) if before else command[0]
        with contextlib.ExitStack() as stack:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            status_out, status_in = os.pipe()
            ours_out, ours_in = os.pipe()
            for descriptor in (null, status_in, ours_out, ours_in):
                stack.callback(os.close, descriptor)
            standard = tuple(null if given is None else given for given in (stdin, stdout, stderr))
            failed = stack.enter_context(contextlib.ExitStack())
            failed.callback(os.close, status_out)
            answer, descriptors = self._request(
                "spawn",
                (*standard, status_in, ours_out if gate is None else gate, *sockets),
                program=launched,
                arguments=command if launched != program else [*arguments],
                environment={**environment, **(variables(len(sockets)) if sockets else {})},
                directory=directory,
                umask=umask,
                processor=processor,
                root=self._by_range,
            )
            # It waits at its gate, so that it cannot end before its id on the host is known.
            process = Process(pidfd=descriptors[0], inner=answer["pid"], status=status_out)
            failed.pop_all()
            os.write(ours_in, b"g")
        return process

    def _program(self, name: str, environment: Mapping[str, str]) -> str:
        found = self.which(name, environment={"PATH": f"{os.defpath}:/usr/sbin:/sbin"}) or self.which(
            name, environment=environment
        )
        if found is None:
            raise HostError(f"`{name}` is not installed", hint="install it: `apt-get install util-linux`")
        return found

    def _prefix(self, uid: int | None, gid: int | None, groups: Sequence[int], *, services: bool) -> list[str]:
        """setpriv(1) arguments that take on the ids and leave the capabilities that reach the host."""
        if not self.manages_ids:
            return []
        options = []
        if services:
            # setpriv knows `cap_N` for those that it is too old to have a name for.
            last = last_capability()
            numbers = (number for number, name in enumerate(NAMES) if name in HOST_REACHING and number <= last)
            options += ["--bounding-set", ",".join(f"-cap_{number}" for number in numbers), "--inh-caps", "-all"]
        if gid is not None:
            options += ["--regid", str(gid)]
            options += ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
        if uid is not None:
            options += ["--reuid", str(uid)]
        return [self._program("setpriv", {}), *options, "--"] if options else []


def _no_program(name: str, environment: Mapping[str, str]) -> ServiceError:
    fresh = next((top for top in FRESH if name.startswith(f"{top}/")), None)
    if fresh is not None:
        hint = f"`{fresh}` is empty in the view of the host: move the program elsewhere, for example to `/opt`"
    elif "/" in name:
        hint = "look at its path and mode"
    else:
        hint = f"searched in `{environment.get('PATH', os.defpath)}`; give the whole path in `command`"
    return ServiceError(f"cannot run `{name}`: there is no such program", hint=hint)


def _namespace(pid: int, kind: str) -> int:
    path = f"/proc/{pid}/ns/{kind}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ObserveError(
            f"cannot open the namespaces of process {pid}: {error.strerror}",
            hint="the process has ended, or belongs to another user",
        ) from error


def _message(seed: Seed) -> SeedMessage:
    return {
        "path": seed.path,
        "type": seed.type,
        "content": base64.b64encode(seed.content).decode("ascii"),
        "mode": seed.mode,
        "uid": seed.uid,
        "gid": seed.gid,
        "target": seed.target,
    }


def _tail(descriptor: int) -> str:
    os.lseek(descriptor, 0, os.SEEK_SET)
    lines = os.read(descriptor, 1 << 20).decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


def _host_error(answer: Message) -> HostError:
    """What the helper could not do, with the cause where it is a known one."""
    code, text, path = answer["errno"], answer["text"], answer["path"]
    where = f" on `{path}`" if path else ""
    message = f"cannot make a view of the host: {text}{where}"
    if answer["error"] == "namespaces":
        return HostError(
            f"this host refuses the namespaces that a view is made of: {reason(code)}{where}", hint=refusal(code)
        )
    return HostError(message, hint=_MOUNT_HINTS.get((text.partition(":")[0], code), refusal(code)))


#: Call and errno, and what to do about it.
_MOUNT_HINTS = {
    ("overlay", errno.ENODEV): "the kernel has no overlay file system; as root: `modprobe overlay`",
    (
        "overlay",
        errno.EPERM,
    ): "an ordinary user's overlay needs Linux 5.11 and no security module that forbids it; run as root",
    ("overlay", errno.EINVAL): "the file system cannot be the lower layer of an overlay; `dmesg` says why",
    ("mount", errno.EPERM): "a container around this process hides parts of /proc or forbids mounts; run outside of it",
}
