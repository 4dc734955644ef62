"""Who speaks with a guest's keeper: one request in a line of JSON, then what that request is about."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import time
from typing import TYPE_CHECKING, Any

from . import frames

if TYPE_CHECKING:
    from .keeper import Keeper

__all__ = ["Client", "Clients"]

_READ = 65536
_LINE_MOST = 1 << 20
_BACKLOG_MOST = 1 << 20
_SESSIONS = 65536


class Client:
    """One connection. `mode` is what it is used for: "request", "exec", "console", "hold", "disk", "wait"."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.mode = "request"
        self.session: int | None = None
        self.disk = ""
        self.reader = frames.Reader()
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.ending = False


class Clients:
    """All connections of a keeper."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._all: set[Client] = set()
        self._sessions: dict[int, Client | None] = {}
        self._next = 1
        self._listener: socket.socket | None = None
        self._path = ""

    def listen(self, directory: str) -> None:
        """Open `control` in `directory`."""
        self._path = f"{directory}/control"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # sun_path holds 108 bytes: a descriptor's name is short wherever the directory lies.
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        mask = os.umask(0o177)
        try:
            self._listener.bind(f"/proc/self/fd/{descriptor}/control")
        finally:
            os.umask(mask)
            os.close(descriptor)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._keeper.selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def leash(self, descriptor: int) -> None:
        """End the guest when the other end of this pipe closes."""

        def pulled(_: int) -> None:
            self._keeper.selector.unregister(descriptor)
            self._keeper.stop(self._keeper.orders["stop_s"])

        self._keeper.selector.register(descriptor, selectors.EVENT_READ, pulled)

    def _accept(self, _: int) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            connection, _address = self._listener.accept()
            client = Client(connection)
            self._all.add(client)
            self._keeper.selector.register(
                connection, selectors.EVENT_READ, lambda mask, client=client: self._event(client, mask)
            )

    def _event(self, client: Client, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush(client)
        if mask & selectors.EVENT_READ and client in self._all:
            try:
                data = client.socket.recv(_READ)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self._take(client, data)
            else:
                self._gone(client)

    def _take(self, client: Client, data: bytes) -> None:
        if client.mode == "request":
            client.incoming += data
            line, newline, rest = client.incoming.partition(b"\n")
            if not newline:
                if len(client.incoming) > _LINE_MOST:
                    self._gone(client)
                return
            client.incoming = bytearray()
            try:
                request = json.loads(line)
            except ValueError:
                self._gone(client)
                return
            self._request(client, request)
            data = bytes(rest)
            if not data or client not in self._all:
                return
        if client.mode == "exec":
            try:
                for kind, _, payload in client.reader.feed(data):
                    if client.session is not None and kind != frames.EXEC:
                        self._keeper.send(frames.pack(kind, client.session, payload))
            except ValueError:
                self._gone(client)
        elif client.mode == "console":
            self._keeper.type(data)
        elif client.mode in ("hold", "disk"):
            self._gone(client)

    def _request(self, client: Client, request: dict[str, Any]) -> None:
        keeper = self._keeper
        try:
            answer = self._carry_out(client, request)
        except Exception as error:
            self._answer(client, {"error": getattr(error, "message", str(error)), "hint": getattr(error, "hint", None)})
            client.ending = True
            self._flush(client)
            return
        if answer is not None:
            self._answer(client, answer)
            if client.mode == "request":
                client.ending = True
                self._flush(client)
        if client.mode == "exec" and client.session is not None:
            terminal = request.get("terminal")
            keeper.send(
                frames.execute(
                    client.session, request["argv"], environment=request.get("environment", {}),
                    directory=request.get("directory", "/"), uid=request.get("uid", 0), gid=request.get("gid", 0),
                    terminal=None if terminal is None else (terminal[0], terminal[1]),
                )
            )  # fmt: skip

    def _carry_out(self, client: Client, request: dict[str, Any]) -> dict[str, Any] | None:
        keeper = self._keeper
        match request.get("do"):
            case "status":
                assert keeper.machine is not None
                return {"pid": keeper.machine.pid, "ready": keeper.ready, "frozen": keeper.frozen,
                        "service": keeper.service, "status": keeper.status, "since": time.monotonic() - keeper.began,
                        "processes": keeper.machine.processes(),
                        "helpers": keeper.helpers.pids()}  # fmt: skip
            case "mconsole":
                return {"answer": keeper.mconsole(str(request["command"]))}
            case "exec":
                if not keeper.orders["line"]:
                    raise RuntimeError("this guest has a PID 1 of its own: no commands can be run in it from outside")
                if keeper.frozen:
                    raise RuntimeError("the guest is frozen")
                client.mode, client.session = "exec", self._number()
                self._sessions[client.session] = client
                return {"session": client.session}
            case "console":
                client.mode = "console"
                return {}
            case "hold":
                was = keeper.frozen
                keeper.freeze()
                client.mode = "request" if was else "hold"
                return {"frozen": True, "memory": keeper.machine.memory() if keeper.machine else ""}
            case "attach":
                client.disk = keeper.disks.attach(str(request["file"]))
                client.mode = "disk"
                return {"device": f"/dev/{client.disk}"}
            case "freeze":
                keeper.freeze()
                return {}
            case "thaw":
                keeper.thaw()
                return {}
            case "service":
                keeper.send(frames.pack(frames.SERVICE, 0))
                return {}
            case "stop":
                client.mode = "wait"
                keeper.stop(float(request.get("timeout_s", keeper.orders["stop_s"])))
                return None
            case "kill":
                client.mode = "wait"
                keeper.kill()
                return None
            case "wait":
                client.mode = "wait"
                return None
            case "wire":
                return self._wire(client, str(request["peer"]))
        raise RuntimeError("unknown request")

    def _wire(self, client: Client, peer: str) -> dict[str, Any]:
        """Both ends of the wire to `peer`, that guest's first, once more for each of its starts."""
        orders = self._keeper.orders
        if peer not in orders["far_ends"]:
            raise RuntimeError(f"there is no wire to `{peer}`")
        ends = [int(orders["far_ends"][peer]), int(orders["wires"][orders["peers"].index(peer)])]
        client.socket.setblocking(True)
        socket.send_fds(client.socket, [b"w"], ends)
        client.socket.setblocking(False)
        return {}

    def _number(self) -> int:
        for _ in range(_SESSIONS):
            self._next = self._next % (_SESSIONS - 1) + 1
            if self._next not in self._sessions:
                return self._next
        raise RuntimeError("too many commands at once")

    def frame(self, kind: int, session: int, payload: bytes) -> None:
        """Pass a frame of the guest on to the client whose command it is about."""
        client = self._sessions.get(session)
        if client is not None:
            self._write(client, frames.pack(kind, 0, payload))
        elif kind in (frames.STDOUT, frames.STDERR) and session in self._sessions:
            self._keeper.send(frames.pack_number(frames.CREDIT, session, len(payload)))
        if kind == frames.EXIT and session in self._sessions:
            del self._sessions[session]
            if client is not None:
                client.ending = True
                self._flush(client)

    def console(self, data: bytes) -> None:
        """Pass what the console says to those who watch it."""
        for client in list(self._all):
            if client.mode == "console":
                self._write(client, data)

    def finish(self, last: dict[str, Any]) -> None:
        """The guest has ended: answer those who wait, as long as they listen, and take the socket away."""
        for client in list(self._all):
            client.socket.settimeout(1.0)
            with contextlib.suppress(OSError):
                if client.mode == "wait":
                    client.outgoing += json.dumps(last).encode() + b"\n"
                client.socket.sendall(client.outgoing)
            client.socket.close()
        if self._listener is not None:
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def _answer(self, client: Client, answer: dict[str, Any]) -> None:
        self._write(client, json.dumps(answer).encode() + b"\n")

    def _write(self, client: Client, data: bytes) -> None:
        client.outgoing += data
        self._flush(client)
        if len(client.outgoing) > _BACKLOG_MOST:
            self._gone(client)

    def _flush(self, client: Client) -> None:
        if client not in self._all:
            return
        try:
            while client.outgoing:
                del client.outgoing[: client.socket.send(client.outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            self._gone(client)
            return
        if client.ending and not client.outgoing:
            self._gone(client)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outgoing else 0)
        self._keeper.selector.modify(client.socket, events, lambda mask: self._event(client, mask))

    def _gone(self, client: Client) -> None:
        if client not in self._all:
            return
        self._all.discard(client)
        self._keeper.selector.unregister(client.socket)
        client.socket.close()
        session = client.session
        if session is not None and session in self._sessions:
            self._sessions[session] = None
            # As a terminal that hangs up; what does not heed it is ended.
            for number in (1, 9):
                self._keeper.send(frames.pack_number(frames.SIGNAL, session, number))
        if client.mode == "disk":
            self._keeper.detach(client.disk)
        if client.mode == "hold":
            with contextlib.suppress(Exception):
                self._keeper.thaw()
