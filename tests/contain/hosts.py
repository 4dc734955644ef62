"""Two hosts on one machine: network namespaces of the test's own, joined by a cable. Nothing leaves them."""

from __future__ import annotations

import subprocess
import sys
import time
from types import TracebackType

HOST, PEER, SECOND = "10.77.0.1", "10.77.0.2", "10.88.0.1"
HOST6, PEER6 = "fd77::1", "fd77::2"

_SETUP = f"""
ip link set lo up
ip link add cable type veth peer name cable netns $1
ip addr add {HOST}/24 dev cable; ip -6 addr add {HOST6}/64 dev cable nodad; ip link set cable up
ip link add second type veth peer name third; ip link set third up
ip addr add {SECOND}/24 dev second; ip link set second up
nsenter --target $1 --net sh -c '
ip link set lo up
ip addr add {PEER}/24 dev cable; ip -6 addr add {PEER6}/64 dev cable nodad; ip link set cable up'
# A new IPv6 address is of no use until its duplicates were looked for (RFC 4862).
for turn in $(seq 50); do ip -6 addr show tentative | grep -q inet6 || break; sleep 0.1; done
ip route add default via {PEER}; ip -6 route add default via {PEER6}
"""

SERVER = """
import socket, sys, threading
def serve(family, address, port, text):
    listener = socket.create_server((address, port), family=family)
    while True:
        client, peer = listener.accept()
        client.sendall(text)
        client.close()
for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    threading.Thread(target=serve, args=(family, address, int(sys.argv[1]), sys.argv[2].encode()), daemon=True).start()
print("up", flush=True)
sys.stdin.read()
"""

# Answers each question for an IPv4 address with 10.9.8.7 (RFC 1035, section 4).
RESOLVER = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 53))
print("up", flush=True)
while True:
    query, client = server.recvfrom(512)
    end = query.index(b"\\0", 12) + 5
    wanted = int.from_bytes(query[end - 4:end - 2])
    answer = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\0\\0\\4\\x0a\\x09\\x08\\x07" if wanted == 1 else b""
    head = query[:2] + b"\\x81\\x80\\0\\1" + (b"\\0\\1" if answer else b"\\0\\0") + b"\\0\\0\\0\\0"
    server.sendto(head + query[12:end] + answer, client)
"""


class TwoHosts:
    """`host` and `peer` are processes whose network namespaces are those of the two hosts."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> TwoHosts:
        try:
            self.host, self.peer = self._namespace(), self._namespace()
            self.run(self.host, "sh", "-ec", _SETUP, "sh", str(self.peer))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.communicate(timeout=5)

    def _namespace(self) -> int:
        process = self._start(["unshare", "--net", "sh", "-c", "echo up; exec sleep 600"])
        return process.pid

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._processes.append(process)
        assert process.stdout is not None
        if process.stdout.readline() != "up\n":
            raise AssertionError(process.communicate(timeout=5)[1])
        return process

    def serve(self, where: int, port: int, text: str) -> None:
        """A server on every address of the host `where` that says `text` to whoever connects."""
        self._start(["nsenter", f"--net=/proc/{where}/ns/net", sys.executable, "-c", SERVER, str(port), text])

    def resolve(self, where: int, address: str) -> None:
        """A resolver on `address` of the host `where`."""
        self._start(["nsenter", f"--net=/proc/{where}/ns/net", sys.executable, "-c", RESOLVER, address])

    def run(self, where: int, *command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command on the host `where`; AssertionError with what it said unless it succeeds."""
        done = self.attempt(where, *command, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done

    def attempt(self, where: int, *command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command on the host `where`."""
        return subprocess.run(
            ["nsenter", f"--net=/proc/{where}/ns/net", *command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip


def wait_for(condition: object, seconds: float = 5) -> bool:
    """Whether a callable comes true in time."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
