"""nginx outside and behind the walls: requests and bytes per second, in one run.

    PYTHONPATH=src python3 benchmarks/serve.py [--runs N] [--seconds S] [--each-wall] [--json]

Needs root, nginx, wrk and passt. The same nginx with one worker and the same files serves outside, in a jail with
`network = "host"`, in one with a listening socket passed in, in one with a private network and a published port, and
outside behind plain pasta. wrk loads each with small pages over kept connections, opened for each request and, as the
recipe has it, kept open by nginx; with small pages each over a connection of its own; and with a large file.

With small pages every server has a wrk of its own, and all but one of these stand still: a turn takes 20 ms, so what
else the machine does meets all servers alike. With the large file a wrk is started and ended for each turn: one that
stands still has its buffers filled meanwhile, and these are largest where most processes lie between it and nginx.
Rates are of a wrk's own turns; ratios are medians of those of the rounds. The CPU time that nginx's worker needs for a
request stands beside: it depends on other work far less.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import measure
import msgspec

from stockade import contain, workflow
from stockade.records.spec import Spec

HOST = "127.0.0.1"
SMALL_BYTES = 1024
LARGE_BYTES = 64 << 20
SMALL = b"small page, ".ljust(SMALL_BYTES, b".")
USER = 33
INSIDE = 8080

#: What of `network = "host"` is taken away, by the option --each-wall.
LESS: dict[str, dict[str, object]] = {
    "less Landlock": {"landlock": False},
    "less filter": {"syscalls": {"preset": "none"}},
    "less both": {"landlock": False, "syscalls": {"preset": "none"}},
}
OUTSIDE, SHARED, PASSED, PRIVATE, PASTA = "outside", "network = host", "passed socket", "private", "pasta"

CONFIGURATION = """
{user}
daemon off;
worker_processes 1;
pid {run}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 512; }}
http {{
    default_type application/octet-stream;
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 10000000;
    client_body_temp_path {run}/body;
    proxy_temp_path {run}/proxy;
    fastcgi_temp_path {run}/fastcgi;
    uwsgi_temp_path {run}/uwsgi;
    scgi_temp_path {run}/scgi;
    server {{
        listen {address}:{port};
        root /{root};
        location /kept/ {{
            open_file_cache max=1000 inactive=60s;
            open_file_cache_valid 1s;
        }}
    }}
}}
"""

#: pasta refuses root, and an ordinary user may not open root's tun node: it gets one in a namespace of its own.
PASTA_SETUP = """
set -e
mount --make-rprivate /
mount -t tmpfs none /dev/net
mknod -m 0666 /dev/net/tun c 10 200
exec setpriv --reuid 33 --regid 33 --clear-groups --inh-caps=-all "$@"
"""

#: What wrk asks for: path, further arguments, what counts, seconds of a turn (None: all in one).
LOADS = {
    "small pages": ("/small", ("-c", "16"), "requests", 0.02),
    "small pages kept open": ("/kept/small", ("-c", "16"), "requests", 0.02),
    "connections": ("/small", ("-c", "16", "-H", "Connection: close"), "requests", 0.02),
    "large file": ("/large", ("-c", "4"), "MB", None),
}
UNITS = {"B": 1e-6, "KB": 1e-3, "MB": 1.0, "GB": 1e3}


@dataclass(frozen=True)
class Server:
    port: int
    worker: int  # nginx's worker process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def configuration(*, port: int, run: str, root: str, address: str = HOST, user: str = "") -> str:
    return CONFIGURATION.format(port=port, run=run, root=root.lstrip("/"), address=address, user=user)


def jail(name: str, files: Path, *, port: int, network: Mapping[str, object], **policy: object) -> str:
    """Build a jail whose nginx listens on `port`; `policy` beside its having no capability."""
    spec = {
        "name": name,
        "service": {"command": ["/usr/sbin/nginx", "-c", "/etc/nginx.conf", "-e", "stderr"], "user": "www-data"},
        "files": {"content": {"/etc/nginx.conf": configuration(port=port, run="/run/nginx", root="/srv/www")}},
        "directories": {"/run/nginx": {"owner": "www-data"}},
        "mounts": [{"source": str(files), "target": "/srv/www"}],
        "accounts": [{"name": "www-data"}],
        "network": network,
        "policy": {"capabilities": [], **policy},
    }
    workflow.build(msgspec.convert(spec, Spec), observe=False, verify=False)
    return name


@contextmanager
def outside(directory: Path, files: Path, port: int, log: IO[bytes], *, behind_pasta: bool) -> Iterator[Server]:
    """nginx on the host as www-data, or behind pasta."""
    run = directory / f"run-{port}"
    run.mkdir()
    os.chown(run, USER, USER)
    path = directory / f"{port}.conf"
    listen = INSIDE if behind_pasta else port
    # pasta's user is uid 0 of its namespace, so nginx takes itself for root.
    user = "user root;" if behind_pasta else ""
    path.write_text(configuration(port=listen, run=str(run), root=str(files), user=user))
    nginx = ["/usr/sbin/nginx", "-c", str(path), "-e", "stderr"]
    command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--inh-caps=-all", "--", *nginx]
    if behind_pasta:
        ports = ["-t", f"{HOST}/{port}:{INSIDE}", "-u", "none", "-T", "none", "-U", "none"]
        pasta = ["pasta", "--quiet", "--config-net", "--no-map-gw", *ports, "--", *nginx]
        command = ["unshare", "--mount", "sh", "-c", PASTA_SETUP, "sh", *pasta]
    process = subprocess.Popen(
        command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        ready(port, log)
        yield Server(port, child(child(process.pid)) if behind_pasta else child(process.pid))
    finally:
        stop(process, behind_pasta=behind_pasta)


def stop(process: subprocess.Popen[bytes], *, behind_pasta: bool) -> None:
    """End nginx; pasta ends with its child."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, children) if behind_pasta else (process.pid,):
        os.kill(pid, signal.SIGTERM)
    process.wait(10)


@contextmanager
def behind_walls(name: str, port: int, log: IO[bytes], sockets: tuple[int, ...] = ()) -> Iterator[Server]:
    """nginx in its jail."""
    with contain.launch(name, sockets=sockets, stdout=log.fileno(), stderr=log.fileno()) as running:
        ready(port, log)
        yield Server(port, child(running.pid))


def ready(port: int, log: IO[bytes]) -> None:
    """Wait until the small page comes, whole."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection((HOST, port), timeout=5) as client:
                client.sendall(b"GET /small HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: client.recv(65536), b""))
            if answer.endswith(SMALL):
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            log.seek(0)
            sys.exit(f"error: nothing serves on port {port}: {log.read().decode()}")
        time.sleep(0.05)


class Load:
    """One wrk on one server. It stands still but for its turns, so `rate` and `cpu_us` are of these alone."""

    def __init__(self, server: Server, load: str) -> None:
        path, options, self._counted, _ = LOADS[load]
        self._active_s = 0.0
        self._cpu_ns = 0
        self._worker = server.worker
        self._process = subprocess.Popen(
            ["wrk", "-t", "1", "-d", "10m", "--timeout", "10m", *options, f"http://{HOST}:{server.port}{path}"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        with self._measured():
            self._process.send_signal(signal.SIGCONT)
            time.sleep(seconds)
            self._process.send_signal(signal.SIGSTOP)

    def finish(self) -> None:
        """A last turn, in which wrk is told to end."""
        with self._measured():
            self._process.send_signal(signal.SIGCONT)
            output = self._interrupt()
        found = re.search(r"([0-9]+) requests in [0-9.]+m?s, ([0-9.]+)([KMG]?B) read", output)
        if found is None or self._process.returncode != 0 or "Non-2xx" in output or "Socket errors" in output:
            sys.exit(f"error: wrk says: {output}")
        done = float(found[2]) * UNITS[found[3]] if self._counted == "MB" else float(found[1])
        self.rate = done / self._active_s
        self.cpu_us = self._cpu_ns / 1e3 / done

    def _interrupt(self) -> str:
        """SIGINT until wrk has ended: the first may reach the thread that does not wait for it."""
        deadline = time.monotonic() + 60
        while True:
            self._process.send_signal(signal.SIGINT)
            try:
                return self._process.communicate(timeout=0.02)[0]
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        cpu, began = cpu_ns(self._worker), time.perf_counter()
        yield
        self._active_s += time.perf_counter() - began
        self._cpu_ns += cpu_ns(self._worker) - cpu


def cpu_ns(pid: int) -> int:
    """CPU time of a process, finer than the ticks of /proc/PID/stat."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def child(pid: int) -> int:
    """The one child of a process."""
    (only,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(only)


def in_turns(servers: Mapping[str, Server], load: str, seconds: float, order: random.Random) -> dict[str, Load]:
    """One round: every server is loaded for `seconds`, in turns so short that what else runs meets all alike."""
    *_, turn = LOADS[load]
    loads: dict[str, Load] = {}
    if turn is None:
        for way in order.sample(list(servers), len(servers)):
            loads[way] = Load(servers[way], load)
            try:
                loads[way].turn(seconds)
                loads[way].finish()
            finally:
                loads[way].kill()
        return loads
    with ExitStack() as stack:
        for way, server in servers.items():
            loads[way] = Load(server, load)
            stack.callback(loads[way].kill)
        for _ in range(round(seconds / turn)):
            for one in order.sample(list(loads.values()), len(loads)):
                one.turn(turn)
        for one in loads.values():
            one.finish()
    return loads


def each_wall(
    report: measure.Report, stack: ExitStack, servers: dict[str, Server], files: Path, log: IO[bytes],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """What Landlock and the filter cost a small page, in CPU time of nginx."""
    compared = {way: servers[way] for way in (OUTSIDE, SHARED, PASSED)}
    for number, (way, policy) in enumerate(LESS.items()):
        port = free_port()
        name = jail(f"less-{number}", files, port=port, network={"mode": "host"}, **policy)
        compared[way] = stack.enter_context(behind_walls(name, port, log))
    order = random.Random(0)
    rounds = [in_turns(compared, "small pages", options.seconds, order) for _ in range(options.runs)]
    spent = "CPU of nginx for a small page"
    report.add(spent, {way: [loads[way].cpu_us for loads in rounds] for way in compared}, unit="us", scale=1.0)
    for way in (SHARED, PASSED, *LESS):
        report.compare(spent, way, OUTSIDE)


def main() -> int:
    parser = measure.arguments(__doc__, runs=7)
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement (default %(default)s)")
    parser.add_argument("--each-wall", action="store_true", help="only small pages, with walls taken away in turn")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("error: run it as root: the services run as www-data")
    report = measure.Report("nginx, one worker")
    with measure.home() as directory, ExitStack() as stack:
        directory.chmod(0o755)
        files = directory / "www"
        files.mkdir()
        (files / "kept").mkdir()
        for path in ("small", "kept/small"):
            (files / path).write_bytes(SMALL)
        (files / "large").write_bytes(os.urandom(1 << 20) * (LARGE_BYTES >> 20))
        listener = stack.enter_context(socket.create_server((HOST, 0), backlog=511))
        ports = {way: free_port() for way in (OUTSIDE, SHARED, PRIVATE, PASTA)}
        ports[PASSED] = int(listener.getsockname()[1])
        log = stack.enter_context(tempfile.TemporaryFile())
        private = {"mode": "private"}
        published = {"mode": "private", "publish": [f"{HOST}:{ports[PRIVATE]}:{INSIDE}"]}
        shared = jail("shared", files, port=ports[SHARED], network={"mode": "host"})
        passed = jail("passed", files, port=ports[PASSED], network=private)
        jail("private", files, port=INSIDE, network=published)
        servers = {
            way: stack.enter_context(server)
            for way, server in {
                OUTSIDE: outside(directory, files, ports[OUTSIDE], log, behind_pasta=False),
                SHARED: behind_walls(shared, ports[SHARED], log),
                PASSED: behind_walls(passed, ports[PASSED], log, (listener.fileno(),)),
                PRIVATE: behind_walls("private", ports[PRIVATE], log),
                PASTA: outside(directory, files, ports[PASTA], log, behind_pasta=True),
            }.items()
        }
        order = random.Random(0)
        if options.each_wall:
            each_wall(report, stack, servers, files, log, options)
            return report.finish(as_json=options.json)
        for load, (_, _, counted, _) in LOADS.items():
            rounds = [in_turns(servers, load, options.seconds, order) for _ in range(options.runs)]
            rates = {way: [loads[way].rate for loads in rounds] for way in servers}
            cpu = {way: [loads[way].cpu_us for loads in rounds] for way in servers}
            report.add(load, rates, unit=f"{counted}/s", scale=1.0)
            report.compare(load, SHARED, OUTSIDE, least=0.97)
            report.compare(load, PASSED, OUTSIDE, least=0.97)
            report.compare(load, PRIVATE, PASTA, least=1.0)
            spent = f"{load}, CPU of nginx"
            report.add(spent, cpu, unit=f"us/{counted.removesuffix('s')}", scale=1.0)
            report.compare(spent, SHARED, OUTSIDE)
            report.compare(spent, PASSED, OUTSIDE)
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
