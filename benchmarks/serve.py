"""nginx outside and behind the walls: requests and bytes per second, in one run.

    PYTHONPATH=src python3 benchmarks/serve.py [--runs N] [--seconds S] [--json]

Needs root, nginx, wrk and passt. The same nginx with one worker and the same files serves outside, in a jail with
`network = "host"`, in one with a listening socket passed in, in one with a private network and a published port, and
outside behind plain pasta. wrk takes turns between them: small pages over kept connections, small pages each over a
connection of its own, and a large file. Medians.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import measure
import msgspec

from stockade import contain, workflow
from stockade.contain import Running
from stockade.records.spec import Spec

HOST = "127.0.0.1"
SMALL_BYTES = 1024
LARGE_BYTES = 64 << 20
SMALL = b"small page, ".ljust(SMALL_BYTES, b".")
USER = 33
INSIDE = 8080

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
    server {{ listen {address}:{port}; root /{root}; }}
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

#: What wrk asks for: path, further arguments, what of its output counts.
LOADS = {
    "small pages": ("/small", ("-c", "16"), "Requests/sec"),
    "connections": ("/small", ("-c", "16", "-H", "Connection: close"), "Requests/sec"),
    "large file": ("/large", ("-c", "4"), "Transfer/sec"),
}
UNITS = {"B": 1e-6, "KB": 1e-3, "MB": 1.0, "GB": 1e3, "": 1.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def configuration(*, port: int, run: str, root: str, address: str = HOST, user: str = "") -> str:
    return CONFIGURATION.format(port=port, run=run, root=root.lstrip("/"), address=address, user=user)


def jail(name: str, files: Path, *, port: int, network: Mapping[str, object]) -> str:
    """Build a jail whose nginx listens on `port`."""
    spec = {
        "name": name,
        "service": {"command": ["/usr/sbin/nginx", "-c", "/etc/nginx.conf", "-e", "stderr"], "user": "www-data"},
        "files": {"content": {"/etc/nginx.conf": configuration(port=port, run="/run/nginx", root="/srv/www")}},
        "directories": {"/run/nginx": {"owner": "www-data"}},
        "mounts": [{"source": str(files), "target": "/srv/www"}],
        "accounts": [{"name": "www-data"}],
        "network": network,
        "policy": {"capabilities": []},
    }
    workflow.build(msgspec.convert(spec, Spec), observe=False, verify=False)
    return name


@contextmanager
def outside(directory: Path, files: Path, port: int, log: IO[bytes], *, behind_pasta: bool) -> Iterator[None]:
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
        yield
    finally:
        stop(process, behind_pasta=behind_pasta)


def stop(process: subprocess.Popen[bytes], *, behind_pasta: bool) -> None:
    """End nginx; pasta ends with its child."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, children) if behind_pasta else (process.pid,):
        os.kill(pid, signal.SIGTERM)
    process.wait(10)


def started(name: str, log: IO[bytes], sockets: tuple[int, ...] = ()) -> Running:
    # nginx takes over listening sockets whose numbers NGINX gives (src/core/nginx.c, ngx_add_inherited_sockets).
    environment = {"NGINX": "".join(f"{3 + number};" for number in range(len(sockets)))} if sockets else {}
    return contain.launch(name, environment=environment, sockets=sockets, stdout=log.fileno(), stderr=log.fileno())


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


def wrk(port: int, load: str, seconds: float) -> float:
    """Requests, or MB, in a second."""
    path, options, counted = LOADS[load]
    done = subprocess.run(
        ["wrk", "-t", "1", "-d", f"{seconds:g}s", *options, f"http://{HOST}:{port}{path}"],
        capture_output=True, text=True, check=True, timeout=60 + seconds,
    )  # fmt: skip
    found = re.search(rf"{counted}:\s+([0-9.]+)([KMG]?B?)", done.stdout)
    if found is None or "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        sys.exit(f"error: wrk says: {done.stdout}")
    return float(found[1]) * UNITS[found[2]]


def main() -> int:
    parser = measure.arguments(__doc__, runs=7)
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement (default %(default)s)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("error: run it as root: the services run as www-data")
    report = measure.Report("nginx, one worker")
    with measure.home() as directory, ExitStack() as stack:
        directory.chmod(0o755)
        files = directory / "www"
        files.mkdir()
        (files / "small").write_bytes(SMALL)
        (files / "large").write_bytes(os.urandom(1 << 20) * (LARGE_BYTES >> 20))
        listener = stack.enter_context(socket.create_server((HOST, 0), backlog=511))
        ports = {way: free_port() for way in (OUTSIDE, SHARED, PRIVATE, PASTA)}
        ports[PASSED] = int(listener.getsockname()[1])
        log = stack.enter_context(tempfile.TemporaryFile())
        private = {"mode": "private"}
        published = {"mode": "private", "publish": [f"{HOST}:{ports[PRIVATE]}:{INSIDE}"]}
        stack.enter_context(outside(directory, files, ports[OUTSIDE], log, behind_pasta=False))
        stack.enter_context(outside(directory, files, ports[PASTA], log, behind_pasta=True))
        shared = jail("shared", files, port=ports[SHARED], network={"mode": "host"})
        stack.enter_context(started(shared, log))
        passed = jail("passed", files, port=ports[PASSED], network=private)
        stack.enter_context(started(passed, log, (listener.fileno(),)))
        stack.enter_context(started(jail("private", files, port=INSIDE, network=published), log))
        for port in ports.values():
            ready(port, log)
        for load in LOADS:
            ways: dict[str, Callable[[], float | None]] = {
                way: partial(wrk, port, load, options.seconds) for way, port in ports.items()
            }
            unit = "MB/s" if LOADS[load][2].startswith("Transfer") else "1/s"
            report.add(load, measure.in_turn(ways, options.runs, warm=1), unit=unit, scale=1.0)
            report.compare(load, SHARED, OUTSIDE, least=0.97)
            report.compare(load, PASSED, OUTSIDE, least=0.97)
            report.compare(load, PRIVATE, PASTA, least=1.0)
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
