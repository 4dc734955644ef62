"""What a guest's published port carries: a large file and small requests, beside the same server outside. One run.

    PYTHONPATH=src python3 benchmarks/vm_network.py [--runs N] [--megabytes N] [--json]

Needs root, user-mode-linux, slirp4netns, nginx. The server is nginx with sendfile in the jail's guest, and the same
nginx outside with the same configuration of files. One client of this process reads over HTTP. Medians.
"""

from __future__ import annotations

import http.client
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import measure
import msgspec
import vm_shared as guests

from stockade import machines, workflow
from stockade.records.spec import Spec
from stockade.vm import store, transfer

SMALL, LARGE = "/small", "/large"
ROOM = 64 << 20
SMALL_CONTENT = "x" * 1023 + "\n"
OUTSIDE = """
daemon off; worker_processes 1; pid {place}/pid; error_log stderr crit;
events {{ worker_connections 128; }}
http {{
    access_log off; sendfile on; tcp_nopush on;
    client_body_temp_path {place}/a; proxy_temp_path {place}/b; fastcgi_temp_path {place}/c;
    uwsgi_temp_path {place}/d; scgi_temp_path {place}/e;
    server {{ listen 127.0.0.1:{port}; root {place}/www; }}
}}
"""


def get(port: int, path: str, connection: http.client.HTTPConnection | None = None) -> tuple[float, int]:
    """Seconds and bytes of a GET over a connection, or one of its own."""
    mine = connection or http.client.HTTPConnection(guests.HOST, port, timeout=30)
    began = time.perf_counter()
    mine.request("GET", path)
    answer = mine.getresponse()
    count = 0
    buffer = memoryview(bytearray(1 << 20))
    while got := answer.readinto(buffer):
        count += got
    seconds = time.perf_counter() - began
    if connection is None:
        mine.close()
    return seconds, count


def rate(port: int, size: int) -> float:
    """MB/s of the large file."""
    seconds, count = get(port, LARGE)
    if count != size:
        sys.exit(f"error: {count} of {size} bytes came")
    return count / seconds / 1e6


def small(port: int) -> float:
    """Median seconds of small requests, each over a connection of its own."""
    return statistics.median(get(port, SMALL)[0] for _ in range(20))


@contextmanager
def outside(place: Path) -> Iterator[int]:
    """nginx on a port of loopback, without walls."""
    with socket.create_server((guests.HOST, 0)) as probe:
        port = int(probe.getsockname()[1])
    (place / "nginx.conf").write_text(OUTSIDE.format(place=place, port=port))
    place.chmod(0o755)
    process = subprocess.Popen(
        ["nginx", "-c", str(place / "nginx.conf"), "-p", str(place), "-e", "stderr", "-g", "user root;"],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(500):
            try:
                get(port, SMALL)
                break
            except OSError:
                time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def specification() -> Spec:
    """The recipe's nginx with a small file in it."""
    spec = guests.nginx()
    content = {**spec.files.content, f"/srv/www{SMALL}": SMALL_CONTENT}
    return msgspec.structs.replace(spec, files=msgspec.structs.replace(spec.files, content=content))


def main() -> int:
    parser = measure.arguments(__doc__, runs=7)
    parser.add_argument("--megabytes", type=int, default=64, help="size of the large file (default %(default)s)")
    options = parser.parse_args()
    guests.need("linux.uml", "slirp4netns", "nginx")
    report = measure.Report("a guest's published port")
    size = options.megabytes << 20
    with guests.home() as directory:
        www = directory / "outside/www"
        www.mkdir(parents=True)
        (www / "small").write_text(SMALL_CONTENT)
        with open(www / "large", "wb") as file:
            for _ in range(options.megabytes):
                file.write(b"0123456789abcdef" * 65536)
        machines.prepare(("jail", "vm"))
        workflow.build(specification(), verify=False)
        port = guests.published(80)
        image = machines.image_of_jail(guests.NGINX, "web", size=2 * size + ROOM)
        store.create("web", image, memory=256 << 20, walls=("jail", "vm"), network="publish", publish=(port,))
        machines.start_guest("web").close()
        guests.first_answer(port.port, time.perf_counter())
        transfer.push("web", www / "large", f"/srv/www{LARGE}")
        with outside(directory / "outside") as plain:
            ways = {"guest": partial(rate, port.port, size), "outside": partial(rate, plain, size)}
            report.add("large file", measure.in_turn(ways, options.runs), unit="MB/s", scale=1.0)
            ways = {"guest": partial(small, port.port), "outside": partial(small, plain)}
            report.add("small GET", measure.in_turn(ways, options.runs))
        report.compare("large file", "guest", "outside")
        report.compare("small GET", "guest", "outside")
        median = statistics.median(report.samples["large file"]["guest"])
        report.figures.append(measure.Figure("large file from a guest, target", median, "MB/s", least=200))
        median = statistics.median(report.samples["small GET"]["guest"])
        report.figures.append(measure.Figure("small GET of a guest, target", median * 1000, "ms", most=3))
    return report.finish(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
